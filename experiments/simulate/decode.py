"""A decode worker: room for a prompt's KV before it is computed, then one token a step.

reserve --(room)--> [prefill elsewhere, KV on its way] --start--> running --step--> ended
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from experiments.simulate.batches import Request
from experiments.simulate.events import Action, Clock
from router.placement import WorkerView
from sglang_stream.policy import Decode


class DecodeWorker:
    """`ended` hears of a request with all its tokens. Prompt and answer have their KV from the
    reservation on."""

    def __init__(
        self,
        clock: Clock,
        name: str,
        kv_tokens: int,
        cost: Decode,
        ended: Callable[[Request], None],
    ) -> None:
        self.name = name
        self.free = kv_tokens
        self._clock = clock
        self._cost = cost
        self._ended = ended
        self._waiting: deque[tuple[Request, Action]] = deque()
        self._here = 0
        self._running: list[Request] = []
        self._joining: list[Request] = []
        self._is_stepping = False

    def view(self) -> WorkerView:
        """What a router knows of it."""
        requests = self._here + len(self._waiting)
        return WorkerView(self.name, free_tokens=self.free, requests=requests)

    def reserve(self, request: Request, then: Action) -> None:
        """Runs `then` as soon as there is room for a request; first come, first served."""
        self._waiting.append((request, then))
        self._serve()

    def start(self, request: Request) -> None:
        """All KV of a request's prompt is here, and its first token is out."""
        if request.generated >= request.output:
            self._end(request)
            return
        self._joining.append(request)
        if not self._is_stepping:
            self._step()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0].space <= self.free:
            request, then = self._waiting.popleft()
            self.free -= request.space
            self._here += 1
            then()

    def _step(self) -> None:
        self._running += self._joining
        self._joining = []
        self._is_stepping = bool(self._running)
        if self._running:
            context = sum(r.tokens + r.generated for r in self._running)
            seconds = self._cost.seconds(len(self._running), context)
            self._clock.at(self._clock.now + seconds, self._finish)

    def _finish(self) -> None:
        for request in self._running:
            request.generated += 1
        done = [r for r in self._running if r.generated >= r.output]
        self._running = [r for r in self._running if r.generated < r.output]
        for request in done:
            self._end(request)
        self._step()

    def _end(self, request: Request) -> None:
        self.free += request.space
        self._here -= 1
        self._ended(request)
        self._serve()
