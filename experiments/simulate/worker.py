"""One prefill or unified worker: its queue of events and its iterations.

    receive   what has come since the last iteration is handled, in order
    form      the next prefill batch (`batches`), else a decode step of those that run
    forward   base + work of all slices and what a rest adds, or the decode step; copies back from
              host memory first
    finish    KV is cached, streams hold it, first tokens leave

Results are known at the end of their iteration (SGLang without its overlap schedule). Copies to
host memory run beside forwards, one after the other; a forward waits for those that come back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from experiments.request_row import EventName
from experiments.simulate.batches import Batches, Limits, Request, Slice
from experiments.simulate.events import Action, Clock
from experiments.simulate.holdings import Holdings, HostMemory, Moved, Stream
from experiments.simulate.pool import Pool
from experiments.simulate.table import StreamTable
from experiments.simulate.timeline import Happened
from router.placement import WorkerView
from sglang_stream.policy import CostModel, Decode, Invalidation, PolicyName, Rest

_MEASURED_TOKENS = 64  # a smaller forward says little of the speed
_POLL_S = 1e-3
_SPEEDS = 15  # forwards whose median is the speed that a worker tells routers of


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is and how it plans. `host_tokens`: of KV that fit into host memory;
    `foresees`: see `table`."""

    cost: CostModel
    rest: Rest
    decode: Decode
    kv_tokens: int
    page: int
    policy: PolicyName
    invalidation: Invalidation
    host_tokens: int
    limits: Limits
    foresees: bool


