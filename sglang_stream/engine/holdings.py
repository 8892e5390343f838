"""The KV of streams: which prefix each holds, what lies in host memory, who is served first.

    open --hold--> held --preempt--> cached until evicted, or copied to the host --restore--> held

Every change of what a stream holds changes its place in the order, so both are kept here.
"""

from __future__ import annotations

from array import array

from sglang_stream.engine.cache import Hold, Holder
from sglang_stream.engine.host import HostMemory
from sglang_stream.engine.metrics import EngineMetrics
from sglang_stream.engine.stream import Stream
from sglang_stream.policy import POLICIES, Order, Policy, Prefill, Victim
from sglang_stream.policy.types import Invalidation, PolicyName

_UNKNOWN = Prefill(0.0, 1e-4, 0.0)  # until the machine's own is known; orders by tokens


class Holdings:
    """What the streams of one scheduler hold. `order`: all of them, the first served first, but
    for those whose request was admitted. `to_compute`: ids of the open ones that want a pass.
    `held_tokens`: shared prefixes counted for each. `prefill`: the costs by which they are ranked.
    """

    def __init__(
        self,
        cache: Holder,
        metrics: EngineMetrics,
        policy: PolicyName,
        invalidation: Invalidation,
        host: HostMemory,
        page_size: int,
    ) -> None:
        self._cache = cache
        self._metrics = metrics
        self._page = page_size
        self._streams: dict[str, Stream] = {}
        self.configure(policy, invalidation)
        self.host = host
        self.prefill = _UNKNOWN
        self.to_compute: set[str] = set()
        self.held_tokens = 0

    def configure(self, policy: PolicyName, invalidation: Invalidation) -> None:
        """Ranks and invalidates so from now on; only while there are no streams."""
        self.policy: Policy = POLICIES[policy]
        self.order = Order(self.policy)
        self._invalidation: Invalidation = invalidation

    def learn(self, prefill: Prefill) -> None:
        """Takes new costs, by which streams are ranked anew."""
        self.prefill = prefill
        for stream in self._streams.values():
            self.rank(stream)

    def is_ready(self, stream: Stream) -> bool:
        """Whether it has nothing to compute."""
        return max(stream.held, stream.saved) >= stream.cacheable(self._page)

    def rank(self, stream: Stream) -> None:
        """Gives a stream the place that it has now."""
        view = stream.view(self._page, self.prefill)
        self._streams[view.id] = stream
        self.order.put(view)
        if view.missing and not view.full and not view.busy:
            self.to_compute.add(view.id)
        else:
            self.to_compute.discard(view.id)

    def forget(self, stream: Stream) -> None:
        """Lets go of all that it holds, and takes it out of the order."""
        stream_id = stream.session.stream_id
        self._release(stream)
        self.drop_copy(stream)
        self.order.drop(stream_id)
        self.to_compute.discard(stream_id)
        self._streams.pop(stream_id, None)

    def forget_kv(self) -> None:
        """Lets go of everything, before the cache is flushed; open streams are computed anew."""
        for stream in self._streams.values():
            self._release(stream)
            self.drop_copy(stream)
            stream.reach = 0
            self.rank(stream)

    def hold(self, stream: Stream) -> int:
        """Holds all that the tree has of the prompt, also what another stream computed. Returns
        the tokens of it that an update had left behind."""
        self.held_tokens -= stream.held
        stream.hold = self._cache.take(stream.tokens, stream.namespace, stream.hold)
        self.held_tokens += stream.held
        self.rank(stream)
        return stream.hold.found if stream.hold is not None else 0

    def let_go(self, stream: Stream) -> None:
        """Unlocks a stream's KV, which stays cached until it is evicted."""
        self._release(stream)
        self.rank(stream)

    def started(self, stream: Stream) -> None:
        """One of its passes is in the forward now."""
        stream.in_flight = True
        self.rank(stream)

    def computed(self, stream: Stream, ids: array[int], *, fits: int) -> None:
        """The KV of `ids` is in the tree; the first `fits` of them still are the prompt's."""
        done = self._cache.take(ids, stream.namespace)
        if self._streams.get(stream.session.stream_id) is stream:
            self.hold(stream)
        self._cache.release(done)
        if done is not None and fits < len(ids):
            self._end_branch(done, stream)

    def replace(self, stream: Stream, tokens: array[int], lcp: int) -> int:
        """Puts another prompt in that shares `lcp` tokens with the one before. Returns the tokens
        whose KV was given up. What others share stays as it is."""
        old, stream.tokens = stream.hold, tokens
        stream.reach = min(stream.reach, lcp)
        if stream.saved > lcp:
            self._cut_copy(stream, lcp - lcp % self._page)
        self._metrics.found_again.inc(self.hold(stream))
        if old is None or old.length <= lcp:
            return 0
        self._end_branch(old, stream)
        return old.length - lcp

    def preempt(self, victim: Victim) -> int:
        """Unlocks a victim's KV, after copying it to host memory if so planned; what is not evicted
        is found again by its next pass. Returns the tokens that were copied."""
        stream = self._streams[victim.id]
        copied = self._save(stream) if victim.swap else 0
        (self._metrics.swaps if copied else self._metrics.recomputes).inc()
        stream.usage.preemptions += 1
        self._release(stream)
        stream.preempted = True
        self.rank(stream)
        return copied

    def restore(self, stream_id: str) -> int:
        """Brings a stream's KV back from host memory, as far as there is room. Returns the tokens
        that were copied."""
        stream = self._streams[stream_id]
        copy = self.host.get(stream_id)
        if copy is None:
            return 0
        self.held_tokens -= stream.held
        stream.hold, restored = self._cache.bring_back(
            stream.tokens, stream.namespace, copy, stream.hold
        )
        self.held_tokens += stream.held
        if stream.held >= copy.length:
            self.drop_copy(stream)
        self.rank(stream)
        self._metrics.restored.inc(restored)
        return restored

    def drop_copy(self, stream: Stream) -> None:
        """Forgets the copy in host memory, if there is one."""
        self.host.drop(stream.session.stream_id)
        stream.saved = 0

    def _cut_copy(self, stream: Stream, length: int) -> None:
        """Keeps the first `length` tokens of the copy in host memory."""
        if not length:
            self.drop_copy(stream)
            return
        self.host.cut(stream.session.stream_id, length)
        stream.saved = length

    def _release(self, stream: Stream) -> None:
        self.held_tokens -= stream.held
        self._cache.release(stream.hold)
        stream.hold = None

    def _save(self, stream: Stream) -> int:
        copy = self._cache.copy_out(stream.hold) if stream.hold is not None else None
        if copy is None or copy.length > self.host.capacity:
            return 0
        for dropped in self.host.put(stream.session.stream_id, copy):
            other = self._streams[dropped]
            other.saved = 0
            self.rank(other)
        stream.saved = copy.length
        self._metrics.swapped.inc(copy.length)
        return copy.length

    def _end_branch(self, dead: Hold, stream: Stream) -> None:
        """Frees what only the dead branch needs, or makes it the first to be evicted."""
        if self._invalidation == "soft":
            self._cache.leave(dead.node, stream.hold)
        else:
            self._cache.prune(dead.node, stream.hold)
