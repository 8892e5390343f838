"""The stream table on SGLang's own radix tree and allocator, without a model.

A made-up KV content (the token itself at each slot) shows whether a held prefix really is the
prefix of the stream's tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_stream import messages as m
from sglang_stream.engine.cache import StreamRadixCache
from sglang_stream.engine.cpu.allocator import CpuPagedAllocator
from sglang_stream.engine.host import HostMemory
from sglang_stream.engine.metrics import silent_metrics
from sglang_stream.engine.stream import Stream
from sglang_stream.engine.table import Limits, StreamTable
from sglang_stream.engine.tokens import common_prefix, unpack_tokens
from sglang_stream.errors import (
    LimitReached,
    Malformed,
    PromptTooLong,
    SequenceConflict,
    SequenceGap,
    StreamNotFound,
    StreamSealed,
)
from sglang_stream.policy import Invalidation, Victim

POOL = 4096


class Pool:
    """A KV pool of one layer whose K and V of a slot are the token in it."""

    def __init__(self, content: torch.Tensor) -> None:
        self.k_buffer = [content]
        self.v_buffer = [content.clone()]


class Rig:
    """A table with its tree; `compute` does what a pass and SGLang's release do."""

    def __init__(
        self,
        page_size: int = 1,
        streams: int = 100,
        invalidation: Invalidation = "hard",
        host_tokens: int = 0,
    ) -> None:
        self.content = torch.full((POOL + page_size + 1,), -1, dtype=torch.int64)
        pool = Pool(self.content)
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(POOL, torch.float32, "cpu", pool, False)
        else:
            self.allocator = CpuPagedAllocator(POOL, page_size, torch.float32, "cpu", pool, False)
        self.cache = StreamRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,  # type: ignore[arg-type]
                token_to_kv_pool_allocator=self.allocator,
                page_size=page_size,
            )
        )
        self.page_size = page_size
        limits = Limits(prompt_tokens=2000, vocab_size=1000, streams=streams)
        self.table = StreamTable(
            self.cache,
            limits,
            silent_metrics(),
            invalidation=invalidation,
            host=HostMemory(host_tokens),
            page_size=page_size,
        )

    def open(self, name: str, mode: m.Mode, opening: Sequence[int] = ()) -> Stream:
        self.table.open(m.Open(name, mode, m.pack_tokens(opening), 10.0), 0.0)
        return self.table.live[name]

    def append(
        self, name: str, seq: int, tokens: Sequence[int], now: float = 0.0, last: bool = False
    ) -> m.Accepted:
        raw = m.pack_tokens(tokens)
        return self.table.append(m.Append(name, seq, raw, m.digest(raw), last=last), now)

    def update(self, name: str, seq: int, tokens: Sequence[int], last: bool = False) -> m.Accepted:
        raw = m.pack_tokens(tokens)
        return self.table.update(m.Update(name, seq, raw, m.digest(raw), last=last), 0.0)

    def start(self, stream: Stream, tokens: int) -> tuple[Stream, array[int], int, object]:
        """Begins a pass: matches and locks its prefix, as SGLang's adder does."""
        ids = stream.tokens[: stream.held + tokens]
        ids = ids[: len(ids) - len(ids) % self.page_size]
        match = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(ids)))
        self.cache.inc_lock_ref(match.last_device_node)
        self.table.kv.started(stream)
        return stream, ids, len(match.device_indices), match

    def end(self, started: tuple[Stream, array[int], int, object]) -> None:
        stream, ids, prefix, match = started
        slots = self.allocator.alloc(len(ids) - prefix)
        assert slots is not None
        values = torch.cat([match.device_indices, slots])  # type: ignore[attr-defined]
        self.content[slots] = torch.tensor(ids[prefix:], dtype=torch.int64)
        known = self.cache.insert(InsertParams(key=RadixKey(ids), value=values)).prefix_len
        self.allocator.free_segment(values[prefix:known], start_pos=prefix)
        self.cache.dec_lock_ref(match.last_device_node)  # type: ignore[attr-defined]
        self.table.pass_done(stream, ids, prefix)

    def compute(self, stream: Stream, tokens: int = POOL) -> None:
        self.end(self.start(stream, tokens))

    def check(self) -> None:
        """Nothing leaks, and every hold is a prefix of its stream's tokens."""
        cache, allocator = self.cache, self.allocator
        total = allocator.available_size() + cache.evictable_size() + cache.protected_size()
        assert total == POOL
        assert self.table.kv.held_tokens == sum(s.held for s in self.table.live.values())
        for stream in self.table.live.values():
            match = cache.match_prefix(MatchPrefixParams(key=RadixKey(stream.tokens)))
            held = self.content[match.device_indices[: stream.held]].tolist()
            assert held == list(stream.tokens[: stream.held])
            copy = self.table.kv.host.get(stream.session.stream_id)
            assert stream.saved == (copy.length if copy is not None else 0)
            assert stream.saved <= len(stream.tokens)
        assert self.table.kv.host.tokens <= self.table.kv.host.capacity
        views = {
            s.session.stream_id: s.view(self.page_size, self.table.kv.prefill)
            for s in self.table.live.values()
        }
        assert {v.id: v for v in self.table.kv.order.views} == views

    def preempt(self, name: str, *, swap: bool = False) -> None:
        self.table.kv.preempt(Victim(name, swap))


