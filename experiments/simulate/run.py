"""`sglang-stream simulate`: the cells of a specification on a machine's profile."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from experiments import display
from experiments.cells import Cell, cells_of
from experiments.command import run_command
from experiments.rows import Row, RowFile, manifest
from experiments.simulate.rows import simulate
from experiments.spec import Spec, WorkloadSpec, load_spec, spec_fields
from experiments.workload.arrivals import arrivals_of
from experiments.workload.load import queries_of
from experiments.workload.shapes import Query
from sglang_stream.config import Profile, load_profile


def main(args: list[str]) -> int:
    """Simulates with these command-line arguments; returns the exit status."""
    return run_command(run, "simulate", args)


def run(
    spec: Annotated[Path, typer.Argument(help="What to simulate, a TOML file.")],
    profile: Annotated[
        str, typer.Option(help="The machine: a profile's name or file, as for `serve`.")
    ],
    out: Annotated[Path, typer.Option(help="The rows, one a request, as JSON lines.")],
) -> None:
    """Simulate the cells of a specification on a machine that need not be there.

      sglang-stream simulate crawler_h200_tp2.toml --profile h200-tp2 --out rows.jsonl

    Policies, planner and placement are those of `serve`; what iterations and copies take is the
    profile's. The rows are those that `replay` writes of a real engine.
    """
    wanted = load_spec(spec)
    machine = load_profile(profile)
    _queries(wanted.workload)  # what is wrong with a trace shows here
    file = RowFile(out)
    file.add(manifest(machine.model, [], wanted.workload.seed) | _told(wanted, profile))
    cells = cells_of(wanted.cells)
    with display.progress() as progress, ProcessPoolExecutor() as pool:
        task = progress.add_task(f"{len(cells)} cells", total=len(cells))
        for rows in pool.map(partial(_simulated, wanted, machine), cells):
            file.extend(rows)
            progress.advance(task)
    display.console().print(f"{len(cells)} cells: their rows are in {out}", soft_wrap=True)


def _simulated(spec: Spec, machine: Profile, cell: Cell) -> list[Row]:
    """The rows of one cell."""
    load = arrivals_of(spec.workload, _queries(spec.workload), cell.qps, cell.seed)
    rows = simulate(machine, spec.engine, cell, load, spec.workload.output_tokens, spec.name)
    return [msgspec.to_builtins(row) for row in rows]


@cache
def _queries(workload: WorkloadSpec) -> list[Query]:
    """Those of a workload, made once in each process."""
    return queries_of(workload)


def _told(spec: Spec, profile: str) -> dict[str, object]:
    """What the manifest says of a simulation."""
    return {
        "source": "simulator",
        "profile": profile,
        "spec": spec_fields(spec),
    }
