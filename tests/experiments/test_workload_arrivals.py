from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import pytest

from experiments.spec import WorkloadSpec
from experiments.workload.arrivals import arrivals_of, poisson
from experiments.workload.generator import generate
from experiments.workload.shapes import Arrived
from sglang_stream.errors import InvalidRequest

QUERIES = generate("crawler", 10, 0)


def gaps_of(arrived: list[Arrived]) -> list[float]:
    return [b - a for a, b in pairwise([0.0, *(at_s for at_s, _ in arrived)])]


def test_poisson_arrivals_are_exponential_and_as_many_as_asked_for() -> None:
    gaps = gaps_of(poisson(QUERIES * 500, 4.0, seed=1))
    assert mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert median(gaps) == pytest.approx(0.25 * 0.693, rel=0.06)


def test_a_seed_gives_the_same_arrivals_and_a_rate_stretches_them() -> None:
    slow = poisson(QUERIES, 1.0, seed=1)
    assert slow == poisson(QUERIES, 1.0, seed=1)
    assert slow != poisson(QUERIES, 1.0, seed=2)
    assert [query for _, query in slow] == QUERIES
    fast = poisson(QUERIES, 2.0, seed=1)
    assert [at_s * 2 for at_s, _ in fast] == pytest.approx([at_s for at_s, _ in slow], abs=1e-5)


def test_a_file_gives_the_pattern_and_the_rate_its_scale(tmp_path: Path) -> None:
    path = tmp_path / "gaps.txt"
    path.write_text("1\n0\n5\n100\n")
    spec = WorkloadSpec("crawler", 3, arrivals=path)
    # Three gaps of 2 s in the mean, at one query in 4 s.
    arrived = arrivals_of(spec, QUERIES[:3], 0.25, seed=0)
    assert gaps_of(arrived) == pytest.approx([2, 0, 10])
    assert arrivals_of(spec, QUERIES[:3], 0.25, seed=9) == arrived


@pytest.mark.parametrize(
    ("text", "reason"), [("1\n2\n", "has 2 gaps, one each is needed for 3"), ("0\n" * 3, "are 0")]
)
def test_gaps_that_are_no_arrivals_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "gaps.txt"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=reason):
        arrivals_of(WorkloadSpec("crawler", 3, arrivals=path), QUERIES[:3], 1.0, seed=0)


def test_without_a_file_arrivals_are_poisson() -> None:
    spec = WorkloadSpec("crawler", 10)
    assert arrivals_of(spec, QUERIES, 2.0, 3) == poisson(QUERIES, 2.0, 3)
