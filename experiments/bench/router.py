"""What the router costs: added to each call, the most that one process takes, and against another.

The rows are those of `added`, `rates` and `chat`, told apart by their `what`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.table import Table

from experiments.bench import rates
from experiments.rows import Row
from experiments.stats import median_difference, ratio_of_medians, verdict

ADDED_GOALS_S = {"chunk": 1e-3, "first token": 2e-3}
NAMES = {
    "chunk": "append of 200 token ids, ms",
    "first token": "first token of a sealed stream, ms",
    "calls of 50": "chunks a second, 50 x 200 ids a call",
    "single texts": "chunks a second, one text a call",
    "chat": "chat completion, workers apart, ms",
}


def table(rows: Sequence[Row]) -> Table:
    """One line for each thing measured, medians on both sides."""
    shown = Table(title="The router: what it adds, takes, and how it stands to SGLang's")
    shown.add_column("")
    for heading in ("times", "through it", "compared to", "difference or ratio (95 %)", "goal"):
        shown.add_column(heading, justify="right")
    for what, goal_s in ADDED_GOALS_S.items():
        _add_added(shown, [row for row in rows if row["what"] == what], what, goal_s)
    for form in rates.FORMS.values():
        _add_rate(shown, [row for row in rows if row["what"] == form.name], form)
    _add_chat(shown, [row for row in rows if row["what"] == "chat"])
    shown.caption = (
        "Compared to: the same over ZeroMQ; the worker's own /generate; sglang-router before the "
        "same workers."
    )
    return shown


def _add_added(shown: Table, rows: Sequence[Row], what: str, goal_s: float) -> None:
    through, past = _pairs(rows, "router", "worker")
    if not through:
        return
    added = median_difference(through, past)
    shown.add_row(
        NAMES[what],
        str(len(through)),
        _ms(median(through)),
        _ms(median(past)),
        f"+{_ms(added.value)} ({_ms(added.low)} to {_ms(added.high)})",
        f"at most {goal_s * 1e3:g} {verdict(added.value <= goal_s)}",
    )


def _add_rate(shown: Table, rows: Sequence[Row], form: rates.Form) -> None:
    if not rows:
        return
    speeds = [row["chunks_per_s"] for row in rows]
    shown.add_row(
        f"{NAMES[form.name]} ({median(row['tokens'] for row in rows):.0f} tokens each)",
        str(len(rows)),
        f"{median(speeds):,.0f}",
        "",
        f"({min(speeds):,.0f} to {max(speeds):,.0f})",
        f"at least {form.goal:,g} {verdict(median(speeds) >= form.goal)}",
    )


def _add_chat(shown: Table, rows: Sequence[Row]) -> None:
    if any(row.get("absent") for row in rows):
        shown.add_row(NAMES["chat"], "", "", "not installed", "", "sglang-router is missing")
    through, other = _pairs(rows, "router", "sglang-router")
    if not through:
        return
    ratio = ratio_of_medians(through, other)
    shown.add_row(
        NAMES["chat"],
        str(len(through)),
        _ms(median(through)),
        _ms(median(other)),
        str(ratio),
        f"at most 1 {_no_slower(ratio.value, ratio.low)}",
    )


def _no_slower(value: float, low: float) -> str:
    """A ratio that cannot be told from 1 is shown as such."""
    return "open: within the noise" if low <= 1 < value else verdict(value <= 1)


def _pairs(rows: Sequence[Row], over: str, under: str) -> tuple[list[float], list[float]]:
    """The seconds of both sides, from the pairs that are complete."""
    by = {
        side: {r["pair"]: r["seconds"] for r in rows if r.get("by") == side}
        for side in (over, under)
    }
    both = sorted(set(by[over]) & set(by[under]))
    return [by[over][pair] for pair in both], [by[under][pair] for pair in both]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
