"""`sglang-stream simulate`: the cells of a specification on a machine's profile."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from experiments import display
from experiments.command import run_command
from experiments.rows import RowFile, manifest
from experiments.simulate.cluster import Cell, simulate
from experiments.spec import CellsSpec, Spec, load_spec
from experiments.workload.arrivals import arrivals_of
from experiments.workload.load import queries_of
from sglang_stream.config import load_profile


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
    file = RowFile(out)
    file.add(manifest(machine.model, [], wanted.workload.seed) | _told(wanted, profile))
    cells = list(cells_of(wanted.cells))
    queries = queries_of(wanted.workload)
    console = display.console()
    with display.progress() as progress:
        task = progress.add_task("", total=len(cells))
        for cell in cells:
            progress.update(task, description=_title(cell))
            load = arrivals_of(wanted.workload, queries, cell.qps, cell.seed)
            rows = simulate(
                machine, wanted.engine, cell, load, wanted.workload.output_tokens, wanted.name
            )
            file.extend(map(msgspec.to_builtins, rows))
            progress.advance(task)
    console.print(f"{len(cells)} cells: their rows are in {out}", soft_wrap=True)


def cells_of(spec: CellsSpec) -> Iterator[Cell]:
    """Every cell: a mode without streams has no policy to vary."""
    for seed, qps, placement, mode in product(spec.seeds, spec.qps, spec.placements, spec.modes):
        for policy in spec.policies if mode == "streaming" else (None,):
            yield Cell(mode, policy, placement, qps, seed)


def _title(cell: Cell) -> str:
    return f"{cell.policy or cell.mode} at {cell.qps:g} a second"


def _told(spec: Spec, profile: str) -> dict[str, object]:
    """What the manifest says of a simulation."""
    return {
        "source": "simulator",
        "profile": profile,
        "spec": msgspec.to_builtins(spec, enc_hook=str),
    }
