from __future__ import annotations

from dataclasses import astuple, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.workload.revisions import MEASURED, Revisions, measure_revisions, revise
from retrieval_clients.traces import Trace, TraceDocument, TraceStep

some_revisions = st.builds(
    Revisions,
    documents=st.integers(2, 12),
    inserted=st.floats(0.05, 3),
    moved=st.floats(0, 2),
    depth=st.floats(0, 1),
    returned=st.floats(0, 1),
    flips=st.floats(0, 0.9),
)


def trace(*lists: str | list[int]) -> Trace:
    """An update trace of these lists; a document is a letter or a number."""
    steps = (
        TraceStep(float(at), tuple(TraceDocument(str(d), f"text {d}") for d in shown))
        for at, shown in enumerate(lists)
    )
    return Trace("q", "Why?", "update", tuple(steps))


@settings(max_examples=60, deadline=None)
@given(some_revisions, st.integers(1, 12), st.integers(0, 99))
def test_every_list_is_another_full_one(revisions: Revisions, count: int, seed: int) -> None:
    lists = revise(revisions, count, np.random.default_rng(seed))
    assert len(lists) == count
    for before, after in pairwise(lists):
        assert before != after
    for shown in lists:
        assert len(set(shown)) == len(shown) == revisions.documents
    seen = sorted({d for shown in lists for d in shown})
    assert seen == list(range(len(seen)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("documents", 0), ("inserted", 0.0), ("moved", -1.0), ("depth", 1.1), ("flips", -0.1)],
)
def test_what_cannot_be_generated_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(MEASURED, **{field: value})


def test_a_measurement_by_hand() -> None:
    measured = measure_revisions(
        [
            trace("abcd", "axbc", "axbc", "abcd", "abdc"),  # x in at 1, back, d before c
            trace("abcd"),
            trace("abcd", "abce", "abcd", "abed"),  # e in at 3, back, e again at 2
        ]
    )
    assert measured.documents == 4
    # Updates without the two that flip back: x; d or c moved; e; e again.
    assert measured.inserted == pytest.approx(3 / 4)
    assert measured.moved == pytest.approx(1 / 4)
    assert measured.returned == 1  # x and e come first when none has gone
    assert measured.flips == pytest.approx(2 / 4)
    assert 0.5 < measured.depth < 0.9


def test_a_document_that_moves_far_is_one_move() -> None:
    measured = measure_revisions([trace("abcdef", "fabcde")])
    assert (measured.moved, measured.inserted, measured.depth) == (1, 0, 0)


@pytest.mark.parametrize("traces", [[], [trace("abc")], [trace("abc", "abc")]])
def test_without_a_change_there_is_nothing_to_measure(traces: list[Trace]) -> None:
    with pytest.raises(ValueError, match="no list"):
        measure_revisions(traces)


@pytest.mark.parametrize(
    "revisions",
    [
        MEASURED,
        Revisions(documents=20, inserted=2, moved=0.5, depth=0.7, returned=0.3, flips=0.2),
    ],
)
def test_what_is_generated_is_measured_again(revisions: Revisions) -> None:
    rng = np.random.default_rng(0)
    measured = measure_revisions(trace(*revise(revisions, 8, rng)) for _ in range(1500))
    # Less where one edit undoes another: what has come in or moved is pushed out by the next.
    assert astuple(measured) == pytest.approx(astuple(revisions), rel=0.3, abs=0.03)
