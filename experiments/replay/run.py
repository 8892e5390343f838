"""`sglang-stream replay`: a specification's cells on a real engine."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer
from rich.progress import Progress, TaskID

from experiments import display
from experiments.cells import Cell, cells_of, require_one_server, server_of
from experiments.command import ModelPath, run_command
from experiments.replay.ledger import Ledger
from experiments.replay.load import replay_load, require_policies
from experiments.report.load import load_rows
from experiments.report.measures import goodput_limit_s
from experiments.report.summary import summaries
from experiments.rows import Row, machine_of, manifest
from experiments.server import default_model, running_server
from experiments.spec import Spec, load_spec, spec_fields
from experiments.tokens import ModelTokenizer
from experiments.workload.arrivals import arrivals_of
from experiments.workload.load import queries_with_contents
from sglang_stream.errors import InvalidRequest, StreamError, WorkerUnavailable

INTERRUPTED = 130
_START_S = 20.0  # what the start of a server counts for in the time that is left


@dataclass(frozen=True)
class Settings:
    """What to run, and on what: on servers of its own, or on the one at `base_url`. `model_path`:
    None where nothing needs it."""

    spec: Spec
    model_path: str | None
    flags: list[str]
    base_url: str | None
    events: bool


def main(args: list[str]) -> int:
    """Replays with these command-line arguments; returns the exit status."""
    return run_command(replay, "replay", args)


def replay(
    spec_path: Annotated[
        Path, typer.Argument(metavar="SPEC.toml", help="What to run.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The rows, as JSON lines. Complete cells in it are kept, others run.",
            show_default=".cache/replay/<name of the specification>.jsonl",
        ),
    ] = None,
    model_path: ModelPath = None,
    sglang_flags: Annotated[
        str, typer.Option(help="For all servers, in one argument: '--tp-size 2'.")
    ] = "",
    base_url: Annotated[
        str | None,
        typer.Option(
            help="A server that runs already, started by `sglang-stream serve`: nothing that is a "
            "flag of a server can be compared then.",
            show_default=False,
        ),
    ] = None,
    goodput: Annotated[
        str | None,
        typer.Option(
            help="An objective in milliseconds: ttft:300.", show_default="the specification's"
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(help="How the rows call this machine.", show_default="by its GPUs or cores"),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many queries of each load.", show_default="all"),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Only the first seeds.", show_default="all")
    ] = None,
    events: Annotated[
        bool, typer.Option("--events", help="Also rows of what each client saw, for timelines.")
    ] = False,
) -> None:
    """Replay a workload on the real engine, in every cell of a specification.

    A cell is a load: a mode (waiting, streaming under a policy, re-sending), a
    placement, a rate and a seed. Requests come when they are due, whether
    earlier ones are answered or not. A server is started for each policy and
    placement; before each load it is warmed up and its caches are emptied.

    Ctrl-C, or a server that dies, loses the cell that runs: the same command,
    of the same version, goes on with it. A quick try:

      sglang-stream replay SPEC.toml --queries 20 --seeds 1 --out try.jsonl
    """
    spec = _smaller(load_spec(spec_path), queries, seeds)
    cells = cells_of(spec.cells)
    limit_s = None if goodput is None else goodput_limit_s(goodput)
    if limit_s is None and spec.goodput_ttft_ms is not None:
        limit_s = spec.goodput_ttft_ms / 1e3
    flags = shlex.split(sglang_flags)
    if base_url is not None:
        _check_running(base_url, cells, flags, spec, model_path)
    elif model_path is None:
        model_path, flags = default_model(), ["--dtype", "float32", *flags]
    settings = Settings(spec, model_path, flags, base_url, events)
    head = manifest(model_path or "", flags, spec.workload.seed)
    head["machine"] = machine or machine_of(head)
    conditions = _conditions(settings, head)
    ledger = Ledger(out or Path(".cache/replay") / f"{spec.name}.jsonl", conditions)
    missing = ledger.missing(cells)
    console = display.console()
    if len(missing) < len(cells):
        kept = len(cells) - len(missing)
        console.print(f"{kept} of {len(cells)} cells are complete in {ledger.path}", soft_wrap=True)
    if missing:
        ledger.start(head | {"conditions": conditions, "spec": _told(settings)})
    try:
        with display.progress() as progress:
            _run(settings, missing, head["machine"], ledger, progress)
    except (KeyboardInterrupt, StreamError) as e:
        left = len(ledger.missing(cells))
        console.print(
            f"{len(cells) - left} of {len(cells)} cells are complete in {ledger.path}: the same "
            "command goes on with the next one",
            soft_wrap=True,
        )
        if isinstance(e, KeyboardInterrupt):
            raise typer.Exit(INTERRUPTED) from None
        raise
    for table in summaries(load_rows([ledger.path]).requests, limit_s):
        console.print(table)
    console.print(f"The rows are in {ledger.path}", soft_wrap=True)


def _smaller(spec: Spec, queries: int | None, seeds: int | None) -> Spec:
    """The specification with fewer queries and seeds."""
    workload, cells = spec.workload, spec.cells
    if queries is not None:
        workload = msgspec.structs.replace(workload, queries=min(queries, workload.queries))
    if seeds is not None:
        cells = msgspec.structs.replace(cells, seeds=cells.seeds[:seeds])
    return msgspec.structs.replace(spec, workload=workload, cells=cells)


def _check_running(
    base_url: str, cells: Sequence[Cell], flags: list[str], spec: Spec, model_path: str | None
) -> None:
    """Raises InvalidRequest for what cannot be done with a server that runs already."""
    require_one_server(cells, base_url)
    if flags:
        raise InvalidRequest(
            "--sglang-flags are for servers that are started here: leave them or --base-url away",
            param="--sglang-flags",
        )
    if spec.workload.trace is not None and model_path is None:
        raise InvalidRequest(
            "workload.trace has texts: give --model-path with the tokenizer of the model at "
            "--base-url",
            param="--model-path",
        )


def _conditions(settings: Settings, head: Row) -> Row:
    """All that the rows of a cell depend on."""
    spec = _told(settings)
    return {
        "workload": spec["workload"],
        "engine": spec["engine"],
        "model": settings.model_path,
        "base_url": settings.base_url,
    } | {name: head[name] for name in ("flags", "machine", "versions", "commit")}


def _told(settings: Settings) -> Row:
    """The specification as a manifest has it: without what a server of somebody's is not told."""
    engine = {"engine": None} if settings.base_url is not None else {}
    return spec_fields(settings.spec) | engine


