"""The tables of a report, and how they are written: pure functions."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from experiments.published import PERCENTS as PUBLISHED_PERCENTS
from experiments.published import PublishedName, published_speed_up, published_ttft_s
from experiments.report.load import Rows
from experiments.report.measures import (
    PERCENTS,
    Measured,
    Setting,
    speed_up,
    times_sooner,
    waiting_beside,
)
from experiments.stats import Interval

_AS_SECONDS = ("waiting", "default")  # published so; the policies as ratios over waiting
_NEAR = 0.25  # of a published ratio
_APART = 1.15  # a published order of two policies that differ by less says little


@dataclass(frozen=True)
class Table:
    """`name`: of its files. The first `texts` columns are texts, the others numbers."""

    name: str
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    texts: int = 2

    def as_csv(self) -> str:
        file = io.StringIO()
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(self.headings)
        lines.writerows(self.rows)
        return file.getvalue()

    def as_markdown(self) -> str:
        rule = ["---" if i < self.texts else "---:" for i in range(len(self.headings))]
        lines = [self.headings, rule, *self.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def tables_of(
    setting: Setting, cells: Sequence[Measured], rows: Rows, goodput_ttft_s: float | None
) -> Iterator[Table]:
    """All tables of cells that are compared with each other."""
    published = rows.published.get((setting.source, setting.machine, setting.workload))
    yield shaped_as_published(setting, cells)
    if published is not None:
        compared = beside_published(setting, cells, published)
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


def beside_published(
    setting: Setting, cells: Sequence[Measured], published: PublishedName
) -> Table:
    """A line for each cell and percentile that is published: seconds, and how many times sooner
    than waiting, each with its ratio to the published figure."""
    lines: list[tuple[str, ...]] = []
    pairs: list[_Pair] = []
    for cell in cells:
        seconds = published_ttft_s(published, cell.how.qps).get(cell.how.name)
        if seconds is None:
            continue
        base = waiting_beside(cell, cells)
        gains = times_sooner(base, cell, PUBLISHED_PERCENTS) if base is not None else None
        known = published_speed_up(published, cell.how.qps).get(cell.how.name)
        for i, percent in enumerate(PUBLISHED_PERCENTS):
            own = cell.ttft([percent])[0]
            times = ("", "", "")
            if gains and known:
                times = (f"{gains[i]:.3f}x", f"{known[i]:.3f}x", f"{gains[i] / known[i]:.2f}")
                pairs.append(_Pair(cell.how.qps, cell.how.name, percent, gains[i], known[i]))
            lines.append(
                (
                    f"{cell.how.qps:g}",
                    cell.how.name,
                    f"P{percent}",
                    f"{own:.4f}",
                    f"{seconds[i]:.4f}",
                    f"{own / seconds[i]:.2f}",
                    *times,
                )
            )
    return Table(
        "published",
        f"TTFT beside the published figures, {setting}",
        ("QPS", "", "", "TTFT, s", "published", "ratio", "over waiting", "published", "ratio"),
        tuple(lines),
        "Published: Stream2LLM, arXiv 2604.16395, Llama-3.1-8B on 2x H200; a policy's seconds are "
        f"those of waiting over its published speed-up. {_agreement(pairs)}",
        texts=3,
    )


class _Pair(NamedTuple):
    """How many times sooner than waiting a policy is: here, and as published."""

    qps: float
    policy: str
    percent: int
    own: float
    known: float


def _agreement(pairs: Sequence[_Pair]) -> str:
    """How near the policies' P50 and P95 over waiting are to the published ones, in words.

    Without `default`: the published one is another order than ours.
    """
    compared = [pair for pair in pairs if pair.percent in (50, 95) and pair.policy != "default"]
    near = sum(abs(pair.own / pair.known - 1) <= _NEAR for pair in compared)
    kept = [
        better.own > worse.own
        for better, worse in permutations(compared, 2)
        if (better.qps, better.percent) == (worse.qps, worse.percent)
        and better.known > _APART * worse.known
    ]
    return (
        f"Of the policies' P50 and P95 over waiting, {near} of {len(compared)} are within "
        f"{_NEAR:.0%} of the published ones; of the published orders of two policies that are more "
        f"than {_APART - 1:.0%} apart, {sum(kept)} of {len(kept)} are kept."
    )


def percentiles(setting: Setting, cells: Sequence[Measured]) -> Table:
    """TTFT of each cell, and its median and P95 over waiting's with intervals."""
    lines: list[tuple[str, ...]] = []
    for cell in cells:
        base = waiting_beside(cell, cells)
        gains = speed_up(base, cell, (50, 95)) if base is not None else None
        texts = [f"{seconds:.4f}" for seconds in cell.ttft()]
        texts += [_with_interval(gain) for gain in gains] if gains else ["", ""]
        lines.append((f"{cell.how.qps:g}", cell.how.name, *texts))
    headings = (*(f"P{percent}, s" for percent in PERCENTS), "over waiting, P50", "P95")
    return Table(
        "percentiles",
        f"TTFT percentiles, {setting}",
        ("QPS", "", *headings),
        tuple(lines),
        "In brackets: 95 % interval by bootstrap over requests, all seeds together.",
    )


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