def test_a_pass_is_held_and_an_update_frees_what_lies_beyond_the_prefix() -> None:
    rig = Rig()
    stream = rig.open("a", "update", [1, 2, 3])
    assert rig.update("a", 1, range(10, 60)).lcp == 3
    rig.compute(stream)
    assert stream.held == 53
    free = rig.allocator.available_size()
    answer = rig.update("a", 2, [*range(10, 30), *range(100, 140)])
    assert (answer.lcp, answer.tokens) == (23, 63)
    assert stream.held == 23
    assert rig.allocator.available_size() == free + 30
    assert stream.usage.invalidated_tokens == 30
    assert stream.usage.lcp_tokens == 26
    rig.check()


def test_an_update_keeps_a_branch_that_another_stream_holds() -> None:
    rig = Rig()
    first, second = rig.open("a", "update"), rig.open("b", "update")
    rig.update("a", 1, range(50))
    rig.compute(first)
    rig.update("b", 1, range(50))
    assert second.held == 50, "what the tree has already is held without a pass"
    rig.update("a", 2, [*range(20), 999])
    assert (first.held, second.held) == (20, 50)
    rig.update("a", 3, range(50))
    assert first.held == 50, "the flip back finds the other stream's KV"
    rig.check()


def test_an_update_during_a_pass_keeps_only_what_still_fits() -> None:
    rig = Rig()
    stream = rig.open("a", "update")
    rig.update("a", 1, range(100))
    started = rig.start(stream, 100)
    rig.update("a", 2, [*range(40), *range(500, 560)])
    rig.update("a", 3, [*range(30), *range(600, 640)])
    rig.end(started)
    assert stream.held == 30
    assert stream.usage.invalidated_tokens == 70
    assert stream.usage.computed_tokens == 100
    assert rig.cache.evictable_size() == 0
    rig.check()


def test_an_abort_during_a_pass_leaves_nothing_locked() -> None:
    rig = Rig()
    stream = rig.open("a", "append")
    rig.append("a", 1, range(100))
    started = rig.start(stream, 60)
    rig.table.drop(stream)
    rig.end(started)
    assert rig.cache.protected_size() == 0
    rig.check()


def test_a_generation_that_ends_during_the_last_pass_leaves_nothing_locked() -> None:
    rig = Rig()
    stream = rig.open("a", "append")
    rig.append("a", 1, range(100))
    started = rig.start(stream, 100)
    rig.table.seal(stream, "rid")
    rig.table.finish(stream)
    rig.end(started)
    assert rig.cache.protected_size() == 0
    assert (rig.table.open_count, rig.table.kv.held_tokens) == (0, 0)
    rig.check()


