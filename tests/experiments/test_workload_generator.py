from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.workload.comparison import compare
from experiments.workload.generator import OPENING_TOKENS, QUESTION_TOKENS, Rest, generate
from experiments.workload.published import WORKLOADS, WorkloadKind
from experiments.workload.revisions import Revisions
from experiments.workload.run import as_row
from experiments.workload.shapes import Query

KINDS = list(WORKLOADS)
HASH = """
import hashlib, json, sys
from experiments.workload.generator import generate
from experiments.workload.run import as_row
rows = [as_row(query) for query in generate(sys.argv[1], 300, 7)]
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""


@pytest.mark.parametrize("rest", ["first", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_published_figure_is_met_within_5_percent(kind: WorkloadKind, rest: Rest) -> None:
    rows = compare(kind, generate(kind, 20_000, 1, rest=rest), rest)
    assert {row.quantity for row in rows} == {"tokens", "retrieval s", "chunks", "gap s"}
    assert [row for row in rows if not row.within] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_hundred_queries_are_spread_alike(kind: WorkloadKind) -> None:
    rows = compare(kind, generate(kind, 300, 2), "first")
    central = [row for row in rows if row.figure in ("mean", "median", "P50", "P75")]
    assert all(abs(row.ratio - 1) < 0.1 for row in central), central


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_bytes_in_every_process(kind: WorkloadKind) -> None:
    def other_process(hash_seed: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", HASH, kind],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    rows = [as_row(query) for query in generate(kind, 300, 7)]
    here = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert other_process("1") == other_process("2") == here
    assert [as_row(query) for query in generate(kind, 300, 8)] != rows


def check(query: Query, kind: WorkloadKind) -> None:
    """What holds for every query."""
    published = WORKLOADS[kind]
    times = [step.at_s for step in query.steps]
    assert query.mode == published.mode
    assert published.chunks.least <= len(times) <= published.chunks.most
    assert times[0] >= 0
    assert times == sorted(times)
    known: dict[str, int] = {}
    for step in query.steps:
        assert len({d.id for d in step.documents}) == len(step.documents)
        for document in step.documents:
            assert document.tokens >= 1
            assert known.setdefault(document.id, document.tokens) == document.tokens
    assert (query.opening_tokens, query.question_tokens) == (OPENING_TOKENS, QUESTION_TOKENS)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 40), st.integers(-5, 5))
def test_any_number_of_queries_is_well_formed(kind: WorkloadKind, count: int, seed: int) -> None:
    queries = generate(kind, count, seed)
    assert len({query.query_id for query in queries}) == count
    for query in queries:
        check(query, kind)


def test_queries_share_no_documents() -> None:
    queries = [*generate("anns", 30, 0), *generate("anns", 30, 1), *generate("crawler", 30, 0)]
    names = [{d.id for step in query.steps for d in step.documents} for query in queries]
    assert len(set.union(*names)) == sum(map(len, names))


def test_a_crawl_has_one_new_page_a_chunk() -> None:
    for query in generate("crawler", 50, 0):
        assert all(len(step.documents) == 1 for step in query.steps)
        assert len(query.context(len(query.steps))) == len(query.steps)


def test_what_the_gaps_leave_comes_first_or_last() -> None:
    """It is most of an ANN search's time."""

    def place_of_longest(rest: Rest) -> float:
        queries = [q for q in generate("anns", 500, 0, rest=rest) if len(q.steps) > 2]
        at = 0 if rest == "first" else -1
        longest = 0
        for query in queries:
            times = [0.0, *(step.at_s for step in query.steps)]
            waits = [later - sooner for sooner, later in pairwise(times)]
            longest += waits[at] == max(waits)
        return longest / len(queries)

    assert place_of_longest("first") > 0.9
    assert place_of_longest("last") > 0.9


def test_lists_follow_the_revisions() -> None:
    still = Revisions(documents=6, inserted=1, moved=0, depth=0.99, returned=0, flips=0)
    for query in generate("anns", 100, 0, still):
        for before, after in pairwise(query.steps):
            assert len(after.documents) == 6
            assert len(set(after.documents) - set(before.documents)) == 1
