"""`sglang-stream calibrate`: what a machine takes for prompts, calls, swaps and decode steps."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from experiments import display
from experiments.calibrate import measure, report
from experiments.calibrate.fitting import make_profile
from experiments.calibrate.measure import Add, MeasuredWorker
from experiments.command import ModelPath, run_command
from experiments.direct import DirectHttp
from experiments.rows import Row, RowFile, manifest
from experiments.server import default_model, running_server, running_sglang
from sglang_stream.errors import InvalidRequest

_WITH_SGLANG_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}
_LEAST_TOKENS = 256
# With SGLang's overlap schedule the loop goes on before a forward is over, so its time would not
# be its own.
_FLAGS = ["--disable-overlap-schedule"]
_PLOT = ".svg"


@dataclass(frozen=True)
class Settings:
    """What to measure, and on which worker."""

    model_path: str
    flags: list[str]
    limit: int
    repeats: int
    seed: int
    host_memory_gb: float


def main(args: list[str]) -> int:
    """Calibrates with these command-line arguments; returns the exit status."""
    return run_command(calibrate, "calibrate", args, _WITH_SGLANG_FLAGS)


def calibrate(
    ctx: typer.Context,
    out: Annotated[
        Path, typer.Option(help="The profile. Its samples and its plot are put beside it.")
    ],
    model_path: ModelPath = None,
    name: Annotated[
        str | None, typer.Option(help="The profile's name.", show_default="that of its file")
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(min=_LEAST_TOKENS, help="The longest prompt and the longest swapped stream."),
    ] = 8192,
    repeats: Annotated[
        int, typer.Option(min=1, help="How often each is measured; the median counts.")
    ] = 3,
    host_memory_gb: Annotated[
        float, typer.Option(min=0.001, help="GiB of host memory that swaps may take, of each GPU.")
    ] = 8.0,
    seed: Annotated[int, typer.Option(help="Of all prompts.")] = 0,
) -> None:
    """Measure what this machine takes with a model on it, and write a profile.

    With a profile, workers know from the start how long a pass may be and
    which streams to swap rather than to compute again:

      sglang-stream calibrate --model-path ./model --tp 2 --out mine.json

      sglang-stream serve --model-path ./model --tp 2 --profile mine.json

    Flags that are not listed here go to SGLang: give those that you serve with.

    A worker is started twice. The first one, behind a router, computes prompts
    of many sizes ([bold]prefill[/]: seconds by new and cached tokens), answers
    short requests one by one, at once and after rests of up to 3 s ([bold]call[/]:
    seconds beyond the forward; [bold]rests[/]: what both take more after one), and
    1, 4 and 8 together ([bold]decode[/]: seconds of a step). The second one has a
    KV pool that open streams fill, so that each ordinary request pushes one
    out to host memory ([bold]swaps[/]: seconds by tokens, each way).

    Use an otherwise idle machine. On a GPU it is a few minutes, most of
    them the two starts; on two CPU cores with the small model some more.
    A quick try:

      sglang-stream calibrate --max-tokens 1024 --repeats 1 --out try.json
    """
    console = display.console()
    if out.suffix != ".json":
        raise InvalidRequest(f"--out {out}: a profile is a file .json", param="--out")
    model = model_path or default_model()
    flags = [*_FLAGS, *([] if model_path else ["--dtype", "float32"]), *ctx.args]
    settings = Settings(model, flags, max_tokens, repeats, seed, host_memory_gb)
    file = RowFile(out.with_suffix(".samples.jsonl"))
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        file.add(row)

    add(manifest(model, flags, seed))
    with display.progress() as progress:
        step = progress.add_task("starting a worker", total=None)
        page = _measure_work(settings, progress, step, add)
        _measure_swaps(settings, page, progress, step, add)
    profile = make_profile(rows, name or out.stem, file.path.name)
    out.write_text(profile.to_json())
    console.print(report.table(rows, profile))
    console.print(f"The profile is {out}: use it with --profile {out}", soft_wrap=True)
    plot = out.with_suffix(_PLOT)
    try:
        report.save_plot(rows, profile, plot)
    except ImportError:
        console.print('No plot: it needs pip install "sglang-stream\\[bench]"', soft_wrap=True)
    else:
        console.print(f"Measured against fitted, as a plot: {plot}", soft_wrap=True)


def _measure_work(settings: Settings, progress: Progress, step: TaskID, add: Add) -> int:
    """Prefill, calls and decode, on a worker as it is served. Returns the page size of its KV."""
    with (
        running_server(settings.model_path, settings.flags) as router_url,
        closing(_only_worker(router_url)) as worker,
    ):
        add(worker.row())
        least = measure.least_limit(worker.page_size)
        if settings.limit < least:
            raise InvalidRequest(
                f"--max-tokens {settings.limit}: with pages of {worker.page_size} tokens give "
                f"{least} at least",
                param="--max-tokens",
            )
        total = settings.repeats * measure.count_cells(settings.limit, worker.page_size)
        progress.reset(step, description="prefill", total=total)

        def advance() -> None:
            progress.advance(step)

        common = (settings.limit, settings.repeats, settings.seed, add, advance)
        measure.measure_prefill(worker, *common)
        progress.update(step, description="calls")
        measure.measure_calls(router_url, worker, *common[1:])
        progress.update(step, description="decode")
        asyncio.run(measure.measure_decode(worker.url, *common))
        return worker.page_size


def _only_worker(router_url: str) -> MeasuredWorker:
    """The worker behind the router. Raises InvalidRequest if flags have started several."""
    with closing(DirectHttp(router_url)) as router:
        workers = router.call("GET", "/workers")["workers"]
    if len(workers) != 1:
        raise InvalidRequest(
            f"one worker is measured, and the flags start {len(workers)}: leave --workers, "
            "--prefill-workers and --decode-workers away"
        )
    return MeasuredWorker(workers[0]["url"])


def _measure_swaps(
    settings: Settings, page: int, progress: Progress, step: TaskID, add: Add
) -> None:
    """Swaps, on a worker whose pool the streams fill."""
    progress.reset(step, description="starting a worker with a small pool", total=None)
    flags = ["--preemption", "swap", "--stream-policy", "fcfs"]
    flags += ["--stream-host-memory-gb", str(settings.host_memory_gb)]
    flags += ["--max-total-tokens", str(measure.pool_for_swaps(settings.limit, page))]
    with (
        running_sglang(settings.model_path, [*settings.flags, *flags], streams=True) as url,
        closing(MeasuredWorker(url)) as worker,
    ):
        total = settings.repeats * len(measure.swap_sizes(settings.limit, page))
        progress.reset(step, description="swaps", total=total)
        measure.measure_swaps(
            worker,
            settings.limit,
            settings.repeats,
            settings.seed,
            add,
            lambda: progress.advance(step),
        )
        progress.update(step, description="stopping the worker")