def test_a_preempted_stream_finds_again_what_was_not_evicted() -> None:
    rig = Rig()
    stream = rig.open("a", "append")
    for seq, start in ((1, 0), (2, 100)):
        rig.append("a", seq, range(start, start + 100))
        rig.compute(stream)
    rig.preempt("a")
    assert rig.cache.protected_size() == 0
    rig.cache.evict(EvictParams(num_tokens=50))
    rig.table.kv.hold(stream)
    assert stream.held == 100
    rig.check()


def test_a_dead_branch_is_found_again_unless_it_was_evicted_and_goes_first() -> None:
    rig = Rig(invalidation="soft")
    other, stream = rig.open("other", "append"), rig.open("a", "update")
    rig.append("other", 1, range(700, 750))
    rig.compute(other)
    rig.update("a", 1, range(100))
    rig.compute(stream)
    rig.preempt("other")  # what is evicted in the end, older than the dead branch
    rig.update("a", 2, [*range(40), *range(500, 520)])
    rig.compute(stream)
    assert stream.held == 60
    rig.cache.evict(EvictParams(num_tokens=20))
    rig.update("a", 3, range(100))
    assert stream.held == 40, "the whole branch was one node, evicted before what is older"
    assert rig.table.kv.hold(other) == 0
    assert other.held == 50
    rig.compute(stream)
    rig.update("a", 4, range(30))
    rig.update("a", 5, range(100))
    assert stream.held == 100
    assert stream.usage.computed_tokens == 100 + 20 + 60
    rig.check()


def test_what_was_found_again_is_no_longer_the_first_to_go() -> None:
    rig = Rig(invalidation="soft")
    stream = rig.open("a", "update")
    rig.update("a", 1, range(100))
    rig.compute(stream)
    rig.update("a", 2, range(40))
    rig.update("a", 3, range(100))
    assert stream.hold is not None
    assert stream.hold.found == 60
    late = rig.open("late", "append")
    rig.append("late", 1, range(300, 400))
    rig.compute(late)
    rig.preempt("a")
    rig.preempt("late")
    rig.cache.evict(EvictParams(num_tokens=60))
    assert [rig.table.kv.hold(s) for s in (stream, late)] == [0, 0]
    assert (stream.held, late.held) == (40, 100), "the least recently used goes"
    rig.check()


@pytest.mark.parametrize("evicted", [0, 50, 120])
def test_a_swapped_stream_comes_back_as_it_was(evicted: int) -> None:
    rig = Rig(host_tokens=500)
    stream = rig.open("a", "append")
    for seq, start in ((1, 0), (2, 70)):
        rig.append("a", seq, range(start, start + 70))
        rig.compute(stream)
    rig.preempt("a", swap=True)
    assert (stream.held, stream.saved) == (0, 140)
    rig.cache.evict(EvictParams(num_tokens=evicted))
    rig.append("a", 3, range(140, 150))
    rig.check()
    rig.table.kv.restore(stream.session.stream_id)
    assert (stream.held, stream.saved) == (140, 0)
    rig.check()


def test_the_oldest_copy_gives_way_and_an_update_shortens_the_copy() -> None:
    rig = Rig(host_tokens=250)
    for name in ("a", "b", "c"):
        stream = rig.open(name, "update")
        rig.update(name, 1, range(ord(name), ord(name) + 100))
        rig.compute(stream)
        rig.preempt(name, swap=True)
    assert [rig.table.live[n].saved for n in "abc"] == [0, 100, 100]
    rig.cache.evict(EvictParams(num_tokens=POOL))
    rig.update("b", 2, range(ord("b"), ord("b") + 60))
    assert rig.table.live["b"].saved == 60
    rig.check()
    assert rig.table.kv.restore("b") == 60
    assert rig.table.live["b"].held == 60
    assert rig.table.kv.host.tokens == 100
    rig.check()
    rig.update("c", 2, range(ord("c"), ord("c") + 120))
    assert rig.table.live["c"].saved == 100
    rig.update("c", 3, range(500, 600))
    assert rig.table.live["c"].saved == 0
    assert rig.table.kv.host.tokens == 0
    rig.check()


