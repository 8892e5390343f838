"""The table of `pressure`: each policy against waiting, from rows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from experiments.rows import Row
from experiments.stats import Interval, percentile, ratio_of_percentiles, verdict

ENOUGH = 200
"""Requests of a cell; with fewer its row says so."""
SPEED_GOAL = 0.98
OURS = ("srpf", "slack")
_PERCENTS = (50, 95, 99)


def table(rows: Sequence[Row]) -> Table:
    """A block for each load: waiting, then each policy as a ratio over it."""
    shown = Table(title="Many streams, little memory: each policy against waiting")
    shown.add_column("")
    for percent in _PERCENTS:
        shown.add_column(f"TTFT P{percent}, s", justify="right")
    for heading in ("completion, s", "tokens/s", "preempted", "again", "swapped", "answered"):
        shown.add_column(heading, justify="right")
    lines: list[str] = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        own = [row for row in rows if row["workload"] == workload]
        cells = {name: _Cell(own, name) for name in dict.fromkeys(map(name_of, own))}
        shown.add_row(f"[bold]{workload}[/]")
        for name, cell in cells.items():
            if cell.answers:
                base = None if name == "waiting" else cells.get("waiting")
                shown.add_row(f"  {name}", *cell.texts(base))
        shown.add_section()
        lines += [f"[bold]{workload}[/]: {line}" for line in (_sizes(own), *_verdicts(cells))]
    shown.caption = "\n".join(
        (
            "In brackets: how many times better than waiting. Completion: median from arrival to "
            "the last token; in brackets the median over each request's own ratio.",
            "Preempted: streams, recomputed + swapped. Again, swapped: thousand tokens computed "
            "once more, copied out / in.",
            *lines,
        )
    )
    return shown


def name_of(row: Row) -> str:
    """The cell of a row."""
    if row["stream_policy"] is None:
        return str(row["mode"])
    return str(row["stream_policy"]) + (":hard" if row["invalidation"] == "hard" else "")


def _sizes(rows: Sequence[Row]) -> str:
    rates = ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in rows}))
    pools = ", ".join(f"{tokens:,}" for tokens in sorted({row["pool_tokens"] for row in rows}))
    return f"{rates} requests a second, a pool of {pools} tokens"


def _verdicts(cells: dict[str, _Cell]) -> list[str]:
    """The goals, where the cells that they need are there."""
    lines: list[str] = []
    fcfs, base = cells.get("fcfs"), cells.get("waiting")
    ours = [name for name in OURS if name in cells]
    if fcfs is not None and ours:
        best = min(ours, key=lambda name: cells[name].ttft(95))
        gain = fcfs.over(cells[best], "ttft_s", 95)
        lines.append(f"fcfs / {best} at P95: {gain} {verdict(gain.value > 1)}")
    if base is not None:
        speeds = {
            name: cell.speed(base)
            for name, cell in cells.items()
            if cell is not base and cell.answers
        }
        if speeds:
            slowest = min(speeds, key=lambda name: speeds[name])
            lines.append(
                f"completion at least {SPEED_GOAL:g} of waiting's speed: "
                f"{speeds[slowest]:.3f} ({slowest}) {verdict(speeds[slowest] >= SPEED_GOAL)}"
            )
    for name, cell in cells.items():
        soft = cells.get(name.removesuffix(":hard"))
        if name.endswith(":hard") and soft is not None:
            lines.append(f"{name} / soft at P50: {cell.over(soft, 'ttft_s', 50)}")
            lines.append(f"{name} / soft at P95: {cell.over(soft, 'ttft_s', 95)}")
            found = soft.counted("found_again_tokens")
            lines.append(f"found again: {found:,} of {soft.counted('invalidated_tokens'):,} tokens")
    return lines


class _Cell:
    """The rows of one cell. `answers`: of its requests, by run and number."""

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        own = [row for row in rows if name_of(row) == name]
        asked = [row for row in own if row["what"] == "request"]
        answered = [row for row in asked if "failed" not in row]
        self.failed = len(asked) - len(answered)
        self.cells = [row for row in own if row["what"] == "cell"]
        self.answers = {
            (row["seed"], row["number"]): row | {"completion_s": row["end_s"] - row["arrival_s"]}
            for row in answered
        }

    def ttft(self, percent: float) -> float:
        return percentile([row["ttft_s"] for row in self.answers.values()], percent)

    def over(self, other: _Cell, what: str, percent: float) -> Interval:
        """This cell's percentile divided by the other's, over the requests that both answered."""
        both = sorted(set(self.answers) & set(other.answers))
        return ratio_of_percentiles(
            [self.answers[key][what] for key in both],
            [other.answers[key][what] for key in both],
            percent,
        )

    def speed(self, base: _Cell) -> float:
        """How many times sooner than in `base` a request is complete: the median, over the requests
        that both answered. Most of a request's time is its retrieval, the same in both."""
        both = set(self.answers) & set(base.answers)
        return percentile(
            [base.answers[k]["completion_s"] / self.answers[k]["completion_s"] for k in both], 50
        )

    def counted(self, name: str) -> int:
        return sum(int(row.get(name, 0)) for row in self.cells)

    def texts(self, base: _Cell | None) -> list[str]:
        """The cells of the table's row; with ratios where there is a cell to compare with."""
        texts: list[str] = []
        for percent in _PERCENTS:
            gain = f" ({base.over(self, 'ttft_s', percent).value:.2f}x)" if base else ""
            texts.append(f"{self.ttft(percent):.3f}{gain}")
        completion = percentile([row["completion_s"] for row in self.answers.values()], 50)
        speed = f" ({self.speed(base):.3f}x)" if base else ""
        texts.append(f"{completion:.2f}{speed}")
        seconds = sum(row["makespan_s"] for row in self.cells)
        tokens = self.counted("output_tokens")
        texts.append(f"{tokens / seconds:.1f}" if seconds else "")
        recomputed, swapped = (self.counted(f"preemptions_{k}") for k in ("recompute", "swap"))
        texts.append(f"{recomputed} + {swapped}")
        texts.append(f"{self.counted('recomputed_tokens') / 1e3:.1f}")
        out, back = (self.counted(f"{kind}_tokens") / 1e3 for kind in ("swapped", "restored"))
        texts.append(f"{out:.1f} / {back:.1f}")
        few = "" if len(self.answers) >= ENOUGH else " [bold red]FEW[/]"
        failed = f", {self.failed} failed" if self.failed else ""
        texts.append(f"{len(self.answers)}{failed}{few}")
        return texts
