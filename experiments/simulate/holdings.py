"""The KV of a worker's streams: which prefix each holds, what lies in host memory, who is first.

The counterpart of `sglang_stream/engine/holdings.py` and `stream.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from experiments.simulate.pool import Hold, Node, Pool, Prompt
from sglang_stream.messages import Mode
from sglang_stream.policy import (
    POLICIES,
    Invalidation,
    Order,
    PolicyName,
    Prefill,
    Victim,
    View,
)


@dataclass
class Usage:
    """The counters of a stream, as `usage.stream` gives them; the last four are told of workers
    only. `swaps`: of the preemptions."""

    chunks: int = 0
    updates: int = 0
    lcp_tokens: int = 0
    invalidated_tokens: int = 0
    computed_tokens: int = 0
    ready_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    swapped_tokens: int = 0
    passes: int = 0
    swaps: int = 0
    restored_tokens: int = 0
    found_again_tokens: int = 0


class Moved(NamedTuple):
    """Tokens whose KV a stream gave up, or got back; `copied`: to or from host memory."""

    stream_id: str
    tokens: int
    copied: int


@dataclass(eq=False)
class Stream:
    """One stream. `prompt`: without the question; `tokens`: of it. The rest as in
    `sglang_stream/engine/stream.py`."""

    id: str
    mode: Mode
    arrival: int
    opening: Prompt
    prompt: Prompt
    tokens: int
    root: Node = field(default_factory=Node)
    hold: Hold | None = None
    sealed: bool = False
    in_flight: bool = False
    preempted: bool = False
    saved: int = 0
    reach: int = 0
    latest: int = 0
    since_s: float = 0.0
    due_s: float = 0.0
    stays: float = 1.0
    last_chunk_s: float = 0.0
    gaps_s: float = 0.0
    usage: Usage = field(default_factory=Usage)

    @property
    def held(self) -> int:
        return self.hold.length if self.hold is not None else 0

    def cacheable(self, page: int) -> int:
        """Tokens that fill whole pages."""
        return self.tokens - self.tokens % page

    def view(self, page: int, prefill: Prefill) -> View:
        """How the planner sees it."""
        tokens = self.tokens if self.sealed else self.cacheable(page)
        held, saved = self.held, self.saved
        ready = held if held > saved else saved
        return View(
            self.id,
            self.arrival,
            tokens,
            held,
            self.sealed,
            self.latest,
            saved,
            0,
            self.in_flight,
            self.preempted,
            self.since_s,
            prefill.work_s(tokens - ready, ready) if tokens > ready else 0.0,
            self.due_s,
            tokens - int(self.stays * tokens),
        )


class HostMemory:
    """Lengths of copies of streams' KV, within `capacity` tokens; the oldest copy gives way."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = 0
        self._copies: OrderedDict[str, int] = OrderedDict()

    def put(self, stream_id: str, length: int) -> list[str]:
        """Keeps a copy, which must fit; returns whose copies it has dropped for it."""
        self.drop(stream_id)
        dropped: list[str] = []
        while self.tokens + length > self.capacity:
            oldest, gone = self._copies.popitem(last=False)
            self.tokens -= gone
            dropped.append(oldest)
        self._copies[stream_id] = length
        self.tokens += length
        return dropped

    def drop(self, stream_id: str) -> None:
        """Forgets a copy, if there is one."""
        self.tokens -= self._copies.pop(stream_id, 0)


