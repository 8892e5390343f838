"""The tables of cells that are compared with each other: pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.published import PERCENTS as PUBLISHED_PERCENTS
from experiments.report.beside_published import beside_published
from experiments.report.load import Rows
from experiments.report.measures import (
    PERCENTS,
    Measured,
    Setting,
    speed_up,
    times_sooner,
    waiting_beside,
)
from experiments.report.table import Table, low_to_high
from experiments.stats import Interval
from sglang_stream.config import Profile

_AS_SECONDS = ("waiting", "default")  # published so; the policies as ratios over waiting


def tables_of(
    setting: Setting,
    cells: Sequence[Measured],
    rows: Rows,
    goodput_ttft_s: float | None,
    profile: Profile | None = None,
) -> Iterator[Table]:
    """All tables of cells that are compared with each other. `profile`: what simulated them, where
    that is known."""
    published = rows.published.get((setting.source, setting.machine, setting.workload))
    yield shaped_as_published(setting, cells)
    if published is not None:
        compared = beside_published(setting, cells, published, profile)
        if compared.rows:
            yield compared
    yield percentiles(setting, cells)
    yield throughput(setting, cells)
    if goodput_ttft_s is not None:
        yield goodput(setting, cells, goodput_ttft_s)
    counted = counters(setting, cells)
    if counted.rows:
        yield counted


def shaped_as_published(setting: Setting, cells: Sequence[Measured]) -> Table:
    """A line for each rate: seconds of waiting and of `default`, the rest over waiting."""
    names = list(dict.fromkeys(cell.how.name for cell in cells))
    names = [n for n in _AS_SECONDS if n in names] + [n for n in names if n not in _AS_SECONDS]
    lines: list[tuple[str, ...]] = []
    for qps in dict.fromkeys(cell.how.qps for cell in cells):
        own = {cell.how.name: cell for cell in cells if cell.how.qps == qps}
        texts = [_in_published_form(own.get(name), cells) for name in names]
        lines.append((f"{qps:g}", *texts))
    return Table(
        "ttft",
        f"TTFT, {setting}",
        ("QPS", *(_heading(name) for name in names)),
        tuple(lines),
        "P50 / P95 / P99. Seconds from the last chunk to the first token; with x: how many times "
        "sooner than waiting.",
        texts=1,
    )


def _heading(name: str) -> str:
    return {"waiting": "waiting, s", "default": "streaming default, s"}.get(name, name)


def _in_published_form(cell: Measured | None, cells: Sequence[Measured]) -> str:
    if cell is None:
        return ""
    base = waiting_beside(cell, cells)
    if cell.how.name in _AS_SECONDS or base is None:
        return " / ".join(f"{seconds:.4f}" for seconds in cell.ttft(PUBLISHED_PERCENTS))
    gains = times_sooner(base, cell, PUBLISHED_PERCENTS)
    return " / ".join(f"{gain:.3f}x" for gain in gains) if gains else ""


def percentiles(setting: Setting, cells: Sequence[Measured]) -> Table:
    """TTFT of each cell, its median and P95 by seed, and both over waiting's with intervals."""
    lines: list[tuple[str, ...]] = []
    for cell in cells:
        base = waiting_beside(cell, cells)
        gains = speed_up(base, cell, (50, 95)) if base is not None else None
        texts = [f"{seconds:.4f}" for seconds in cell.ttft()]
        texts += [low_to_high(seconds, "{:.4f}") for seconds in cell.ttft_by_seed((50, 95))]
        texts += [_with_interval(gain) for gain in gains] if gains else ["", ""]
        lines.append((f"{cell.how.qps:g}", cell.how.name, *texts))
    headings = (
        *(f"P{percent}, s" for percent in PERCENTS),
        *("seeds, P50", "seeds, P95", "over waiting, P50", "P95"),
    )
    return Table(
        "percentiles",
        f"TTFT percentiles, {setting}",
        ("QPS", "", *headings),
        tuple(lines),
        "In brackets: 95 % interval by bootstrap over requests, all seeds together. Seeds: the "
        "lowest and the highest of one seed; a seed draws the arrivals, the queries are the same.",
    ).without_empty()


def throughput(setting: Setting, cells: Sequence[Measured]) -> Table:
    """Completion times, and what was got through a second."""
    lines = [
        (
            f"{cell.how.qps:g}",
            cell.how.name,
            f"{cell.completion(50):.2f}",
            f"{cell.completion(95):.2f}",
            f"{cell.requests_per_s:.3f}",
            f"{cell.tokens_per_s:,.0f}",
            str(cell.seeds),
            f"{len(cell.answered):,}",
            str(cell.failed),
        )
        for cell in cells
    ]
    return Table(
        "throughput",
        f"Completion and throughput, {setting}",
        (
            *("QPS", "", "completion P50, s", "P95, s", "requests/s", "tokens/s"),
            *("seeds", "answered", "failed"),
        ),
        tuple(lines),
        "Completion: from a request's arrival, before any retrieval, to its last token. Tokens: "
        "prompts and answers. The rates include the tail after the last arrival.",
    )


def goodput(setting: Setting, cells: Sequence[Measured], ttft_s: float) -> Table:
    """How many requests met the objective."""
    lines: list[tuple[str, ...]] = []
    for cell in cells:
        share, per_s = cell.goodput(ttft_s)
        lines.append((f"{cell.how.qps:g}", cell.how.name, f"{share:.1%}", f"{per_s:.3f}"))
    return Table(
        "goodput",
        f"Goodput, {setting}",
        ("QPS", "", "share of requests", "requests/s"),
        tuple(lines),
        f"Requests whose first token came within {ttft_s * 1e3:g} ms of the last chunk; refused "
        "ones did not.",
    )


def counters(setting: Setting, cells: Sequence[Measured]) -> Table:
    """What streaming did, a request in the mean; cells without any counter are left out."""
    names = {
        "updates": "updates",
        "lcp_tokens": "LCP tokens",
        "invalidated_tokens": "invalidated",
        "computed_tokens": "computed before the seal",
        "ready_tokens": "ready at the seal",
        "preemptions": "preemptions",
        "recomputed_tokens": "recomputed",
        "swapped_tokens": "swapped",
    }
    lines: list[tuple[str, ...]] = []
    for cell in cells:
        totals = [cell.total(name) for name in names]
        if any(total is not None for total in totals):
            count = len(cell.answered)
            texts = ("" if total is None else f"{total / count:,.2f}" for total in totals)
            lines.append((f"{cell.how.qps:g}", cell.how.name, *texts))
    return Table(
        "counters",
        f"What streaming did, {setting}",
        ("QPS", "", *names.values()),
        tuple(lines),
        "Tokens, and numbers, of a request in the mean.",
    )


def _with_interval(gain: Interval) -> str:
    return f"{gain.value:.2f}x ({gain.low:.2f} to {gain.high:.2f})"
