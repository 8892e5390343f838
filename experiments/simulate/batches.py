"""Which prefill slices make up the next iteration of a worker.

The counterpart of `sglang_stream/engine/schedule.py` and `passes.py`, and of SGLang's
`PrefillAdder`, in the same four steps:

    place     full requests are put in the order of the policy
    decide    the planner sees them, all streams and the pool
    apply     victims are unlocked or swapped out, copies come back from host memory
    form      full requests and passes are admitted, in order, within tokens and memory

Every running request's output is set aside in full (SGLang's estimate is lower at first, and at
most 4,096 tokens), so that none is ever retracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.simulate.holdings import Moved, Stream
from experiments.simulate.pool import Node, Pool, Prompt
from experiments.simulate.table import StreamTable
from sglang_stream.policy import (
    POLICIES,
    Budget,
    CostModel,
    Decision,
    Pace,
    Planner,
    PolicyName,
    PoolView,
    Preemption,
    Turns,
    View,
)
from sglang_stream.policy.policies import Key

_SHORTEST = 4  # a pass before an expected seal takes at least this part of the usual time


@dataclass(eq=False)
class Request:
    """A full request. `prompt`, `tokens`: with the question; `output`: tokens to generate;
    `stream`: the sealed one that it ends; `root`: of the tree with its KV. `node`: the end of what
    it has locked; `done`: tokens of the prompt whose KV is cached; `found`: those that were when it
    was admitted; `generated`: tokens so far; `decoded`: those that have KV here; `sent`: tokens
    whose KV has gone to a decode worker."""

    id: str
    root: Node
    prompt: Prompt
    tokens: int
    output: int
    stream: Stream | None = None
    arrival: int = 0
    since_s: float = 0.0
    key: Key = ()
    node: Node | None = None
    done: int = 0
    found: int = 0
    generated: int = 0
    decoded: int = 0
    sent: int = 0

    @property
    def space(self) -> int:
        """KV tokens of prompt and answer."""
        return self.tokens + self.output

    @property
    def reserve(self) -> int:
        """Tokens that it may still decode."""
        return max(self.output - self.generated, 0)


@dataclass(frozen=True)
class Slice:
    """Tokens `start` to `end` of a prompt, computed in one iteration for a request or, as a pass,
    for an open stream. `node`: the end of the prefix that it has locked."""

    owner: Request | Stream
    prompt: Prompt
    start: int
    end: int
    node: Node


@dataclass(frozen=True)
class Limits:
    """`batch_tokens`: of an iteration; `pass_tokens`, `pass_s`: of its passes, None for what `Pace`
    finds; `preemption`: see `policy.types`."""

    batch_tokens: int
    pass_tokens: int
    pass_s: float | None
    preemption: Preemption


@dataclass
class Formed:
    """An iteration's slices, and whose KV is given up and comes back before it."""

    slices: list[Slice] = field(default_factory=list)
    preempted: list[Moved] = field(default_factory=list)
    restored: list[Moved] = field(default_factory=list)