class Worker:
    """`computed` hears of each slice of a request when its KV is there; `prefilled`, of the one
    with the first token, and says whether it decodes here; `ended`, of one with all tokens.
    `happened`: where it notes what it does, None if nobody wants to know."""

    def __init__(
        self,
        clock: Clock,
        name: str,
        settings: WorkerSettings,
        computed: Callable[[Request], None],
        prefilled: Callable[[Request], bool],
        ended: Callable[[Request], None],
        happened: list[Happened] | None = None,
    ) -> None:
        self.name = name
        self.pool = Pool(settings.kv_tokens, settings.page)
        host = HostMemory(settings.host_tokens)
        kv = Holdings(
            self.pool, settings.policy, settings.invalidation, host, settings.cost.prefill
        )
        self.table = StreamTable(kv, foresees=settings.foresees)
        self.batches = Batches(
            self.pool, self.table, settings.policy, settings.cost, settings.limits
        )
        self._clock = clock
        self._settings = settings
        self._prefilled = prefilled
        self._computed = computed
        self._ended = ended
        self._happened = happened
        self._inbox: deque[Action] = deque()
        self._awake = False
        self._link_free_s = 0.0
        self._last_forward_s = -math.inf
        self._speeds: deque[float] = deque(maxlen=_SPEEDS)

    # --- receive ------------------------------------------------------------------------------

    def post(self, action: Action) -> None:
        """Lets the worker's loop do something, before its next iteration."""
        self._inbox.append(action)
        self._wake()

    def ask(self, request: Request) -> None:
        """A full request joins the queue."""
        self.batches.queue.append(request)

    def view(self, shared_tokens: int = 0) -> WorkerView:
        """What a router knows of it, without the delay of reports."""
        batches = self.batches
        todo = sum(s.tokens - s.held for s in self.table.live.values() if not s.sealed)
        todo += sum(r.tokens - r.done for r in batches.queue)
        return WorkerView(
            self.name,
            todo_tokens=todo,
            tokens_per_s=median(self._speeds) if self._speeds else 0.0,
            free_tokens=self.pool.available,
            held_tokens=self.table.kv.held_tokens,
            requests=len(batches.running) + len(batches.queue),
            streams=self.table.open_count,
            shared_tokens=shared_tokens,
        )

    # --- iterations ---------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            self._clock.at(self._clock.now, self._loop)

    def _loop(self) -> None:
        self.table.now = self._clock.now
        while self._inbox:
            self._inbox.popleft()()
        formed = self.batches.form()
        wait_s = self._move(formed.preempted, formed.restored)
        begins_s = self._clock.now + wait_s
        if formed.slices:
            seconds = self._prefill_s(formed.slices, begins_s - self._last_forward_s)
            for part in formed.slices if self._happened is not None else ():
                what: EventName = "pass" if isinstance(part.owner, Stream) else "prefill"
                self._note(what, begins_s, seconds, part.end - part.start, part.owner.id)
            self._end_after(wait_s + seconds, lambda: self._finish_prefill(formed.slices))
        elif self.batches.running:
            running = list(self.batches.running)
            self._move(self.batches.make_room_to_decode(), [])
            self.pool.allocate(len(running))
            for request in running:
                request.decoded += 1
            context = sum(r.tokens + r.generated for r in running)
            seconds = self._settings.decode.seconds(len(running), context)
            self._note("decode", begins_s, seconds, len(running))
            self._end_after(wait_s + seconds, lambda: self._finish_decode(running))
        else:
            self._awake = bool(formed.preempted or formed.restored)
            if self._awake:  # somebody may fit now
                self._end_after(max(wait_s, _POLL_S), lambda: None)

    def _end_after(self, seconds: float, finish: Action) -> None:
        def end() -> None:
            finish()
            self._loop()

        self._clock.at(self._clock.now + seconds, end)

    def _prefill_s(self, slices: list[Slice], rested_s: float) -> float:
        prefill = self._settings.cost.prefill
        work_s = sum(prefill.work_s(part.end - part.start, part.start) for part in slices)
        seconds = prefill.base_s + work_s + self._settings.rest.seconds(rested_s)
        tokens = sum(part.end - part.start for part in slices)
        if tokens >= _MEASURED_TOKENS:
            self._speeds.append(tokens / seconds)
        return seconds

    def _move(self, preempted: list[Moved], restored: list[Moved]) -> float:
        """Queues copies to and from host memory; returns how long those back keep a forward."""
        now, cost = self._clock.now, self._settings.cost
        at = max(now, self._link_free_s)
        for moved in preempted:
            self._note("preempt", now, 0.0, moved.tokens, moved.stream_id)
            at += cost.swap_out.seconds(moved.copied) if moved.copied else 0.0
        for moved in restored:
            seconds = cost.swap_in.seconds(moved.copied)
            self._note("restore", at, seconds, moved.copied, moved.stream_id)
            at += seconds
        self._link_free_s = at
        return at - now if restored else 0.0

    def _note(
        self, what: EventName, t_s: float, seconds: float, tokens: int, query_id: str | None = None
    ) -> None:
        if self._happened is not None:
            self._happened.append(Happened(what, t_s, seconds, tokens, query_id, self.name))

    # --- finish -------------------------------------------------------------------------------

    def _finish_prefill(self, slices: list[Slice]) -> None:
        self._last_forward_s = self._clock.now
        for part in slices:
            owner = part.owner
            node = self.pool.insert(owner.root, part.prompt, part.end, part.end - part.start)
            self.pool.lock(node)
            self.pool.unlock(part.node)
            if isinstance(owner, Stream):
                self.table.pass_done(owner, part.prompt, part.start, part.end, node)
            else:
                owner.node, owner.done = node, part.end
                self._computed(owner)
                if part.end == owner.tokens:
                    self._first_token(owner)

    def _first_token(self, request: Request) -> None:
        request.generated = 1
        if not self._prefilled(request):
            return
        if request.generated >= request.output:
            self.release(request)
            self._ended(request)
        else:
            self.batches.running.append(request)

    def _finish_decode(self, running: list[Request]) -> None:
        self._last_forward_s = self._clock.now
        for request in running:
            request.generated += 1
            if request.generated >= request.output:
                self.batches.running.remove(request)
                self.release(request)
                self._ended(request)

    def release(self, request: Request) -> None:
        """Lets go of a request's KV; that of its prompt stays cached until it is evicted."""
        assert request.node is not None
        self.pool.unlock(request.node)
        self.pool.give_back(request.decoded)
        if request.stream is not None:
            self.table.finish(request.stream)