def _run(
    settings: Settings,
    cells: Sequence[Cell],
    machine: str,
    ledger: Ledger,
    progress: Progress,
) -> None:
    """All cells, those of one server after the other on it."""
    spec = settings.spec
    policies = {cell.policy for cell in cells if cell.policy is not None}
    if settings.base_url is not None and policies:
        _finish(require_policies(settings.base_url, policies), settings.base_url)
    tokenize = ModelTokenizer(settings.model_path or "")
    queries, contents = queries_with_contents(spec.workload, tokenize)
    loads = {(c.qps, c.seed): arrivals_of(spec.workload, queries, c.qps, c.seed) for c in cells}
    seconds = {at: max(a.at_s + a.query.last_chunk_s for a in load) for at, load in loads.items()}
    servers = [
        (server, list(own))
        for server, own in groupby(cells, lambda cell: server_of(cell, spec.cells))
    ]
    total = sum(seconds[c.qps, c.seed] for c in cells) + _START_S * len(servers)
    step = progress.add_task("", total=total)
    described = {"source": "engine", "machine": machine, "workload": spec.name}
    for number, (server, own) in enumerate(servers, start=1):
        progress.update(step, description=f"server {number} of {len(servers)}: starting")
        with _server(settings, server.flags(spec.engine)) as url:
            progress.advance(step, _START_S)
            for cell in own:
                load = loads[cell.qps, cell.seed]
                progress.update(step, description=cell.name)
                replaying = replay_load(
                    url,
                    cell,
                    load,
                    contents,
                    spec.workload.output_tokens,
                    described,
                    ledger.add,
                    _advance(progress, step, seconds[cell.qps, cell.seed] / len(load)),
                    events=settings.events,
                )
                _finish(replaying, url)


def _server(settings: Settings, flags: list[str]) -> AbstractContextManager[str]:
    if settings.base_url is not None:
        return nullcontext(settings.base_url.rstrip("/"))
    return running_server(settings.model_path or "", [*flags, *settings.flags])


def _finish(calls: Coroutine[None, None, None], url: str) -> None:
    """Runs calls of a server to their end. Raises WorkerUnavailable if it is not there."""
    try:
        asyncio.run(calls)
    except httpx.HTTPError as e:
        raise WorkerUnavailable(
            f"no answer from {url} ({type(e).__name__}: {e}): check the address and that it is an "
            "sglang-stream router"
        ) from e


def _advance(progress: Progress, step: TaskID, seconds: float) -> Callable[[], None]:
    return lambda: progress.advance(step, seconds)
