"""The simulated published set-up, at the rates where little waits: the profile is fitted to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.cells import Cell
from experiments.spec import load_spec
from experiments.stats import percentile
from experiments.workload.arrivals import arrivals_of
from experiments.workload.load import queries_of
from sglang_stream.config import load_profile
from tests.experiments.simulate.loads import simulated

SPEC = Path(__file__).parents[3] / "experiments" / "specs" / "crawler_h200_tp2.toml"


@pytest.mark.parametrize(
    ("cell", "p50_s", "p95_s"),
    [
        (Cell("waiting", None, "stream_aware", 0.5, 0), 0.1164, 0.8366),
        (Cell("streaming", "default", "stream_aware", 0.5, 0), 0.0298, 0.2185),
    ],
    ids=["waiting", "streaming"],
)
def test_the_lowest_rate_of_the_crawler_is_as_published(
    cell: Cell, p50_s: float, p95_s: float
) -> None:
    spec = load_spec(SPEC)
    load = arrivals_of(spec.workload, queries_of(spec.workload), cell.qps, cell.seed)
    rows = simulated(load_profile("h200-tp2"), spec.engine, cell, load)
    ttft = [row.ttft_s for row in rows if row.ttft_s is not None]
    assert len(ttft) == spec.workload.queries
    assert percentile(ttft, 50) == pytest.approx(p50_s, rel=0.25)
    assert percentile(ttft, 95) == pytest.approx(p95_s, rel=0.25)
