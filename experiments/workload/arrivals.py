"""When the queries of a load begin."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from experiments.spec import WorkloadSpec
from experiments.workload.quantiles import Floats
from experiments.workload.shapes import Arrived, Query
from retrieval_clients.traces import read_gaps
from sglang_stream.errors import InvalidRequest


def arrivals_of(
    workload: WorkloadSpec, queries: Sequence[Query], qps: float, seed: int
) -> list[Arrived]:
    """The queries at `qps` a second: after the workload's file of gaps, or else Poisson.

    A file gives the pattern and `qps` the rate: the gaps used are multiplied by one factor, so
    that their mean is 1 / `qps`. Raises InvalidRequest if the file has fewer gaps than there are
    queries.
    """
    if workload.arrivals is None:
        return poisson(queries, qps, seed)
    gaps = read_gaps(workload.arrivals)[: len(queries)]
    if len(gaps) < len(queries):
        raise InvalidRequest(
            f"{workload.arrivals} has {len(gaps)} gaps, one each is needed for {len(queries)} "
            "queries: set workload.queries lower",
            param="workload.arrivals",
        )
    if sum(gaps) == 0:
        raise InvalidRequest(f"{workload.arrivals}: all gaps are 0", param="workload.arrivals")
    return _after(queries, np.array(gaps) * (len(gaps) / sum(gaps) / qps))


def poisson(queries: Sequence[Query], qps: float, seed: int) -> list[Arrived]:
    """The queries at independent times, `qps` a second in the mean. Another rate only stretches
    the same arrivals."""
    digest = hashlib.sha256(f"arrivals/{seed}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return _after(queries, rng.standard_exponential(len(queries)) / qps)


def _after(queries: Sequence[Query], gaps: Floats) -> list[Arrived]:
    return [
        Arrived(round(float(at_s), 6), query)
        for at_s, query in zip(np.cumsum(gaps), queries, strict=True)
    ]
