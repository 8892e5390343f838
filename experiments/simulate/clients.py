"""Who asks: one client for each request of a load, in one of the modes.

    waiting    one ordinary request when the last step has come
    resend     an ordinary request with what has come, for one token, whenever there is something
               new and the one before is answered; then as waiting
    streaming  open, a call for each step, seal

By `sdk` a client makes one call after the other, each after the answer to the one before; steps
that come meanwhile go into the next call (the newest list of an update stream). `direct` calls wait
for nothing, as those of a client inside the server's process. The last call is also the seal.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from typing import Protocol

from experiments.simulate.batches import Request
from experiments.simulate.events import Action, Clock
from experiments.simulate.holdings import Stream
from experiments.simulate.pool import Node, Prompt
from experiments.simulate.table import tokens_of
from experiments.simulate.worker import Worker
from experiments.workload.shapes import Arrived, Document, Query, Step


class Server(Protocol):
    """What clients call. `call_s`: from a call until the worker has it, and as long back."""

    clock: Clock
    call_s: float

    def request_call_s(self) -> float:
        """The same for a call for an answer, with all that it takes more after a rest."""

    def place(self, tokens: int, roots: dict[str, Node], prompt: Prompt) -> Worker:
        """The worker for a prompt of which so much is known; `roots`: its trees by worker."""

    def ask(self, worker: Worker, request: Request, client: Client) -> None:
        """Hands a worker a full request; the client hears of its tokens."""


class Client:
    """One request. `stream`, `request`: once they are there, of several the last; times as in
    `RequestRow`."""

    def __init__(self, server: Server, arrived: Arrived, output: int) -> None:
        self.query = arrived.query
        self.arrival_s = arrived.at_s
        self.stream: Stream | None = None
        self.request: Request | None = None
        self.seal_s: float | None = None
        self.first_token_s: float | None = None
        self.end_s: float | None = None
        self._server = server
        self._clock = server.clock
        self._output = output

    @property
    def last_chunk_s(self) -> float:
        return self.arrival_s + self.query.last_chunk_s

    @property
    def space(self) -> int:
        """KV tokens of its largest request, with the answer."""
        return self.query.prompt_tokens + self._output

    def begin(self) -> None:
        """Plans all that it will do."""
        raise NotImplementedError

    def first_token(self, request: Request, at_s: float) -> None:
        """The first token of one of its requests comes at that time."""
        if request is self.request:
            self.first_token_s = at_s

    def ended(self, request: Request, at_s: float) -> None:
        """The last one comes."""
        if request is self.request:
            self.end_s = at_s

    def _ask(self, roots: dict[str, Node], steps: int) -> None:
        """Sends an ordinary request with the first `steps` steps."""
        query = self.query
        is_last = steps == len(query.steps)
        prompt = opening_of(query) + query.context(steps)
        prompt += question_of(query) if is_last else ()
        worker = self._server.place(tokens_of(prompt), roots, prompt)
        root = roots.setdefault(worker.name, Node())
        name = query.query_id if is_last else f"{query.query_id}/{steps}"
        output = self._output if is_last else 1
        request = Request(name, root, prompt, tokens_of(prompt), output)
        if is_last:
            self.seal_s, self.request = self._clock.now, request
        call_s = self._server.request_call_s()
        self._clock.at(self._clock.now + call_s, lambda: self._server.ask(worker, request, self))


class WaitingClient(Client):
    def begin(self) -> None:
        self._clock.at(self.last_chunk_s, lambda: self._ask({}, len(self.query.steps)))


class ResendClient(Client):
    """`_times_s`: when steps come; `_sent`: how many its latest request had; `_roots`: the trees
    with its KV, by worker."""

    def __init__(self, server: Server, arrived: Arrived, output: int) -> None:
        super().__init__(server, arrived, output)
        self._times_s = [arrived.at_s + step.at_s for step in arrived.query.steps]
        self._sent = 0
        self._roots: dict[str, Node] = {}

    @property
    def space(self) -> int:
        """A list before the last one may be the longest."""
        query = self.query
        before = max(query.context_tokens(steps) for steps in range(len(query.steps)))
        return max(super().space, query.opening_tokens + before + 1)

    def begin(self) -> None:
        self._send_from(self.arrival_s)

    def ended(self, request: Request, at_s: float) -> None:
        super().ended(request, at_s)
        if request is not self.request:
            self._send_from(at_s)

    def _send_from(self, time_s: float) -> None:
        """Sends what has come as soon as there is something new, from that time on."""
        self._clock.at(max(time_s, self._times_s[self._sent]), self._send)

    def _send(self) -> None:
        self._sent = bisect_right(self._times_s, self._clock.now)
        self._ask(self._roots, self._sent)


class StreamingClient(Client):
    """`_pending`: steps that have come and are not sent; `_to_come`: how many others there are;
    `_is_calling`: an answer is awaited."""

    def __init__(
        self, server: Server, arrived: Arrived, output: int, *, awaits_answers: bool
    ) -> None:
        super().__init__(server, arrived, output)
        self._awaits_answers = awaits_answers
        self._pending: list[Step] = []
        self._to_come = len(arrived.query.steps)
        self._is_calling = False
        self._worker: Worker | None = None

    def begin(self) -> None:
        self._clock.at(self.arrival_s, self._open)
        for step in self.query.steps:
            self._clock.at(self.arrival_s + step.at_s, partial(self._came, step))

    def _open(self) -> None:
        opening = opening_of(self.query)
        self._worker = worker = self._server.place(tokens_of(opening), {}, opening)

        def open_stream() -> None:
            self.stream = worker.table.open(self.query.query_id, self.query.mode, opening)

        self._call(open_stream, self._server.call_s)

    def _came(self, step: Step) -> None:
        self._pending.append(step)
        self._to_come -= 1
        if not self._is_calling:
            self._next()

    def _next(self) -> None:
        """The next call, if there is one to make."""
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        is_last = not self._to_come
        if is_last:
            self.seal_s = self._clock.now

        def send() -> None:
            self._apply(steps)
            if is_last:
                self._seal()

        self._call(send, self._server.request_call_s() if is_last else self._server.call_s)

    def _call(self, action: Action, call_s: float) -> None:
        """A call that the stream's worker has after `call_s`."""
        assert self._worker is not None
        worker = self._worker
        self._is_calling = self._awaits_answers

        def handle() -> None:
            action()
            if self._awaits_answers:
                self._clock.at(self._clock.now + self._server.call_s, self._answered)

        self._clock.at(self._clock.now + call_s, lambda: worker.post(handle))

    def _answered(self) -> None:
        self._is_calling = False
        self._next()

    def _apply(self, steps: list[Step]) -> None:
        assert self._worker is not None
        assert self.stream is not None
        table = self._worker.table
        if self.query.mode == "update":
            table.update(self.stream, steps[-1].documents)
        else:
            table.append(self.stream, tuple(d for step in steps for d in step.documents))

    def _seal(self) -> None:
        assert self._worker is not None
        assert self.stream is not None
        stream = self.stream
        self._worker.table.seal(stream)
        prompt = stream.prompt + question_of(self.query)
        self.request = Request(
            stream.id, stream.root, prompt, tokens_of(prompt), self._output, stream
        )
        self._server.ask(self._worker, self.request, self)


def opening_of(query: Query) -> Prompt:
    return _one("opening", query.opening_tokens)


def question_of(query: Query) -> Prompt:
    return _one("question", query.question_tokens)


def _one(name: str, tokens: int) -> Prompt:
    """A document that no retriever names."""
    return (Document(f"\0{name}", tokens),) if tokens else ()