def test_without_room_a_copy_stays_in_host_memory() -> None:
    rig = Rig(host_tokens=500)
    stream = rig.open("a", "append")
    rig.append("a", 1, range(100))
    rig.compute(stream)
    rig.preempt("a", swap=True)
    rig.cache.evict(EvictParams(num_tokens=POOL))
    rest = rig.allocator.alloc(POOL - 60)
    assert rig.table.kv.restore(stream.session.stream_id) == 0
    assert (stream.held, stream.saved) == (0, 100)
    rig.allocator.free(rest)
    assert rig.table.kv.restore(stream.session.stream_id) == 100
    rig.check()


def test_what_is_computed_again_is_counted() -> None:
    rig = Rig()
    stream = rig.open("a", "append")
    rig.append("a", 1, range(100))
    rig.compute(stream)
    rig.preempt("a")
    rig.cache.evict(EvictParams(num_tokens=POOL))
    rig.append("a", 2, range(100, 130))
    rig.compute(stream)
    assert stream.usage.recomputed_tokens == 100
    assert stream.usage.preemptions == 1


def test_the_next_seal_that_is_predicted() -> None:
    rig = Rig()
    for name, length in (("a", 3), ("b", 1)):
        stream = rig.open(name, "append")
        for seq in range(1, length + 1):
            rig.append(name, seq, [1], now=2.0 * seq)
        rig.table.seal(stream, "rid")
        rig.table.finish(stream)
    rig.open("c", "append")
    rig.append("c", 1, [1], now=10.0)
    rig.table.now = 10.0
    due = rig.table.next_due_s()
    assert due is not None
    assert 10.0 < due < 14.0
    rig.table.now = due + 0.1
    assert rig.table.next_due_s() is None, "it did not come true"


@pytest.mark.parametrize("mode", ["append", "update"])
def test_a_stream_whose_seal_is_on_the_way_waits_for_it(mode: m.Mode) -> None:
    rig = Rig()
    stream = rig.open("a", mode)
    send = rig.append if mode == "append" else rig.update
    send("a", 1, [1, 2, 3])
    assert rig.table.kv.to_compute == {"a"}
    send("a", 2, [1, 2, 3, 4], last=True)
    assert rig.table.kv.to_compute == set()
    rig.table.tick(0.1)
    assert rig.table.kv.to_compute == set()
    rig.table.seal(stream, "rid")
    view = rig.table.kv.order.views[0]
    assert view.full
    assert not view.busy


def test_a_stream_whose_seal_does_not_come_is_computed() -> None:
    rig = Rig()
    rig.open("a", "append")
    rig.append("a", 1, [1, 2, 3], last=True)
    rig.table.tick(1.0)
    assert rig.table.kv.to_compute == {"a"}
    rig.append("a", 2, [4], now=1.0, last=True)
    rig.append("a", 3, [5], now=1.0)
    assert rig.table.kv.to_compute == {"a"}, "there was more after what was to be the last"


def test_a_stream_that_has_gone_is_not_awaited() -> None:
    rig = Rig()
    stream = rig.open("a", "append")
    rig.append("a", 1, [1, 2, 3], last=True)
    rig.table.drop(stream)
    rig.table.tick(1.0)
    assert rig.table.kv.to_compute == set()


def test_a_refused_event_changes_nothing() -> None:
    rig = Rig(streams=1)
    stream = rig.open("a", "append", [1])
    rig.append("a", 1, [2, 3])
    before = rig.table.status("a")
    with pytest.raises(SequenceGap):
        rig.append("a", 3, [4])
    with pytest.raises(SequenceConflict):
        rig.append("a", 1, [9])
    with pytest.raises(Malformed):
        rig.append("a", 2, [1000])
    with pytest.raises(Malformed):
        rig.table.append(m.Append("a", 2, b"\1\2\3", b""), 0.0)
    with pytest.raises(PromptTooLong):
        rig.append("a", 2, [5] * 2000)
    with pytest.raises(LimitReached):
        rig.open("b", "append")
    with pytest.raises(SequenceConflict):
        rig.open("a", "append", [7])
    assert rig.table.status("a") == before
    assert stream.tokens.tolist() == [1, 2, 3]