class Holdings:
    """What the streams of one worker hold. `order`: all of them but those whose request was
    admitted; `to_compute`: ids of the open ones that want a pass; `held_tokens`: of all."""

    def __init__(
        self,
        pool: Pool,
        policy: PolicyName,
        invalidation: Invalidation,
        host: HostMemory,
        prefill: Prefill,
    ) -> None:
        self.pool = pool
        self.policy = POLICIES[policy]
        self.order = Order(self.policy)
        self.host = host
        self.prefill = prefill
        self.to_compute: set[str] = set()
        self.held_tokens = 0
        self._invalidation: Invalidation = invalidation
        self._streams: dict[str, Stream] = {}

    def is_ready(self, stream: Stream) -> bool:
        """Whether it has nothing to compute."""
        return max(stream.held, stream.saved) >= stream.cacheable(self.pool.page)

    def rank(self, stream: Stream) -> None:
        """Gives a stream the place that it has now."""
        view = stream.view(self.pool.page, self.prefill)
        self._streams[view.id] = stream
        self.order.put(view)
        if view.missing and not view.full and not view.busy:
            self.to_compute.add(view.id)
        else:
            self.to_compute.discard(view.id)

    def forget(self, stream: Stream) -> None:
        """Lets go of all that it holds, and takes it out of the order."""
        self._release(stream)
        self._drop_copy(stream)
        self.order.drop(stream.id)
        self.to_compute.discard(stream.id)
        self._streams.pop(stream.id, None)

    def hold(self, stream: Stream) -> None:
        """Holds all that is cached of the prompt."""
        self.held_tokens -= stream.held
        stream.hold = self.pool.take(stream.root, stream.prompt, stream.hold)
        self.held_tokens += stream.held
        self.rank(stream)

    def let_go(self, stream: Stream) -> None:
        """Unlocks a stream's KV."""
        self._release(stream)
        self.rank(stream)

    def started(self, stream: Stream) -> None:
        """One of its passes is in the forward now."""
        stream.in_flight = True
        self.rank(stream)

    def computed(self, stream: Stream, leaf: Node, *, fits: bool) -> None:
        """The KV up to `leaf`, locked by the pass, is in the tree; `fits`: all of it still is the
        prompt's."""
        if self._streams.get(stream.id) is stream:
            self.hold(stream)
        self.pool.unlock(leaf)
        if not fits:
            self._end_branch(leaf, stream)

    def replace(self, stream: Stream, prompt: Prompt, tokens: int, lcp: int) -> int:
        """Puts another prompt in that shares `lcp` tokens with the one before. Returns the tokens
        whose KV was given up."""
        old, stream.prompt, stream.tokens = stream.hold, prompt, tokens
        stream.reach = min(stream.reach, lcp)
        if stream.saved > lcp:
            stream.saved = lcp - lcp % self.pool.page
            if not stream.saved:
                self._drop_copy(stream)
        self.hold(stream)
        stream.usage.found_again_tokens += stream.hold.found if stream.hold is not None else 0
        if old is None or old.length <= lcp:
            return 0
        self._end_branch(old.node, stream)
        return old.length - lcp

    def preempt(self, victim: Victim) -> Moved:
        """Unlocks a victim's KV, after copying it to host memory if so planned."""
        stream = self._streams[victim.id]
        held = stream.held
        copied = self._save(stream) if victim.swap else 0
        stream.usage.preemptions += 1
        stream.usage.swaps += copied > 0
        self._release(stream)
        stream.preempted = True
        self.rank(stream)
        return Moved(stream.id, held, copied)

    def restore(self, stream_id: str) -> Moved:
        """Brings a stream's KV back from host memory, if there is room."""
        stream = self._streams[stream_id]
        length = stream.saved
        if not length:
            return Moved(stream_id, 0, 0)
        self.hold(stream)
        missing = max(0, length - stream.held)
        if missing:
            if not self.pool.make_free(missing):
                return Moved(stream_id, 0, 0)
            self.pool.allocate(missing)
            self.pool.insert(stream.root, stream.prompt, length, missing)
        self._drop_copy(stream)
        self.hold(stream)
        stream.usage.restored_tokens += missing
        return Moved(stream_id, missing, missing)

    def _drop_copy(self, stream: Stream) -> None:
        self.host.drop(stream.id)
        stream.saved = 0

    def _release(self, stream: Stream) -> None:
        self.held_tokens -= stream.held
        self.pool.release(stream.hold)
        stream.hold = None

    def _save(self, stream: Stream) -> int:
        length = stream.held
        if not 0 < length <= self.host.capacity:
            return 0
        for dropped in self.host.put(stream.id, length):
            other = self._streams[dropped]
            other.saved = 0
            self.rank(other)
        stream.saved = length
        stream.usage.swapped_tokens += length
        return length

    def _end_branch(self, leaf: Node, stream: Stream) -> None:
        """Frees what only the dead branch needs, or makes it the first to be evicted."""
        if self._invalidation == "soft":
            self.pool.leave(leaf, stream.hold)
        else:
            self.pool.prune(leaf, stream.hold)
