"""The parts of `sglang-stream bench`: the servers that each needs, what it measures, its table."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum

from rich.progress import Progress
from rich.table import Table

from experiments.bench import (
    added,
    apart,
    attention,
    chat,
    lcp,
    pinning,
    planning,
    pressure,
    pressure_table,
    rates,
    router,
    traffic,
    ttft,
)
from experiments.bench.loads import LOADS, pool_tokens, requests_of
from experiments.rows import Row
from experiments.server import running_server, running_sglang, running_sglang_router
from sglang_stream.errors import EngineFailure
from sglang_stream.policy import POLICIES

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
    PINNING = "pinning"
    PRESSURE = "pressure"
    PLANNING = "planning"
    LCP = "lcp"
    ATTENTION = "attention"


TABLES: dict[Part, Callable[[Sequence[Row]], Table]] = {
    Part.TTFT: ttft.table,
    Part.APART: apart.table,
    Part.ROUTER: router.table,
    Part.TRAFFIC: traffic.table,
    Part.PINNING: pinning.table,
    Part.PRESSURE: pressure_table.table,
    Part.PLANNING: planning.table,
    Part.LCP: lcp.table,
    Part.ATTENTION: attention.table,
}


@dataclass(frozen=True)
class Settings:
    """What to measure. `own_model`: the user chose it, so nothing is assumed of it; `rate`: None
    for that of each load."""

    model_path: str
    own_model: bool
    flags: list[str]
    sizes: list[int]
    apart_sizes: list[int]
    streams: list[int]
    repeats: int
    pairs: int
    rounds: int
    idle_pairs: int
    cells: list[pressure.Cell]
    requests: int
    rate: float | None
    seed: int


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
    total = traffic.PAIRS * traffic.waves_of(settings.rounds)
    step = progress.add_task("ordinary traffic", total=total)
    flags = ["--sleep-on-idle", *settings.flags]
    kinds: list[traffic.Server] = ["plain", "streams"]
    for pair in range(traffic.PAIRS):
        with ExitStack() as stack:
            urls = {
                kind: stack.enter_context(
                    running_sglang(settings.model_path, flags, streams=kind == "streams")
                )
                for kind in kinds
            }
            asyncio.run(
                traffic.measure(
                    urls, pair, settings.rounds, settings.seed, add, lambda: progress.advance(step)
                )
            )
        kinds.reverse()


def _measure_pinning(settings: Settings, progress: Progress, add: Add) -> None:
    step = progress.add_task("starting the server", total=None)
    flags = [*pressure.pool_flags(pinning.POOL_TOKENS), *settings.flags]
    with running_server(settings.model_path, flags) as url:
        [worker] = chat.workers_of(url)
        progress.reset(step, description="idle streams", total=settings.idle_pairs + 1)
        asyncio.run(
            pinning.measure(
                url,
                worker.url,
                pinning.POOL_TOKENS,
                pinning.STREAMS,
                settings.idle_pairs,
                settings.seed,
                add,
                lambda: progress.advance(step),
            )
        )
        progress.update(step, description="stopping the server")


def _measure_pressure(settings: Settings, progress: Progress, add: Add) -> None:
    step = progress.add_task("", total=len(settings.cells) * settings.requests)
    for cell in settings.cells:
        load = LOADS[cell.workload]
        rate = settings.rate or load.rate
        requests = requests_of(load, settings.requests, settings.seed, rate)
        pool = pool_tokens(requests)
        progress.update(step, description=f"{cell.workload}, {cell.name}: starting the server")
        flags = [*cell.flags, *pressure.pool_flags(pool), *settings.flags]
        with running_server(settings.model_path, flags) as url:
            [worker] = chat.workers_of(url)
            progress.update(step, description=f"{cell.workload}, {cell.name}")
            asyncio.run(
                pressure.measure(
                    url,
                    worker.url,
                    cell,
                    requests,
                    {"rate": rate, "pool_tokens": pool, "seed": settings.seed},
                    add,
                    lambda: progress.advance(step),
                )
            )


def _measure_planning(settings: Settings, progress: Progress, add: Add) -> None:
    total = len(planning.COUNTS) * len(POLICIES) * len(planning.CASES)
    step = progress.add_task("ordering and planning", total=total)
    planning.measure(planning.COUNTS, settings.seed, add, lambda: progress.advance(step))


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


MEASURES: dict[Part, Callable[[Settings, Progress, Add], None]] = {
    Part.TTFT: _measure_ttft,
    Part.APART: _measure_apart,
    Part.ROUTER: _measure_router,
    Part.TRAFFIC: _measure_traffic,
    Part.PINNING: _measure_pinning,
    Part.PRESSURE: _measure_pressure,
    Part.PLANNING: _measure_planning,
    Part.LCP: _measure_lcp,
    Part.ATTENTION: _measure_attention,
}


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The tables of a file's rows."""
    for part, table in TABLES.items():
        own = [row for row in rows if row.get("bench") == part.value]
        if own:
            yield table(own)
