"""`sglang-stream bench`: what streaming gains, what it could gain at most, and what it costs."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments import display
from experiments.bench import added, apart, attention, chat, lcp, rates, router, traffic, ttft
from experiments.bench.rows import Row, RowFile, manifest, read_rows
from experiments.server import (
    default_model,
    running_server,
    running_sglang,
    running_sglang_router,
)
from sglang_stream.errors import EngineFailure, InvalidRequest

_APART = ("--decode-workers", "1")
# The worker looks for chunks between two passes: short ones, or it is what limits their number.
_SHORT_PASSES = ("--stream-pass-tokens", "32")

Add = Callable[[Row], None]


class Part(str, Enum):
    """The measurements, in the order in which they run."""

    TTFT = "ttft"
    APART = "apart"
    ROUTER = "router"
    TRAFFIC = "traffic"
    LCP = "lcp"
    ATTENTION = "attention"


TABLES: dict[Part, Callable[[Sequence[Row]], Table]] = {
    Part.TTFT: ttft.table,
    Part.APART: apart.table,
    Part.ROUTER: router.table,
    Part.TRAFFIC: traffic.table,
    Part.LCP: lcp.table,
    Part.ATTENTION: attention.table,
}


@dataclass(frozen=True)
class Settings:
    """What to measure. `own_model`: the user chose it, so nothing is assumed of it."""

    model_path: str
    own_model: bool
    flags: list[str]
    sizes: list[int]
    apart_sizes: list[int]
    streams: list[int]
    repeats: int
    pairs: int
    rounds: int
    seed: int


def main(args: list[str]) -> int:
    """Runs the benchmark with these command-line arguments; returns the exit status."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command()(bench)
    try:
        app(args, prog_name="sglang-stream bench")
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return 0


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
        int, typer.Option(min=1, help="traffic: rounds of each server; router: of chunks.")
    ] = 10,
    seed: Annotated[int, typer.Option(help="Of all prompts.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Keep the rows here, as JSON lines.", show_default=".cache/bench/<time>.jsonl"
        ),
    ] = None,
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
    file = RowFile(out or _default_file())
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
        seed,
    )
    file.add(manifest(model, flags, seed))
    for part in chosen:
        rows: list[Row] = []

        def add(row: Row, rows: list[Row] = rows) -> None:
            rows.append(row)
            file.add(row)

        with display.progress() as progress:
            _MEASURES[part](settings, progress, add)
        _print_tables(console, rows)
    console.print(f"The rows are in {file.path}", soft_wrap=True)


def _measure_ttft(settings: Settings, progress: Progress, add: Add) -> None:
    step = progress.add_task("starting the server", total=None)
    flags = ["--enable-cache-report", *settings.flags]
    with running_server(settings.model_path, flags) as url:
        progress.update(step, description="measuring prefills")

        def plan(seconds: float) -> None:
            progress.reset(step, description="time to first token", total=seconds)

        asyncio.run(
            ttft.measure(
                url,
                settings.sizes,
                settings.repeats,
                settings.seed,
                add,
                plan,
                lambda seconds: progress.advance(step, seconds),
            )
        )
        progress.update(step, description="stopping the server")


def _measure_apart(settings: Settings, progress: Progress, add: Add) -> None:
    step = progress.add_task("starting three workers", total=None)
    flags = [*_APART, "--prefill-workers", "2", "--enable-cache-report", *settings.flags]
    with running_server(settings.model_path, flags) as url:
        progress.update(step, description="measuring prefills")

        def plan(seconds: float) -> None:
            progress.reset(step, description="workers apart", total=seconds)

        asyncio.run(
            apart.measure(
                url,
                settings.apart_sizes,
                settings.streams,
                settings.repeats,
                settings.seed,
                add,
                plan,
                lambda seconds: progress.advance(step, seconds),
            )
        )
        progress.update(step, description="stopping three workers")


def _measure_router(settings: Settings, progress: Progress, add: Add) -> None:
    _measure_calls(settings, progress, add)
    if chat.has_sglang_router():
        _measure_chat(settings, progress, add)
    else:
        add({"bench": "router", "what": "chat", "absent": True})


def _measure_calls(settings: Settings, progress: Progress, add: Add) -> None:
    step = progress.add_task("starting the server", total=None)
    flags = [*_SHORT_PASSES, *settings.flags]
    with running_server(settings.model_path, flags) as url:

        def advance() -> None:
            progress.advance(step)

        [worker] = chat.workers_of(url)
        progress.reset(step, description="what the router adds", total=2 * settings.pairs)
        added.measure(url, worker.url, settings.pairs, settings.seed, add, advance)
        total = len(rates.FORMS) * (settings.rounds + 1)
        progress.reset(step, description="chunks a second", total=total)
        asyncio.run(rates.measure(url, settings.rounds, settings.seed, add, advance))
        progress.update(step, description="stopping the server")


def _measure_chat(settings: Settings, progress: Progress, add: Add) -> None:
    step = progress.add_task("starting two workers", total=None)
    flags = [*_APART, "--prefill-workers", "1", *settings.flags]
    with (
        running_server(settings.model_path, flags) as url,
        running_sglang_router(chat.workers_of(url)) as other,
    ):
        progress.reset(step, description="chat completions", total=settings.pairs)
        chat.measure(
            {"router": url, "sglang-router": other},
            settings.pairs,
            settings.seed,
            add,
            lambda: progress.advance(step),
        )
        progress.update(step, description="stopping two workers")


def _measure_traffic(settings: Settings, progress: Progress, add: Add) -> None:
    step = progress.add_task("starting two servers", total=None)
    flags = ["--sleep-on-idle", *settings.flags]
    with (
        running_sglang(settings.model_path, flags, streams=False) as plain,
        running_sglang(settings.model_path, flags, streams=True) as streams,
    ):
        progress.reset(step, description="ordinary traffic", total=2 * (settings.rounds + 1))
        asyncio.run(
            traffic.measure(
                {"plain": plain, "streams": streams},
                settings.rounds,
                settings.seed,
                add,
                lambda: progress.advance(step),
            )
        )
        progress.update(step, description="stopping two servers")


def _measure_lcp(settings: Settings, progress: Progress, add: Add) -> None:
    progress.add_task("common prefix", total=None)
    for row in lcp.measure():
        add(row)


def _measure_attention(settings: Settings, progress: Progress, add: Add) -> None:
    if settings.own_model:
        return
    progress.add_task("attention: some minutes", total=None)
    try:
        rows = attention.run(settings.model_path)
    except RuntimeError as e:
        raise EngineFailure(str(e)) from e
    for row in rows:
        add({"bench": "attention", **row})


_MEASURES: dict[Part, Callable[[Settings, Progress, Add], None]] = {
    Part.TTFT: _measure_ttft,
    Part.APART: _measure_apart,
    Part.ROUTER: _measure_router,
    Part.TRAFFIC: _measure_traffic,
    Part.LCP: _measure_lcp,
    Part.ATTENTION: _measure_attention,
}


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The tables of a file's rows."""
    for part, table in TABLES.items():
        own = [row for row in rows if row.get("bench") == part.value]
        if own:
            yield table(own)


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
