"""Queries beside the published figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from experiments.stats import verdict
from experiments.workload.generator import Rest
from experiments.workload.published import WORKLOADS, Counts, Spread, WorkloadKind
from experiments.workload.quantiles import Floats
from experiments.workload.shapes import Query

TOLERANCE = 0.05


class Compared(NamedTuple):
    """One published figure and that of our queries. Times are seconds."""

    quantity: str
    figure: str
    published: float
    ours: float

    @property
    def ratio(self) -> float:
        return self.ours / self.published

    @property
    def within(self) -> bool:
        """Whether it is as near as the generator's should be."""
        return abs(self.ours - self.published) <= TOLERANCE * self.published


def compare(kind: WorkloadKind, queries: Sequence[Query], rest: Rest) -> list[Compared]:
    """All published figures of a workload; `rest` as for `generate`."""
    published = WORKLOADS[kind]
    waits = [np.diff([step.at_s for step in query.steps], prepend=0.0) for query in queries]
    gaps = np.concatenate([w[1:] if rest == "first" else w[:-1] for w in waits])
    return [
        *_spread("tokens", published.tokens, np.array([q.prompt_tokens for q in queries])),
        *_spread("retrieval s", published.retrieval_s, np.array([q.last_chunk_s for q in queries])),
        *_counts("chunks", published.chunks, np.array([len(q.steps) for q in queries])),
        *_spread("gap s", published.gap_s, gaps),
    ]


def table(kind: WorkloadKind, rows: Sequence[Compared], queries: int) -> Table:
    """The figures side by side."""
    shown = Table("", "figure", title=f"{kind}: {queries:,} queries", title_justify="left")
    for column in ("published", "ours", "ratio", f"within {TOLERANCE:.0%}"):
        shown.add_column(column, justify="right")
    before = ""
    for row in rows:
        quantity = row.quantity if row.quantity != before else ""
        before = row.quantity
        figures = (f"{row.published:,.5g}", f"{row.ours:,.5g}", f"{row.ratio:.3f}")
        shown.add_row(quantity, row.figure, *figures, verdict(row.within))
    return shown


def _spread(quantity: str, published: Spread, ours: Floats) -> list[Compared]:
    rows = [Compared(quantity, "mean", published.mean, float(ours.mean()))]
    for percent, value in published.percentiles:
        rows.append(Compared(quantity, f"P{percent:g}", value, float(np.percentile(ours, percent))))
    return rows


def _counts(quantity: str, published: Counts, ours: Floats) -> list[Compared]:
    figures = (
        ("mean", published.mean, ours.mean()),
        ("median", published.median, np.median(ours)),
        ("min", published.least, ours.min()),
        ("max", published.most, ours.max()),
    )
    return [Compared(quantity, name, was, float(value)) for name, was, value in figures]
