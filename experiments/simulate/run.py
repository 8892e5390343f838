"""`sglang-stream simulate`: the cells of a specification on a machine's profile."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import typer

from experiments import display
from experiments.cells import Cell, cells_of
from experiments.command import run_command
from experiments.rows import Row, RowFile, manifest
from experiments.simulate.rows import simulate
from experiments.spec import Spec, WorkloadSpec, load_spec, spec_fields
from experiments.tokens import ModelTokenizer
from experiments.workload.arrivals import arrivals_of
from experiments.workload.load import queries_of
from experiments.workload.shapes import Query
from sglang_stream.config import EngineConfig, Profile, load_profile
from sglang_stream.errors import InvalidRequest

INTERRUPTED = 130


class _Settings(NamedTuple):
    """What to simulate, on what. `model_path`: whose tokenizer counts a trace's tokens; `drawn`:
    the cell with events."""

    spec: Spec
    machine: Profile
    model_path: str | None
    drawn: Cell | None


def main(args: list[str]) -> int:
    """Simulates with these command-line arguments; returns the exit status."""
    return run_command(run, "simulate", args)


def run(
    spec_path: Annotated[
        Path, typer.Argument(metavar="SPEC.toml", help="What to simulate.", show_default=False)
    ],
    profile: Annotated[
        str,
        typer.Option(
            help="The machine: a profile's name or file, as for `serve`.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The rows, as JSON lines.",
            show_default=".cache/simulate/<name of the specification>.jsonl",
        ),
    ] = None,
    model_path: Annotated[
        str | None,
        typer.Option(
            "--model-path",
            "--model",
            help="Whose tokenizer counts the tokens of a trace.",
            show_default="none: four characters are a token",
        ),
    ] = None,
    events: Annotated[
        bool,
        typer.Option(
            "--events",
            help="Also rows of what clients saw and workers did in a short time of one streamed "
            "cell, for timelines.",
        ),
    ] = False,
) -> None:
    """Simulate the cells of a specification on a machine that need not be there.

      sglang-stream simulate crawler_h200_tp2.toml --profile h200-tp2

    Policies, planner and placement are those of `serve`; what iterations and
    copies take is the profile's. The rows are those that `replay` writes of a
    real engine. A file that is there is replaced when all are complete.
    """
    spec = load_spec(spec_path)
    machine = load_profile(profile)
    _queries(spec.workload, model_path)  # what is wrong with a trace shows here
    path = out or Path(".cache/simulate") / f"{spec.name}.jsonl"
    cells = cells_of(spec.cells)
    told = {"source": "simulator", "profile": profile, "spec": spec_fields(spec)}
    if spec.workload.trace is not None:
        told["tokens_by"] = model_path or "characters"
    console = display.console()
    try:
        with _replacing(path) as file:
            file.add(manifest(machine.model, [], spec.workload.seed) | told)
            drawn = drawn_of(cells) if events else None
            counted = _simulate_all(_Settings(spec, machine, model_path, drawn), cells, file)
    except KeyboardInterrupt:
        console.print(f"Stopped: nothing was written to {path}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    console.print(f"{len(cells)} cells: their rows are in {path}", soft_wrap=True)
    if counted["failed"]:
        console.print(
            f"{counted['failed']:,} of {counted['requests']:,} requests were not answered: prompt "
            "and answer did not fit into the KV pool (engine.kv_tokens)",
            soft_wrap=True,
        )


def drawn_of(cells: Sequence[Cell]) -> Cell | None:
    """The cell with events: streamed at the highest rate, by the order that is the default if it
    is there, with the first seed. None if nothing is streamed."""
    streamed = [cell for cell in cells if cell.mode == "streaming"]
    usual = EngineConfig().policy
    return max(streamed, key=lambda cell: (cell.qps, cell.policy == usual), default=None)


@contextmanager
def _replacing(path: Path) -> Iterator[RowFile]:
    """A file to write into, which takes the place of `path` if all goes well, and goes if not.
    Raises InvalidRequest if it cannot be written."""
    if path.is_dir():
        raise InvalidRequest(f"--out {path} is a folder: name a file", param="--out")
    file = RowFile(path.with_name(f"{path.name}.part"))
    try:
        yield file
        file.path.replace(path)
    finally:
        file.path.unlink(missing_ok=True)


def _simulate_all(settings: _Settings, cells: Sequence[Cell], file: RowFile) -> Counter[str]:
    """All cells, on all cores, in their order. Returns how many `requests` there were, and how many
    of them `failed`."""
    counted: Counter[str] = Counter()
    with ProcessPoolExecutor(initializer=_leave_ctrl_c_to_the_parent) as pool:
        try:
            # The processes are forked here, before the display has a thread.
            done = deque(pool.submit(_rows, settings, cell) for cell in cells)
            with display.progress() as progress:
                task = progress.add_task(f"{len(cells)} cells", total=len(cells))
                while done:
                    rows = done.popleft().result()
                    file.extend(rows)
                    counted.update({name: rows[-1][name] for name in ("requests", "failed")})
                    progress.advance(task)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return counted


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _rows(settings: _Settings, cell: Cell) -> list[Row]:
    """The rows of one cell; that of the cell is the last."""
    spec, workload = settings.spec, settings.spec.workload
    load = arrivals_of(workload, _queries(workload, settings.model_path), cell.qps, cell.seed)
    rows = simulate(
        settings.machine,
        spec.engine,
        cell,
        load,
        workload.output_tokens,
        spec.name,
        events=cell == settings.drawn,
    )
    return [msgspec.to_builtins(row) for row in rows]


@cache
def _queries(workload: WorkloadSpec, model_path: str | None) -> list[Query]:
    """Those of a workload, made once in each process."""
    if model_path is None:
        return queries_of(workload)
    tokenize = ModelTokenizer(model_path)
    return queries_of(workload, lambda text: len(tokenize(text)))