class Batches:
    """`queue`: full requests that wait; `running`: those that decode; `chunked`: one whose prompt
    is computed in several iterations."""

    def __init__(
        self, pool: Pool, table: StreamTable, policy: PolicyName, cost: CostModel, limits: Limits
    ) -> None:
        self.queue: list[Request] = []
        self.running: list[Request] = []
        self.chunked: Request | None = None
        self.planner = Planner(POLICIES[policy], limits.preemption, cost)
        self.pace = Pace()
        self._cost = cost
        self._pool = pool
        self._table = table
        self._limits = limits
        self._orders_requests = policy != "default"
        self._turns = Turns()

    def form(self) -> Formed:
        """The next iteration's slices, admitted: their prefixes are locked, their KV allocated."""
        formed = Formed()
        passes: list[tuple[Key, Stream, int]] = []
        later: list[Request] = []
        tokens = self._limits.batch_tokens
        if self._table.live:
            self._place()
            full = self._full_views()
            decision = self._decide(full)
            self._apply(decision, formed)
            passes = self._passes(decision)
            later, tokens = self._postpone(full)
        formed.slices = _Adder(self, self._pool, tokens).fill(passes)
        self.queue += later
        for part in formed.slices:
            self._pool.allocate(part.end - part.start)
            if isinstance(part.owner, Stream):
                self._table.kv.started(part.owner)
        self._turns.began(
            self._table.now,
            decodes=not formed.slices and bool(self.running),
            passes_s=self._alone_s(formed.slices),
        )
        return formed

    def _alone_s(self, slices: list[Slice]) -> float | None:
        """How long an iteration of passes alone takes, None of another one."""
        if not slices or not all(isinstance(part.owner, Stream) for part in slices):
            return None
        prefill = self._cost.prefill
        works = (prefill.work_s(part.end - part.start, part.start) for part in slices)
        return prefill.base_s + sum(works)

    def make_room_to_decode(self) -> list[Moved]:
        """Preempts streams if the next decode step would not fit; returns what they gave up."""
        deficit = len(self.running) - self._pool.available
        if deficit <= 0:
            return []
        victims = self.planner.make_room(self._table.kv.order.views, deficit, self._pool_view())
        return [self._table.kv.preempt(victim) for victim in victims]

    def admitted(self, request: Request) -> None:
        """A request has its own lock now; its stream's is given back."""
        self.queue.remove(request)
        if request.stream is not None:
            self._table.admitted(request.stream)

    # --- place --------------------------------------------------------------------------------

    def _place(self) -> None:
        for request in self.queue:
            if request.stream is not None or not request.key:
                request.key = self._table.kv.policy(self._full_view(request))
        if self._orders_requests:
            self.queue.sort(key=lambda r: r.key)

    def _full_view(self, request: Request) -> View:
        if not request.arrival:
            request.arrival, request.since_s = self._table.arrive(), self._table.now
            self.pace.arrived(self._table.now)
        stream = request.stream
        # A request that has been begun holds what it has computed; its stream does not any more.
        held = request.done if stream is None or request is self.chunked else stream.held
        saved = 0 if stream is None else stream.saved
        ready = max(held, saved)
        missing = max(0, request.tokens - ready)
        return View(
            id=request.id if stream is None else stream.id,
            arrival=request.arrival if stream is None else stream.arrival,
            tokens=request.tokens,
            held=held,
            full=True,
            latest=request.arrival if stream is None else stream.latest,
            saved=saved,
            reserve=request.reserve + 2 * self._pool.page,
            since_s=request.since_s if stream is None else stream.since_s,
            work_s=self._table.kv.prefill.work_s(missing, ready),
        )

    # --- decide -------------------------------------------------------------------------------

    def _decide(self, full: list[View]) -> Decision:
        table = self._table
        if not full and not table.kv.to_compute:
            return Decision()
        return self.planner.plan(full, table.kv.order.views, self._pool_view(), self._budget())

    def _pool_view(self) -> PoolView:
        left = self._pool.available - sum(r.reserve for r in self.running)
        return PoolView(left, left, self._pool.page, self._table.kv.host.capacity)

    def _full_views(self) -> list[View]:
        """The full requests that the next iteration could admit, in the order of the queue."""
        budget = self._limits.batch_tokens
        queue = self.queue if self.chunked is None else [self.chunked, *self.queue]
        full: list[View] = []
        for request in queue:
            if budget <= 0:
                break
            view = self._full_view(request)
            full.append(view)
            budget -= max(1, view.tokens - view.ready)
        return full

    def _budget(self) -> Budget:
        """What passes may take of the next iteration."""
        if self._turns.decodes and self.running:
            return Budget(0, 0.0, decoding=True)
        seconds = self._limits.pass_s
        if seconds is None:
            seconds = self.pace.iteration_s(self._cost.prefill.base_s, self._table.now)
        due_s = self._table.next_due_s()
        if due_s is not None:
            seconds = min(seconds, max(seconds / _SHORTEST, due_s - self._table.now))
        return Budget(self._limits.pass_tokens, seconds, decoding=bool(self.running))

    # --- apply --------------------------------------------------------------------------------

    def _apply(self, decision: Decision, formed: Formed) -> None:
        kv = self._table.kv
        formed.preempted = [kv.preempt(victim) for victim in decision.victims]
        restored = [kv.restore(stream_id) for stream_id in decision.restores]
        formed.restored = [moved for moved in restored if moved.copied]

    def _passes(self, decision: Decision) -> list[tuple[Key, Stream, int]]:
        """The planned passes: key, stream, tokens at most. A stream that has lost its KV holds what
        is still cached, which counts as if it were computed."""
        kv, pool, spare = self._table.kv, self._pool, decision.spare
        passes: list[tuple[Key, Stream, int]] = []
        for chosen in decision.passes:
            stream = self._table.live[chosen.id]
            room = chosen.tokens + spare
            if stream.hold is None:
                before = pool.available
                kv.hold(stream)
                room -= before - pool.available
                if room < 0:
                    kv.let_go(stream)
                    continue
            tokens = min(chosen.tokens, room, stream.cacheable(pool.page) - stream.held)
            tokens -= tokens % pool.page
            spare = room - max(0, tokens)
            if tokens >= pool.page:
                key = kv.policy(stream.view(pool.page, kv.prefill))
                passes.append((key, stream, tokens))
        return passes

    def _postpone(self, full: list[View]) -> tuple[list[Request], int]:
        """Takes full requests that are not to share the next iteration out of the queue; and the
        tokens of that iteration."""
        usual = self._limits.batch_tokens
        if len(self._table.live) == self._table.open_count:
            return [], usual  # nobody is sealed
        together, tokens = self.planner.together(full, usual)
        if tokens > usual:
            tokens += together * (self._pool.page - 1)  # each part is counted in whole pages
        elif together == len(full):
            return [], usual
        kept = together - (self.chunked is not None)
        later = self.queue[kept:]
        del self.queue[kept:]
        return later, tokens


