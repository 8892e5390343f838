"""The tables of a progressive search: what streaming made of it, and how its lists changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean

from rich.table import Table

from experiments.progressive.measure import ORDERS, Measured
from experiments.stats import percentile
from experiments.workload.revisions import Revisions
from retrieval_clients.traces import Trace

Line = tuple[str, Callable[[Sequence[Measured]], str]]

_LINES: tuple[Line, ...] = (
    ("lists a question", lambda rows: _mean([r.lists for r in rows])),
    ("lists that reached the engine", lambda rows: _mean([r.updates for r in rows])),
    ("tokens of the prompt", lambda rows: _mean([r.prompt_tokens for r in rows])),
    ("lcp_tokens a question", lambda rows: _mean([r.lcp_tokens for r in rows])),
    ("invalidated_tokens a question", lambda rows: _mean([r.invalidated_tokens for r in rows])),
    ("computed_tokens a question", lambda rows: _mean([r.computed_tokens for r in rows])),
    ("ready_tokens at the seal", lambda rows: _mean([r.ready_tokens for r in rows])),
    ("TTFT waiting, P50 (P95)", lambda rows: _times([r.waiting_ttft_s for r in rows])),
    ("TTFT streaming, P50 (P95)", lambda rows: _times([r.streaming_ttft_s for r in rows])),
    ("documents out of the retriever's order", lambda rows: _share([r.out_of_order for r in rows])),
    ("same tokens as a cold plain request", lambda rows: _same(rows)),
)


def streaming_table(rows: Sequence[Measured], searched: str, step_ms: float) -> Table:
    """One column an order. `searched`: index, passages and k, in words."""
    groups = {order: [r for r in rows if r.order == order] for order in ORDERS}
    questions = len({r.question for r in rows})
    table = Table(title=f"{questions} questions to {searched}; step-ms {step_ms:g}")
    table.add_column("")
    for order in groups:
        table.add_column(order, justify="right")
    for name, cell in _LINES:
        table.add_row(name, *(cell(group) for group in groups.values()))
    table.caption = (
        f"{_pace(step_ms)} TTFT counts from the search's end, which is known only after the last "
        "list has stood for some steps."
    )
    return table


def search_table(
    traces: Sequence[Trace],
    recalls: Sequence[tuple[float, float]],
    steps: Sequence[int],
    revisions: Revisions,
    searched: str,
    step_ms: float,
) -> Table:
    """How the lists changed. Of each search, `recalls`: of the first and of the last list;
    `steps`: until its end."""
    lists = [len(trace.steps) for trace in traces]
    gaps = [1000 * (b.at_s - a.at_s) for trace in traces for a, b in pairwise(trace.steps)]
    ends = [1000 * trace.steps[-1].at_s for trace in traces]
    table = Table(title=f"{len(traces)} searches of {searched}; step-ms {step_ms:g}")
    table.add_column("")
    table.add_column("", justify="right")
    lines = (
        ("lists a search: mean, P50, P95, most", f"{_mean(lists)}, {_spread(lists)}"),
        ("steps a search: mean, P50, P95, most", f"{_mean(steps)}, {_spread(steps)}"),
        ("ms to the last list: P50, P95, most", _spread(ends)),
        ("ms between two lists: P50, P95, most", _spread(gaps)),
        ("recall of the first list, of the last", _recalls(recalls)),
        ("documents of a list", f"{revisions.documents}"),
        ("updates that flip back to the list before", f"{revisions.flips:.1%}"),
        ("in each other update: documents that come in", f"{revisions.inserted:.2f}"),
        ("of these, seen in an earlier list", f"{revisions.returned:.1%}"),
        ("documents that change places", f"{revisions.moved:.2f}"),
        ("mean place of both (0 the top, 1 the end)", f"{revisions.depth:.2f}"),
    )
    for line in lines:
        table.add_row(*line)
    table.caption = _pace(step_ms)
    return table


def _pace(step_ms: float) -> str:
    if not step_ms:
        return "The search ran at its own speed."
    return f"The search's own steps take milliseconds: each was made to last {step_ms:g} ms."


def _mean(values: Sequence[float]) -> str:
    value = mean(values)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "none"
    return ", ".join(f"{v:.3g}" for v in (*(percentile(values, p) for p in (50, 95)), max(values)))


def _times(values: Sequence[float]) -> str:
    return f"{percentile(values, 50):.3f} s ({percentile(values, 95):.3f} s)"


def _share(values: Sequence[float]) -> str:
    return f"{mean(values):.1%}"


def _recalls(recalls: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{mean(values):.3f}" for values in zip(*recalls, strict=True))


def _same(rows: Sequence[Measured]) -> str:
    same = sum(r.same_tokens for r in rows)
    return f"{same} of {len(rows)}" if same == len(rows) else f"[red]ONLY {same} of {len(rows)}[/]"
