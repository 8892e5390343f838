"""`sglang-stream bench`: what streaming gains, what it could gain at most, and what it costs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from experiments import display
from experiments.bench import added, pressure, ttft
from experiments.bench.loads import LOADS
from experiments.bench.parts import MEASURES, Part, Settings, tables
from experiments.command import run_command
from experiments.rows import Row, RowFile, manifest, read_rows
from experiments.server import default_model
from sglang_stream.errors import InvalidRequest


def main(args: list[str]) -> int:
    """Runs the benchmark with these command-line arguments; returns the exit status."""
    return run_command(bench, "bench", args)


def bench(
    parts: Annotated[
        list[Part] | None, typer.Argument(help="What to measure.", show_default="all")
    ] = None,
    model_path: Annotated[
        str | None,
        typer.Option(help="A model that SGLang takes.", show_default="a small random one, float32"),
    ] = None,
    sglang_flags: Annotated[
        str, typer.Option(help="For all servers, in one argument: '--tp-size 2'.")
    ] = "",
    sizes: Annotated[
        str, typer.Option(help="ttft: tokens of the prompts, with commas between.")
    ] = "2048,8192,16384",
    apart_sizes: Annotated[str, typer.Option(help="apart: as --sizes.")] = "4096,16384",
    streams: Annotated[
        str, typer.Option(help="apart: prompts at once, with commas between.")
    ] = "1,8",
    repeats: Annotated[
        int, typer.Option(min=1, help="ttft, apart: how often each is measured.")
    ] = 5,
    pairs: Annotated[
        int,
        typer.Option(
            min=1, max=added.MAX_PAIRS, help="router: calls on each side of a comparison."
        ),
    ] = 100,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="traffic: rounds with each pair of servers; router: of chunks."),
    ] = 10,
    idle_pairs: Annotated[
        int, typer.Option(min=1, help="pinning: times with idle streams, and without.")
    ] = 20,
    loads: Annotated[str, typer.Option(help="pressure: which, with commas between.")] = ",".join(
        LOADS
    ),
    policies: Annotated[
        str,
        typer.Option(
            help="pressure: waiting and policies, with commas between; of a load with updates "
            "also with hard invalidation, as slack:hard."
        ),
    ] = pressure.POLICIES,
    requests: Annotated[
        int, typer.Option(min=1, help="pressure: requests under each policy.")
    ] = pressure.REQUESTS,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="pressure: requests a second.",
            show_default="three quarters of what two CPU cores compute",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all prompts.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Keep the rows here, as JSON lines.", show_default=".cache/bench/<time>.jsonl"
        ),
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add the rows to what is in the file.")
    ] = False,
    show: Annotated[
        Path | None, typer.Option(help="Measure nothing: print the tables of such a file.")
    ] = None,
) -> None:
    """Measure on the real engine, every request on an empty cache, and print tables.

    [bold]ttft[/]: time to first token over a context that arrives in 8 chunks:
    waiting for all of them, streaming, re-sending the growing prompt to plain
    SGLang, and the limit: everything before the last chunk cached.

    [bold]apart[/]: the first three of them on two prefill workers and a decode
    worker, one prompt alone and eight at once.

    [bold]router[/]: what it adds to a chunk and to the first token, how many
    chunks it takes, and chat completions against sglang-router.

    [bold]traffic[/]: ordinary requests with stream support and without.

    [bold]pinning[/]: ordinary requests beside idle streams that hold the KV pool.

    [bold]pressure[/]: many streams, little memory: a crawler-like and an ANN-like
    load under each policy, against waiting.

    [bold]planning[/]: what ordering and planning take with up to 5,000 streams.

    [bold]lcp[/]: the common prefix of two long prompts.

    [bold]attention[/]: the CPU platform's own against SGLang's (small model only).

    All of it takes well over an hour on two cores. A minute's worth:

      sglang-stream bench ttft --sizes 2048 --repeats 3
    """
    console = display.console()
    if show is not None:
        _print_tables(console, read_rows(show))
        return
    chosen = [part for part in Part if part in (parts or Part)]
    lengths, apart_lengths = _lengths(sizes, "--sizes"), _lengths(apart_sizes, "--apart-sizes")
    counts = _numbers(streams, 1, "--streams")
    cells = pressure.cells_of(loads, policies)
    file = RowFile(out or _default_file(), append=append)
    model = model_path or default_model()
    flags = [*([] if model_path else ["--dtype", "float32"]), *shlex.split(sglang_flags)]
    settings = Settings(
        model,
        model_path is not None,
        flags,
        lengths,
        apart_lengths,
        counts,
        repeats,
        pairs,
        rounds,
        idle_pairs,
        cells,
        requests,
        rate,
        seed,
    )
    file.add(manifest(model, flags, seed))
    for part in chosen:
        rows: list[Row] = []

        def add(row: Row, rows: list[Row] = rows) -> None:
            rows.append(row)
            file.add(row)

        with display.progress() as progress:
            MEASURES[part](settings, progress, add)
        if not append:
            _print_tables(console, rows)
    if append:
        _print_tables(console, read_rows(file.path))
    console.print(f"The rows are in {file.path}", soft_wrap=True)


def _print_tables(console: Console, rows: Sequence[Row]) -> None:
    for table in tables(rows):
        console.print(table)
        console.print()


def _lengths(sizes: str, param: str) -> list[int]:
    """Raises InvalidRequest unless all are numbers that the chunks divide."""
    return _numbers(sizes, ttft.CHUNKS, param)


def _numbers(text: str, unit: int, param: str) -> list[int]:
    """Raises InvalidRequest unless all are positive multiples of `unit`."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or any(n < unit or n % unit for n in numbers):
        raise InvalidRequest(
            f"{param} {text}: give multiples of {unit}, such as {unit * 256},{unit * 1024}"
            if unit > 1
            else f"{param} {text}: give whole numbers from 1 on, such as 1,8",
            param=param,
        )
    return numbers


def _default_file() -> Path:
    return Path(".cache/bench") / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.jsonl"