class _Adder:
    """What still fits into one iteration. `_tokens`: to compute; `_reserved`: KV set aside for what
    was admitted and for the answers of those that decode."""

    def __init__(self, batches: Batches, pool: Pool, tokens: int) -> None:
        self._batches = batches
        self._pool = pool
        self._tokens = tokens
        self._reserved = sum(r.reserve for r in batches.running)
        self._slices: list[Slice] = []

    def fill(self, passes: Sequence[tuple[Key, Stream, int]]) -> list[Slice]:
        """Admits full requests in the order of the queue, and each pass before those that come
        after it in the policy's order."""
        batches = self._batches
        if batches.chunked is not None:
            self._go_on(batches.chunked)
        waiting = list(passes)[::-1]
        for request in list(batches.queue):
            while waiting and waiting[-1][0] < request.key and self._is_open():
                self._add_pass(*waiting.pop()[1:])
            if not self._is_open() or not self._add_request(request):
                return self._slices
        while waiting and self._is_open():
            self._add_pass(*waiting.pop()[1:])
        return self._slices

    def _is_open(self) -> bool:
        return self._tokens > 0 and self._room() > 0

    def _room(self) -> int:
        return self._pool.available - self._reserved

    def _go_on(self, request: Request) -> None:
        """The next slice of the request that is computed in several iterations."""
        assert request.node is not None
        room = min(self._tokens, self._room())
        end = min(request.tokens, request.done + (room if room > 0 else self._tokens))
        self._admit(request, request.done, end, request.node)

    def _add_request(self, request: Request) -> bool:
        """False if it does not fit, so that nothing after it is looked at."""
        pool = self._pool
        node, length = pool.match(request.root, request.prompt)
        length = min(length, request.tokens - 1)  # the last token is always computed
        length -= length % pool.page
        if request.stream is None:
            request.done = length
        need = request.tokens - length + request.reserve + pool.page
        if need >= self._room() - pool.unlocked(node):
            return False
        new = request.tokens - length
        if self._paged(new) > self._tokens:
            new = (length + self._tokens) // pool.page * pool.page - length
            if new <= 0 or self._batches.chunked is not None:
                return False
        pool.lock(node)
        request.done = request.found = length
        request.node = node
        self._batches.admitted(request)
        self._admit(request, length, length + new, node)
        return True

    def _add_pass(self, stream: Stream, tokens: int) -> None:
        """Cuts a pass to what fits, and leaves it out if nothing does."""
        pool = self._pool
        node, start = pool.match(stream.root, stream.prompt)
        memory = self._room() - pool.unlocked(node) - 2 * pool.page
        end = min(start + min(tokens, self._tokens, memory), stream.tokens)
        end -= end % pool.page
        if end <= start:
            return
        pool.lock(node)
        self._slices.append(Slice(stream, stream.prompt, start, end, node))
        self._take(end - start, 0)

    def _admit(self, request: Request, start: int, end: int, node: Node) -> None:
        is_last = end == request.tokens
        self._batches.chunked = None if is_last else request
        self._slices.append(Slice(request, request.prompt, start, end, node))
        self._take(end - start, request.reserve if is_last else 0)

    def _take(self, new: int, answer: int) -> None:
        new = self._paged(new)
        self._tokens -= new
        self._reserved += new + self._pool.page + answer

    def _paged(self, tokens: int) -> int:
        return -(-tokens // self._pool.page) * self._pool.page
