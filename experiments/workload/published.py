"""What the paper says of its two workloads: tokens, retrieval times, chunks and gaps of a query.

Source: Stream2LLM (arXiv 2604.16395), the tables of its public artifact. Times are seconds here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sglang_stream.messages import Mode

WorkloadKind = Literal["crawler", "anns"]


@dataclass(frozen=True)
class Spread:
    """A distribution as published: its mean, and (percent, value) pairs from the lowest up."""

    mean: float
    percentiles: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Counts:
    """A distribution of whole numbers as published."""

    mean: float
    median: int
    least: int
    most: int


@dataclass(frozen=True)
class PublishedWorkload:
    """One row of the published table. `retrieval_s`: from the beginning of a query to its last
    chunk; `gap_s`: between two chunks of a query."""

    mode: Mode
    queries: int
    tokens: Spread
    retrieval_s: Spread
    chunks: Counts
    gap_s: Spread


WORKLOADS: dict[WorkloadKind, PublishedWorkload] = {
    "crawler": PublishedWorkload(
        mode="append",
        queries=4309,
        tokens=Spread(8889, ((50, 5749), (75, 11167), (95, 28372))),
        retrieval_s=Spread(9.219, ((50, 8.670), (75, 11.059), (95, 16.402))),
        chunks=Counts(7.86, median=8, least=1, most=17),
        gap_s=Spread(1.053, ((25, 0.387), (50, 0.701), (75, 1.340), (95, 3.078), (99, 5.293))),
    ),
    "anns": PublishedWorkload(
        mode="update",
        queries=4997,
        tokens=Spread(13006, ((50, 10126), (75, 14615), (95, 30618))),
        retrieval_s=Spread(4.471, ((50, 3.896), (75, 5.327), (95, 8.512))),
        chunks=Counts(4.42, median=4, least=1, most=26),
        gap_s=Spread(0.157, ((25, 0.011), (50, 0.037), (75, 0.124), (95, 0.699), (99, 2.079))),
    ),
}
