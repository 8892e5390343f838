from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_stream.errors import (
    SequenceConflict,
    SequenceGap,
    StreamNotFound,
    StreamSealed,
    WrongMode,
)
from sglang_stream.session import Session, Verdict

A, B = b"a" * 16, b"b" * 16


def test_append_numbers_have_no_gaps_and_repeats_are_told_from_conflicts() -> None:
    session = Session("s", "append")
    assert session.check("append", 1, A) is Verdict.APPLY
    session.record(1, A)
    assert session.check("append", 1, A) is Verdict.REPEAT
    with pytest.raises(SequenceConflict) as conflict:
        session.check("append", 1, B)
    assert conflict.value.expected_seq == 2
    with pytest.raises(SequenceGap) as gap:
        session.check("append", 3, B)
    assert gap.value.expected_seq == 2
    assert session.seq == 1


def test_update_the_highest_number_wins_and_gaps_are_allowed() -> None:
    session = Session("s", "update")
    assert session.check("update", 5, A) is Verdict.APPLY
    session.record(5, A)
    assert session.check("update", 3, B) is Verdict.SUPERSEDED
    assert session.check("update", 5, A) is Verdict.REPEAT
    with pytest.raises(SequenceConflict):
        session.check("update", 5, B)
    assert session.check("update", 6, B) is Verdict.APPLY


@pytest.mark.parametrize(("mode", "event"), [("append", "update"), ("update", "append")])
def test_the_other_mode_is_refused(mode: str, event: str) -> None:
    with pytest.raises(WrongMode):
        Session("s", mode).check(event, 1, A)  # type: ignore[arg-type]


def test_the_seal_wants_exactly_the_last_number() -> None:
    session = Session("s", "append")
    session.record(1, A)
    session.record(2, B)
    with pytest.raises(SequenceGap) as gap:
        session.check_seal(3)
    assert gap.value.expected_seq == 3
    with pytest.raises(SequenceConflict):
        session.check_seal(1)
    assert session.state == "open"
    session.check_seal(2)
    session.check_seal(None)
    session.seal()
    assert session.state == "sealed"


def test_after_the_seal_nothing_is_added_but_repeats_are_still_recognised() -> None:
    session = Session("s", "append")
    session.record(1, A)
    session.seal()
    assert session.check("append", 1, A) is Verdict.REPEAT
    with pytest.raises(StreamSealed):
        session.check("append", 2, B)
    with pytest.raises(StreamSealed):
        session.check_seal(1)
    session.finish()
    assert session.state == "finished"
    with pytest.raises(StreamSealed):
        session.abort()


def test_an_aborted_stream_is_gone() -> None:
    session = Session("s", "append")
    session.abort()
    with pytest.raises(StreamNotFound):
        session.check("append", 1, A)
    with pytest.raises(StreamNotFound):
        session.seal()


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([A, B])), max_size=20))
def test_an_append_stream_applies_each_number_once_and_in_order(
    calls: list[tuple[int, bytes]],
) -> None:
    session = Session("s", "append")
    applied: list[int] = []
    expected: set[int] = set()
    for seq, digest in calls:
        try:
            if session.check("append", seq, digest) is Verdict.APPLY:
                session.record(seq, digest)
                applied.append(seq)
            expected.add(len(applied) + 1)
        except (SequenceGap, SequenceConflict) as e:
            expected.add(e.expected_seq or 0)
    assert applied == list(range(1, len(applied) + 1))
    assert expected <= set(range(1, len(applied) + 2))
    assert session.seq == len(applied)
