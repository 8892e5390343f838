"""The tables that `replay` ends with: a line for each cell, all seeds together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.report.measures import (
    PERCENTS,
    Measured,
    by_setting,
    measured,
    speed_up,
    waiting_beside,
)
from experiments.request_row import RequestRow
from experiments.stats import Interval

_COMPARED = (50, 95)


def summaries(requests: Iterable[RequestRow], goodput_ttft_s: float | None) -> Iterator[Table]:
    """TTFT at percentiles, each cell over waiting at the same rate, and what was got through; a
    table for the cells that are compared with each other."""
    for setting, cells in by_setting(measured(requests)).items():
        title = f"{setting}: ms from the last chunk to the first token"
        shown = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
        shown.add_column("QPS", justify="right")
        shown.add_column("")
        for percent in PERCENTS:
            shown.add_column(f"P{percent}", justify="right")
        for percent in _COMPARED:
            shown.add_column(f"over waiting, P{percent}", justify="right")
        for heading in ("completion P50, s", "tokens/s"):
            shown.add_column(heading, justify="right")
        if goodput_ttft_s is not None:
            shown.add_column(f"within {goodput_ttft_s * 1e3:g} ms", justify="right")
        shown.add_column("answered", justify="right")
        for cell in cells:
            texts = _texts(cell, cells, goodput_ttft_s)
            shown.add_row(f"{cell.how.qps:g}", cell.how.name, *texts)
        shown.caption = "Over waiting: how many times sooner, with 95 % intervals"
        yield shown


def _texts(cell: Measured, cells: list[Measured], goodput_ttft_s: float | None) -> list[str]:
    base = waiting_beside(cell, cells)
    gains = speed_up(base, cell, _COMPARED) if base is not None else None
    texts = [f"{seconds * 1e3:,.1f}" for seconds in cell.ttft()]
    texts += [_short(gain) for gain in gains] if gains else [""] * len(_COMPARED)
    texts += [f"{cell.completion(50):.2f}", f"{cell.tokens_per_s:,.0f}"]
    if goodput_ttft_s is not None:
        texts.append(f"{cell.goodput(goodput_ttft_s)[0]:.0%}")
    failed = f", {cell.failed} failed" if cell.failed else ""
    return [*texts, f"{len(cell.answered)}{failed}"]


def _short(gain: Interval) -> str:
    return f"{gain.value:.2f} ({gain.low:.2f}-{gain.high:.2f})"