def test_repeats_are_answered_without_effect() -> None:
    rig = Rig()
    stream = rig.open("a", "append", [1])
    assert rig.open("a", "append", [1]) is stream
    assert rig.append("a", 1, [2]) == rig.append("a", 1, [2]) == m.Accepted(1, 2)
    assert stream.usage.chunks == 1


def test_idle_streams_expire_and_finished_ones_are_remembered() -> None:
    rig = Rig()
    stream = rig.open("a", "append")
    rig.append("a", 1, [1], now=5.0)
    assert rig.table.expired(15.0) == []
    assert rig.table.expired(15.1) == ["a"]
    rig.table.seal(stream, "rid")
    assert rig.table.expired(99.0) == []
    stream.owner = b"owner"
    rig.table.finish(stream)
    assert rig.table.status("a").state == "finished"
    assert (rig.table.owner("a"), rig.table.owner("b")) == (b"owner", None)
    with pytest.raises(StreamSealed):
        rig.append("a", 2, [1])
    with pytest.raises(StreamNotFound):
        rig.table.status("b")


steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["update", "append", "start", "end", "preempt", "swap", "restore", "evict", "drop"]
        ),
        st.integers(0, 3),
        st.lists(st.integers(0, 4), max_size=8),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=150)
@given(steps, st.sampled_from([1, 4]), st.sampled_from(["soft", "hard"]))
def test_any_sequence_of_events_keeps_tree_and_pool_consistent(
    drawn: list[tuple[str, int, list[int]]], page_size: int, invalidation: Invalidation
) -> None:
    """Chunks are drawn from five blocks of tokens, so that streams share many prefixes."""
    rig = Rig(page_size, invalidation=invalidation, host_tokens=120)
    seqs: dict[int, int] = {}
    flights: dict[int, tuple[Stream, array[int], int, object]] = {}
    for action, i, blocks in drawn:
        mode: m.Mode = "update" if i % 2 else "append"
        name = f"s{i}"
        if name not in rig.table.live:
            rig.open(name, mode, [7] * i)
            seqs[i] = 0
        stream = rig.table.live[name]
        tokens = [b * 50 + k for b in blocks for k in range(10)]
        match action:
            case "update" | "append":
                seqs[i] += 1
                (rig.update if mode == "update" else rig.append)(name, seqs[i], tokens)
            case "start" if not stream.in_flight and len(stream.tokens) - stream.held > page_size:
                flights[i] = rig.start(stream, 5 + 10 * len(blocks))
            case "end" if i in flights:
                rig.end(flights.pop(i))
            case "preempt" | "swap" if not stream.in_flight:
                rig.preempt(name, swap=action == "swap")
            case "restore":
                rig.table.kv.restore(stream.session.stream_id)
            case "evict":
                rig.cache.evict(EvictParams(num_tokens=40))
            case "drop":
                rig.table.drop(stream)
                if i in flights:
                    rig.end(flights.pop(i))
        rig.check()
    for started in flights.values():
        rig.end(started)
    for stream in list(rig.table.live.values()):
        rig.table.drop(stream)
    assert rig.cache.protected_size() == 0
    rig.check()


@given(st.lists(st.integers(0, 2), max_size=50), st.lists(st.integers(0, 2), max_size=50))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix(array("q", a), array("q", b)) == expected


def test_common_prefix_across_blocks() -> None:
    a = array("q", range(100_000))
    b = a[:]
    b[70_000] = -1
    assert common_prefix(a, b) == 70_000
    assert common_prefix(a, a[:99_999]) == 99_999


def test_token_ids_are_checked_against_the_vocabulary() -> None:
    assert unpack_tokens(m.pack_tokens([0, 9]), 10).tolist() == [0, 9]
    for bad in (-1, 10):
        with pytest.raises(Malformed, match=str(bad)):
            unpack_tokens(m.pack_tokens([bad]), 10)
