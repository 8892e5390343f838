"""The demo's table, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One pair of measured requests over the same tokens, and what they have in common.

    `limit_ttft_s`: of a plain request whose prompt is cached up to what the last item changed;
    `changed_tokens`: the rest of that prompt, question included. `cached_tokens`: of the waiting
    request, which must find nothing.
    """

    scenario: str
    title: str
    repeat: int
    waiting_ttft_s: float
    streaming_ttft_s: float
    limit_ttft_s: float
    prompt_tokens: int
    ready_tokens: int
    changed_tokens: int
    cached_tokens: int
    same_tokens: bool

    def fields(self) -> dict[str, Any]:
        return asdict(self)


def ratio(rows: Sequence[Row]) -> float:
    """How many times earlier the answer starts: the ratio of the medians."""
    return median(r.waiting_ttft_s for r in rows) / median(r.streaming_ttft_s for r in rows)


def table(rows: Sequence[Row]) -> Table:
    """One column per scenario, in the order of the rows."""
    by_title: dict[str, list[Row]] = {}
    for row in rows:
        by_title.setdefault(row.title, []).append(row)
    result = Table(title="Time to first token (TTFT) after the last chunk has arrived")
    result.add_column("")
    for title in by_title:
        result.add_column(title, justify="right")
    lines: list[tuple[str, list[str]]] = [
        ("TTFT waiting, median (worst)", [_times(g, "waiting_ttft_s") for g in by_title.values()]),
        (
            "TTFT streaming, median (worst)",
            [_times(g, "streaming_ttft_s") for g in by_title.values()],
        ),
        (
            "TTFT at the limit, median (worst)",
            [_times(g, "limit_ttft_s") for g in by_title.values()],
        ),
        ("waiting / streaming", [f"[bold]{ratio(g):.1f} x[/bold]" for g in by_title.values()]),
        ("tokens of the prompt", [_tokens(g, "prompt_tokens") for g in by_title.values()]),
        ("tokens ready at the seal", [_tokens(g, "ready_tokens") for g in by_title.values()]),
        (
            "tokens from the last change on",
            [_tokens(g, "changed_tokens") for g in by_title.values()],
        ),
        ("same tokens in every pair", [_same(g) for g in by_title.values()]),
    ]
    for name, cells in lines:
        result.add_row(name, *cells)
    result.caption = (
        "The limit: a plain request whose prompt is cached up to what the last chunk changed."
    )
    return result


def _times(rows: Sequence[Row], name: str) -> str:
    values = [getattr(r, name) for r in rows]
    return f"{median(values):.3f} s ({max(values):.3f} s)"


def _tokens(rows: Sequence[Row], name: str) -> str:
    return f"{median(getattr(r, name) for r in rows):,.0f}"


def _same(rows: Sequence[Row]) -> str:
    same = sum(r.same_tokens for r in rows)
    return "yes" if same == len(rows) else f"NO: only {same} of {len(rows)}"
