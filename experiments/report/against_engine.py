"""The tables of the simulator against the engine: cells of one workload that both have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from experiments.report.measures import How, Measured
from experiments.report.table import Table, low_to_high

_PERCENTS = (50, 95)
_GOALS = (0.15, 0.10)  # of an error


class Machines(NamedTuple):
    """Where cells of a workload are from: a profile, and the machine that it is compared with."""

    workload: str
    simulated: str
    measured: str

    def __str__(self) -> str:
        return f"{self.workload}, simulated on {self.simulated}, measured on {self.measured}"


class _Cell(NamedTuple):
    """A cell of both sources, with the same seeds if they have some in common; `errors_by_seed`:
    relative ones at each percentile, of the seeds in common."""

    placement: str | None
    how: How
    simulated: Measured
    measured: Measured
    seeds: tuple[int, ...]

    @property
    def errors(self) -> list[float]:
        """Relative ones, for each percentile."""
        return _errors(self.simulated, self.measured)

    @property
    def errors_by_seed(self) -> list[tuple[float, ...]]:
        """For each percentile those of the seeds that both have."""
        found = [
            _errors(self.simulated.by_seed[seed], self.measured.by_seed[seed])
            for seed in self.seeds
        ]
        return list(zip(*found, strict=True)) or [()] * len(_PERCENTS)


def against_engine(cells: Sequence[Measured]) -> Iterator[tuple[Machines, Table]]:
    """A table for each workload, and each pair of machines if there are several."""
    for workload in dict.fromkeys(cell.setting.workload for cell in cells):
        own = [cell for cell in cells if cell.setting.workload == workload]
        simulated, measured = (
            dict.fromkeys(cell.setting.machine for cell in own if cell.setting.source == source)
            for source in ("simulator", "engine")
        )
        for machines in product([workload], simulated, measured):
            named = Machines(*machines)
            joined = _joined(named, own)
            if joined:
                yield named, _table(named, joined)


def _joined(machines: Machines, cells: Sequence[Measured]) -> list[_Cell]:
    """The cells that both machines have, by rate."""
    found: list[_Cell] = []
    measured = {
        (cell.setting.placement, cell.how): cell
        for cell in cells
        if (cell.setting.source, cell.setting.machine) == ("engine", machines.measured)
    }
    for cell in cells:
        other = measured.get((cell.setting.placement, cell.how))
        simulated = (cell.setting.source, cell.setting.machine)
        if other is None or simulated != ("simulator", machines.simulated):
            continue
        seeds = tuple(sorted(cell.by_seed.keys() & other.by_seed.keys()))
        found.append(
            _Cell(cell.setting.placement, cell.how, _of(cell, seeds), _of(other, seeds), seeds)
        )
    return sorted(found, key=lambda cell: cell.how.qps)


def _of(cell: Measured, seeds: tuple[int, ...]) -> Measured:
    """What of the cell is of these seeds; all of it without any."""
    if not seeds:
        return cell
    return replace(cell, rows=tuple(row for row in cell.rows if row.seed in seeds))


def _errors(simulated: Measured, measured: Measured) -> list[float]:
    both = zip(simulated.ttft(_PERCENTS), measured.ttft(_PERCENTS), strict=True)
    return [own / real - 1 for own, real in both]


def _table(machines: Machines, cells: Sequence[_Cell]) -> Table:
    placed = len({cell.placement for cell in cells}) > 1
    of_percents = (
        (
            f"P{percent} measured, s",
            f"P{percent} simulated, s",
            f"P{percent} error",
            f"P{percent} error, seeds",
        )
        for percent in _PERCENTS
    )
    return Table(
        "against-engine",
        f"TTFT by the simulator against the engine, {machines}",
        (
            *("QPS", "", *(["placement"] if placed else [])),
            *(heading for headings in of_percents for heading in headings),
            *("seeds", "answered"),
        ),
        tuple(_texts(cell, placed) for cell in cells),
        "Error: the simulator's TTFT over the engine's, less 1; seeds: the lowest and the "
        "highest of one seed that both have. Where both have seeds in common, the others are left "
        "out, and so are cells that only one of them has. Answered: measured / simulated where "
        f"they differ. {_within(cells)}",
        texts=3 if placed else 2,
    ).without_empty()


def _texts(cell: _Cell, placed: bool) -> tuple[str, ...]:
    texts = [f"{cell.how.qps:g}", cell.how.name, *([cell.placement or ""] if placed else [])]
    of_percents = zip(
        cell.measured.ttft(_PERCENTS),
        cell.simulated.ttft(_PERCENTS),
        cell.errors,
        cell.errors_by_seed,
        strict=True,
    )
    for real, own, error, by_seed in of_percents:
        texts += [f"{real:.4f}", f"{own:.4f}", f"{error:+.1%}", low_to_high(by_seed, "{:+.1%}")]
    counts = [f"{len(of.answered):,}" for of in (cell.measured, cell.simulated)]
    return *texts, str(len(cell.seeds)), " / ".join(dict.fromkeys(counts))


def _within(cells: Sequence[_Cell]) -> str:
    """How many cells are near, in words."""
    counted = [
        f"P{percent} within {goal:.0%} in {sum(abs(cell.errors[i]) <= goal for cell in cells)}"
        for i, percent in enumerate(_PERCENTS)
        for goal in _GOALS
    ]
    both = [
        f"within {goal:.0%} in {sum(all(abs(e) <= goal for e in cell.errors) for cell in cells)}"
        for goal in _GOALS
    ]
    return f"Of {len(cells)} cells: {', '.join(counted)}; both {' and '.join(both)}."
