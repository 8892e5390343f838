"""What is known of a worker from its reports."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from router.load import WorkerLoad
from sglang_stream.messages import PREFIX_BLOCK, Report, Snapshot, prefix_blocks

BLOCKS = [bytes([i]) * 8 for i in range(6)]


def report(seq: int, cached: list[int] | None = None, evicted: list[int] | None = None) -> Report:
    return Report(
        *(seq, 0.0, 100, 10, 5, 1, 2, 3, 50.0),
        b"".join(BLOCKS[i] for i in cached or []),
        b"".join(BLOCKS[i] for i in evicted or []),
    )


def known(load: WorkerLoad) -> set[int]:
    return {i for i, block in enumerate(BLOCKS) if load.shared_tokens([block])}


def test_before_the_first_snapshot_a_snapshot_is_needed() -> None:
    load = WorkerLoad()
    assert load.apply(report(7, [1]), 0.0) is False
    assert load.latest.free_tokens == 100
    assert known(load) == set()


def test_reports_without_gaps() -> None:
    load = WorkerLoad()
    load.restore(Snapshot(3, BLOCKS[0] + BLOCKS[1]))
    assert load.apply(report(4, [2], [0]), 0.0)
    assert load.apply(report(5, [3]), 0.0)
    assert known(load) == {1, 2, 3}


def test_a_report_that_the_snapshot_holds_already() -> None:
    load = WorkerLoad()
    load.restore(Snapshot(3, BLOCKS[0]))
    assert load.apply(report(2, [4]), 0.0)
    assert load.apply(report(3, [5]), 0.0)
    assert load.apply(report(4, [1]), 0.0)
    assert known(load) == {0, 1}


def test_a_gap_asks_for_a_snapshot_until_it_comes() -> None:
    load = WorkerLoad()
    load.restore(Snapshot(1, BLOCKS[0]))
    assert not load.apply(report(3, [1]), 0.0)
    assert not load.apply(report(4, [2]), 0.0)
    assert known(load) == {0}, "what it knew may still draw streams"
    load.restore(Snapshot(4, BLOCKS[5]))
    assert load.apply(report(5, [3]), 0.0)
    assert known(load) == {3, 5}


def test_a_late_report_does_not_take_the_place_of_a_later_one() -> None:
    load = WorkerLoad()
    load.restore(Snapshot(3, b""))
    load.apply(msgspec.structs.replace(report(5), free_tokens=5, busy_s=2.0), 10.0)
    load.apply(msgspec.structs.replace(report(2), free_tokens=2), 11.0)
    assert (load.latest.seq, load.latest.free_tokens, load.busy_until_s) == (5, 5, 12.0)


def test_until_when_silence_means_computing() -> None:
    load = WorkerLoad()
    load.apply(msgspec.structs.replace(report(1), busy_s=2.5), now_s=10.0)
    assert load.busy_until_s == 12.5
    load.apply(report(2), now_s=11.0)
    assert load.busy_until_s == 11.0


def test_a_shared_prefix_ends_at_the_first_block_that_is_missing() -> None:
    prompt = b"".join(i.to_bytes(4, "little") for i in range(3 * PREFIX_BLOCK))
    blocks = prefix_blocks(prompt)
    load = WorkerLoad()
    load.restore(Snapshot(0, blocks[0] + blocks[2]))
    assert load.shared_tokens(blocks) == PREFIX_BLOCK
    assert load.shared_tokens(blocks[:1]) == PREFIX_BLOCK
    assert load.shared_tokens(prefix_blocks(prompt, "another's")) == 0
    assert load.shared_tokens([]) == 0


changes = st.lists(st.tuples(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5))), max_size=12)


@given(changes, st.sets(st.integers(0, 11)), st.integers(0, 12))
def test_after_a_snapshot_all_is_known_whatever_was_lost(
    steps: list[tuple[set[int], set[int]]], lost: set[int], snapshot_after: int
) -> None:
    load, truth = WorkerLoad(), set[int]()
    load.restore(Snapshot(0, b""))
    whole = True
    for seq, (cached, evicted) in enumerate(steps, 1):
        truth = truth - (evicted - cached) | cached
        if seq - 1 in lost:
            whole = False
        else:
            applied = load.apply(report(seq, sorted(cached), sorted(evicted - cached)), 0.0)
            assert applied is whole
        if seq == snapshot_after:
            load.restore(Snapshot(seq, b"".join(BLOCKS[i] for i in truth)))
            whole = True
    if whole:
        assert known(load) == truth
