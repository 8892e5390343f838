"""What the rows of a cell come to: pure functions of rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.request_row import LoadRow, RequestMode, RequestRow
from experiments.stats import Interval, ratios_of_percentiles
from sglang_stream.errors import InvalidRequest

PERCENTS = (50, 75, 90, 95, 99)

Numbers = NDArray[np.float64]


class Setting(NamedTuple):
    """What cells that are compared with each other have in common."""

    source: str
    machine: str
    workload: str
    placement: str | None

    def __str__(self) -> str:
        how = "measured on" if self.source == "engine" else "simulated on"
        placed = f", {self.placement}" if self.placement else ""
        return f"{self.workload}, {how} {self.machine}{placed}"


class How(NamedTuple):
    """The rest: how requests were served, and how many came a second."""

    mode: RequestMode
    policy: str | None
    qps: float

    @property
    def name(self) -> str:
        return self.policy or self.mode


@dataclass(frozen=True)
class Measured:
    """All requests of a cell, of all its seeds."""

    setting: Setting
    how: How
    rows: tuple[RequestRow, ...]

    @cached_property
    def answered(self) -> tuple[RequestRow, ...]:
        return tuple(row for row in self.rows if row.ttft_s is not None)

    @property
    def failed(self) -> int:
        return len(self.rows) - len(self.answered)

    @cached_property
    def by_seed(self) -> dict[int, Measured]:
        """The same of each seed that has an answered request."""
        of: dict[int, list[RequestRow]] = defaultdict(list)
        for row in self.rows:
            of[row.seed].append(row)
        cells = {seed: replace(self, rows=tuple(own)) for seed, own in sorted(of.items())}
        return {seed: cell for seed, cell in cells.items() if cell.answered}

    @property
    def seeds(self) -> int:
        return len({row.seed for row in self.rows})

    @cached_property
    def ttft_of(self) -> dict[tuple[int, str], float]:
        """Seconds by seed and query."""
        return {
            (row.seed, row.query_id): row.ttft_s for row in self.answered if row.ttft_s is not None
        }

    @cached_property
    def ttft_s(self) -> Numbers:
        return np.array([row.ttft_s for row in self.answered], float)

    @cached_property
    def completion_s(self) -> Numbers:
        """From arrival to the last token."""
        return np.array([row.end_s - row.arrival_s for row in self.answered if row.end_s], float)

    @cached_property
    def seconds(self) -> float:
        """Until the last answer, of all seeds together."""
        last: dict[int, float] = defaultdict(float)
        for row in self.answered:
            last[row.seed] = max(last[row.seed], row.end_s or 0.0)
        return sum(last.values())

    @property
    def requests_per_s(self) -> float:
        return len(self.answered) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Prompt and output."""
        tokens = sum((row.prompt_tokens or 0) + (row.output_tokens or 0) for row in self.answered)
        return tokens / self.seconds if self.seconds else 0.0

    def ttft(self, percents: Sequence[float] = PERCENTS) -> list[float]:
        """Seconds at those percentiles."""
        return [float(value) for value in np.percentile(self.ttft_s, percents)]

    def ttft_by_seed(self, percents: Sequence[float]) -> list[tuple[float, ...]]:
        """For each percentile those of the seeds."""
        return list(zip(*(cell.ttft(percents) for cell in self.by_seed.values()), strict=True))

    def completion(self, percent: float) -> float:
        return float(np.percentile(self.completion_s, percent))

    def goodput(self, ttft_s: float) -> tuple[float, float]:
        """The share of all requests whose first token came within `ttft_s`, and how many of them a
        second."""
        good = int((self.ttft_s <= ttft_s).sum())
        return good / len(self.rows), good / self.seconds if self.seconds else 0.0

    def total(self, counter: str) -> int | None:
        """Of a counter of the rows; None if no row has it."""
        known = [value for row in self.rows if (value := getattr(row, counter)) is not None]
        return sum(known) if known else None


def setting_of(row: LoadRow) -> Setting:
    return Setting(row.source, row.machine, row.workload, row.placement)


def measured(rows: Iterable[RequestRow]) -> list[Measured]:
    """The cells with an answered request, in the order in which they first come."""
    return [cell for cell in _cells_of(rows) if cell.answered]


def unanswered(rows: Iterable[RequestRow]) -> list[Measured]:
    """The other cells."""
    return [cell for cell in _cells_of(rows) if not cell.answered]


def _cells_of(rows: Iterable[RequestRow]) -> list[Measured]:
    of: dict[tuple[Setting, How], list[RequestRow]] = defaultdict(list)
    for row in rows:
        of[setting_of(row), How(row.mode, row.stream_policy, row.qps)].append(row)
    return [Measured(setting, how, tuple(own)) for (setting, how), own in of.items()]


def by_setting(cells: Iterable[Measured]) -> dict[Setting, list[Measured]]:
    """Cells that are compared with each other, by rate."""
    settings: dict[Setting, list[Measured]] = defaultdict(list)
    for cell in cells:
        settings[cell.setting].append(cell)
    return {
        setting: sorted(own, key=lambda cell: cell.how.qps) for setting, own in settings.items()
    }


def waiting_beside(cell: Measured, cells: Iterable[Measured]) -> Measured | None:
    """The cell that waits at the same rate in the same setting, if it is another one."""
    for other in cells:
        same = other.setting == cell.setting and other.how.qps == cell.how.qps
        if same and other.how.mode == "waiting" and other is not cell:
            return other
    return None


def times_sooner(base: Measured, cell: Measured, percents: Sequence[float]) -> list[float] | None:
    """How many times sooner than in `base` first tokens come, over the requests that both
    answered; None if there is none."""
    pairs = _pairs(base, cell)
    if not len(pairs):
        return None
    return [float(over / under) for over, under in np.percentile(pairs, percents, axis=0)]


def times_sooner_by_seed(
    base: Measured, cell: Measured, percents: Sequence[float]
) -> list[tuple[float, ...]]:
    """For each percentile the same of each seed of which both answered a request."""
    found = [
        times_sooner(base.by_seed[seed], own, percents)
        for seed, own in cell.by_seed.items()
        if seed in base.by_seed
    ]
    return list(zip(*(gains for gains in found if gains), strict=True))


def speed_up(base: Measured, cell: Measured, percents: Sequence[float]) -> list[Interval] | None:
    """The same with 95 % intervals."""
    pairs = _pairs(base, cell)
    return ratios_of_percentiles(pairs[:, 0], pairs[:, 1], percents) if len(pairs) else None


def _pairs(base: Measured, cell: Measured) -> Numbers:
    """TTFT of the requests that both answered, a line each."""
    own = cell.ttft_of
    pairs = [(base_s, own[key]) for key, base_s in base.ttft_of.items() if key in own]
    return np.array(pairs, float).reshape(-1, 2)


def goodput_limit_s(text: str) -> float:
    """Seconds of `ttft:300`, an objective in milliseconds. Raises InvalidRequest."""
    what, _, number = text.partition(":")
    try:
        milliseconds = float(number)
    except ValueError:
        milliseconds = 0.0
    if what != "ttft" or not milliseconds > 0:
        raise InvalidRequest(
            f"--goodput {text}: give an objective in milliseconds, such as ttft:300",
            param="--goodput",
        )
    return milliseconds / 1e3
