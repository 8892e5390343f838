"""The table of TTFT beside the published figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

import msgspec

from experiments.published import PERCENTS, PublishedName, published_speed_up, published_ttft_s
from experiments.report.measures import (
    Measured,
    Setting,
    times_sooner,
    times_sooner_by_seed,
    waiting_beside,
)
from experiments.report.table import Table, low_to_high
from sglang_stream.config import Figure, Profile

_NEAR = 0.25  # of a published ratio
_APART = 1.15  # a published order of two policies that differ by less says little
_FITTED = "fitted to"  # how the sources of a profile's figures say so


class _Line(NamedTuple):
    """A cell at one percentile, here and as published: seconds, and how many times sooner than
    waiting. None is what is not there; `by_seed` are empty then."""

    qps: float
    name: str
    percent: int
    seconds: float
    seconds_by_seed: tuple[float, ...]
    published_s: float | None
    times: float | None
    times_by_seed: tuple[float, ...]
    published_times: float | None

    def texts(self) -> tuple[str, ...]:
        return (
            f"{self.qps:g}",
            self.name,
            f"P{self.percent}",
            f"{self.seconds:.4f}",
            low_to_high(self.seconds_by_seed, "{:.4f}"),
            _text(self.published_s, "{:.4f}"),
            _text(_ratio(self.seconds, self.published_s), "{:.2f}"),
            _text(self.times, "{:.3f}x"),
            low_to_high(self.times_by_seed, "{:.3f}x"),
            _text(self.published_times, "{:.3f}x"),
            _text(_ratio(self.times, self.published_times), "{:.2f}"),
        )


def beside_published(
    setting: Setting, cells: Sequence[Measured], published: PublishedName, profile: Profile | None
) -> Table:
    """A line for each cell and percentile at the published rates: seconds, and how many times
    sooner than waiting, each with its ratio to the published figure. `profile`: see `tables_of`."""
    lines = [line for cell in cells for line in _lines(cell, cells, published)]
    return Table(
        "published",
        f"TTFT beside the published figures, {setting}",
        (
            *("QPS", "", "", "TTFT, s", "seeds, s", "published, s", "ratio of s"),
            *("over waiting", "seeds, x", "published, x", "ratio of x"),
        ),
        tuple(line.texts() for line in lines),
        "Published: Stream2LLM, arXiv 2604.16395, Llama-3.1-8B on 2x H200; a policy's seconds are "
        "those of waiting over its published speed-up; empty for what is not published. Seeds: the "
        f"lowest and the highest of one seed. {_agreement(lines)}{_fitted(profile)}",
        texts=3,
    ).without_empty()


def _lines(cell: Measured, cells: Sequence[Measured], published: PublishedName) -> Iterator[_Line]:
    """Those of a cell; none at a rate that is not published."""
    of_rate = published_ttft_s(published, cell.how.qps)
    if not of_rate:
        return
    known_s = of_rate.get(cell.how.name)
    known_times = published_speed_up(published, cell.how.qps).get(cell.how.name)
    base = waiting_beside(cell, cells)
    times = times_sooner(base, cell, PERCENTS) if base is not None else None
    times_by_seed = times_sooner_by_seed(base, cell, PERCENTS) if base is not None else None
    seconds, seconds_by_seed = cell.ttft(PERCENTS), cell.ttft_by_seed(PERCENTS)
    for i, percent in enumerate(PERCENTS):
        yield _Line(
            cell.how.qps,
            cell.how.name,
            percent,
            seconds[i],
            seconds_by_seed[i],
            known_s[i] if known_s else None,
            times[i] if times else None,
            times_by_seed[i] if times_by_seed else (),
            known_times[i] if known_times else None,
        )


def _agreement(lines: Sequence[_Line]) -> str:
    """How near the policies' P50 and P95 over waiting are to the published ones, in words.

    Without `default`: the published one is another order than ours.
    """
    compared = [
        (line, line.times, line.published_times)
        for line in lines
        if line.percent in (50, 95)
        and line.name != "default"
        and line.times is not None
        and line.published_times is not None
    ]
    near = sum(abs(own / known - 1) <= _NEAR for _, own, known in compared)
    kept = [
        own > worse
        for (line, own, known), (other, worse, worse_known) in permutations(compared, 2)
        if (line.qps, line.percent) == (other.qps, other.percent) and known > _APART * worse_known
    ]
    return (
        f"Of the policies' P50 and P95 over waiting, {near} of {len(compared)} are within "
        f"{_NEAR:.0%} of the published ones; of the published orders of two policies that are more "
        f"than {_APART - 1:.0%} apart, {sum(kept)} of {len(kept)} are kept."
    )


def _fitted(profile: Profile | None) -> str:
    """What of the profile was fitted, in its sources' own words; empty if nothing was."""
    if profile is None:
        return ""
    told = [
        f"{name} ({sentence.rstrip('.')})"
        for name, figure in msgspec.structs.asdict(profile).items()
        if isinstance(figure, Figure)
        for sentence in figure.source.split(". ")
        if _FITTED in sentence
    ]
    if not told:
        return ""
    return f" Fitted in the profile {profile.name}, for all cells alike: {'; '.join(told)}."


def _ratio(own: float | None, known: float | None) -> float | None:
    return None if own is None or known is None else own / known


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
