"""The command `sglang-stream`.

Only the base packages are imported here, so that `--help` is quick and works without the engine;
a subcommand imports what it needs when it runs. Errors a user can mend end as one line and status
1 (2 for a wrong flag), never as a traceback.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from sglang_stream.cli import options as o
from sglang_stream.cli.addresses import join_bootstrap_ports
from sglang_stream.cli.router_options import OpenStreams, with_router_flags
from sglang_stream.config import SECRET_VARIABLE, EngineConfig, RouterConfig, load_profile
from sglang_stream.errors import InvalidRequest, StreamError, WorkerUnavailable

WITH_SGLANG_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def main() -> None:
    """Runs the command line given to this process."""
    try:
        build_app()(join_bootstrap_ports(sys.argv[1:]))
    except StreamError as e:
        print(f"sglang-stream: {e.message}", file=sys.stderr)
        sys.exit(1)


def build_app() -> typer.Typer:
    """The command with all its subcommands."""
    app = typer.Typer(
        name="sglang-stream",
        help="SGLang serving for prompts whose context is still being retrieved.\n\n"
        "Try it on a small random model, on any machine:  sglang-stream demo\n\n"
        "Serve a model:  sglang-stream serve --model-path Qwen/Qwen2.5-7B-Instruct\n\n"
        "Each command explains itself:  sglang-stream serve --help",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.command("serve", context_settings=WITH_SGLANG_FLAGS)(run_serve)
    app.command("worker", context_settings=WITH_SGLANG_FLAGS)(run_worker)
    app.command("router")(run_router)
    app.command("tiny-model")(tiny_model)
    forwarded = {**WITH_SGLANG_FLAGS, "help_option_names": []}
    app.command(context_settings=forwarded)(demo)
    app.command(context_settings=forwarded)(bench)
    app.command(context_settings=forwarded)(calibrate)
    app.command(context_settings=forwarded)(replay)
    app.command(context_settings=forwarded)(report)
    app.command(context_settings=forwarded)(workload)
    app.command(context_settings=forwarded)(simulate)
    app.command(context_settings=forwarded)(progressive)
    app.command(context_settings=forwarded)(reproduce)
    app.command()(version)
    return app


@with_router_flags
def run_serve(
    ctx: typer.Context,
    model_path: o.ModelPath,
    settings: RouterConfig,
    workers: o.UnifiedWorkers = 1,
    prefill_workers: o.PrefillWorkers = 0,
    decode_workers: o.DecodeWorkers = 0,
    worker_log: o.WorkerLog = None,
    start_timeout_s: o.StartTimeout = 600.0,
    max_prompt_tokens: o.PromptTokens = o.ENGINE.max_prompt_tokens,
    stream_pass_tokens: o.PassTokens = o.ENGINE.pass_tokens,
    stream_policy: o.StreamPolicy = o.ENGINE.policy,
    stream_pass_ms: o.PassMs = None,
    preemption: o.PreemptionKind = o.ENGINE.preemption,
    stream_host_memory_gb: o.HostMemoryGb = o.ENGINE.host_memory_gb,
    invalidation: o.InvalidationKind = o.ENGINE.invalidation,
    profile: o.ProfileName = None,
) -> None:
    """Serve a model: its workers and the router in front of them, until Ctrl-C.

    Flags that are not listed here go to SGLang (python -m sglang.launch_server --help), for each
    of the workers, which take their GPUs one after the other:

      sglang-stream serve --model-path Qwen/Qwen2.5-7B-Instruct

      sglang-stream serve --model-path ./model --port 8000 --tp 2 --mem-fraction-static 0.8

      sglang-stream serve --model-path ./model --prefill-workers 2 --decode-workers 1
    """
    from sglang_stream.cli.serve import ServePlan, plan_workers
    from sglang_stream.cli.serve import serve as run
    from sglang_stream.ports import choose_port, require_free_port

    _require("server", "sglang")
    if (prefill_workers or decode_workers) and not _transfers_otherwise(ctx.args):
        _require("disaggregation", "mooncake")
    _require_model(model_path)
    known = _known(profile)
    port = settings.port or choose_port(settings.host)
    require_free_port(settings.host, port)
    addresses = plan_workers(workers, prefill_workers, decode_workers)
    plan = ServePlan(
        model_path,
        EngineConfig(
            max_streams=settings.max_open_streams,
            max_prompt_tokens=max_prompt_tokens,
            policy=stream_policy,
            pass_tokens=stream_pass_tokens,
            pass_ms=stream_pass_ms or known.pass_ms,
            preemption=preemption,
            host_memory_gb=stream_host_memory_gb,
            invalidation=invalidation,
            cost=known.cost,
            secret=settings.secret,
            served=True,
        ),
        msgspec.structs.replace(settings, port=port, workers=addresses),
        ctx.args,
        _writable(worker_log or Path(tempfile.mkdtemp(prefix="sglang-stream-")) / "worker.log"),
        start_timeout_s,
    )
    asyncio.run(run(plan, os.environ))


def run_worker(
    ctx: typer.Context,
    model_path: o.ModelPath,
    role: o.WorkerRole = "unified",
    stream_host: o.StreamHost = o.ENGINE.host,
    stream_port: o.StreamPort = o.ENGINE.port,
    max_open_streams: OpenStreams = o.ENGINE.max_streams,
    max_prompt_tokens: o.PromptTokens = o.ENGINE.max_prompt_tokens,
    stream_pass_tokens: o.PassTokens = o.ENGINE.pass_tokens,
    stream_policy: o.StreamPolicy = o.ENGINE.policy,
    stream_pass_ms: o.PassMs = None,
    preemption: o.PreemptionKind = o.ENGINE.preemption,
    stream_host_memory_gb: o.HostMemoryGb = o.ENGINE.host_memory_gb,
    invalidation: o.InvalidationKind = o.ENGINE.invalidation,
    profile: o.ProfileName = None,
) -> None:
    """Start a worker alone: SGLang's own server, with stream support.

    Flags that are not listed here go to SGLang (python -m sglang.launch_server --help):

      sglang-stream worker --model-path ./model --port 30001 --tp 2

      sglang-stream worker --role prefill --model-path ./model --disaggregation-bootstrap-port 8998

    Routers and workers that have the same SGLANG_STREAM_SECRET in their environment talk to each
    other only, and encrypted.

    SGLang started by its own command gets stream support from SGLANG_STREAM=1 in its environment.
    """
    from sglang_stream.cli.worker import worker_command

    _require("server", "sglang")
    _require_model(model_path)
    known = _known(profile)
    argv, additions = worker_command(
        model_path,
        EngineConfig(
            host=stream_host,
            port=stream_port,
            max_streams=max_open_streams,
            max_prompt_tokens=max_prompt_tokens,
            policy=stream_policy,
            pass_tokens=stream_pass_tokens,
            pass_ms=stream_pass_ms or known.pass_ms,
            preemption=preemption,
            host_memory_gb=stream_host_memory_gb,
            invalidation=invalidation,
            cost=known.cost,
            secret=os.environ.get(SECRET_VARIABLE),
        ),
        ctx.args,
        role=role,
    )
    os.execve(argv[0], argv, {**os.environ, **additions})


@with_router_flags
def run_router(
    settings: RouterConfig,
    worker: o.WorkerUrls = [],  # noqa: B006
    prefill: o.PrefillUrls = [],  # noqa: B006
    decode: o.DecodeUrls = [],  # noqa: B006
) -> None:
    """Start a router alone, in front of workers that run elsewhere.

      sglang-stream router --worker http://10.0.0.1:30001 --worker http://10.0.0.2:30001

      sglang-stream router --prefill http://10.0.0.1:30001 8998 --decode http://10.0.0.2:30001

    Several routers may share the same workers behind a load balancer.
    """
    from sglang_stream.cli.addresses import worker_addresses
    from sglang_stream.ports import require_free_port

    workers = worker_addresses(worker, prefill, decode)
    require_free_port(settings.host, settings.port)
    _require("server", "fastapi", "uvicorn", "zmq", "transformers")
    from router.server import run

    run(msgspec.structs.replace(settings, workers=workers))


def tiny_model(
    folder: Annotated[Path, typer.Argument(help="Where to write it.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Another seed, other weights.")] = 0,
) -> None:
    """Write a small random Llama (30 M parameters, 32k context) for trials without a GPU.

    sglang-stream tiny-model ./tiny

    sglang-stream serve --model-path ./tiny --dtype float32
    """
    _require("server", "transformers", "torch")
    from sglang_stream.engine.cpu.tiny_model import build_tiny_model

    try:
        print(build_tiny_model(folder, seed=seed))
    except OSError as e:
        raise InvalidRequest(f"{folder} cannot be written ({e.strerror})", param="folder") from e


def demo(ctx: typer.Context) -> None:
    """Crawl pages and ask about them: waiting for all of them, then streaming."""
    _require("server,crawler", "sglang", "trafilatura")
    from experiments.demo.run import main as run

    raise typer.Exit(run(ctx.args))


def bench(ctx: typer.Context) -> None:
    """Measure TTFT, its limit, and ordinary traffic, side by side on the real engine."""
    _require("server", "sglang")
    from experiments.bench.run import main as run

    raise typer.Exit(run(ctx.args))


def calibrate(ctx: typer.Context) -> None:
    """Measure prefill, swaps and decode on this machine, and write its profile."""
    _require("server", "sglang")
    from experiments.calibrate.run import main as run

    raise typer.Exit(run(ctx.args))


def workload(ctx: typer.Context) -> None:
    """Generate queries shaped as the published ones, and compare their percentiles."""
    from experiments.workload.run import main as run

    raise typer.Exit(run(ctx.args))


def replay(ctx: typer.Context) -> None:
    """Replay a workload under every policy of a specification on the real engine."""
    _require("server", "sglang")
    from experiments.replay.run import main as run

    raise typer.Exit(run(ctx.args))


def report(ctx: typer.Context) -> None:
    """Write tables, figures and one page from the rows of replay and simulate."""
    _require("experiments", "matplotlib", "jinja2")
    from experiments.report.run import main as run

    raise typer.Exit(run(ctx.args))


def simulate(ctx: typer.Context) -> None:
    """Simulate an evaluation on a machine's profile, at full scale and without the machine."""
    from experiments.simulate.run import main as run

    raise typer.Exit(run(ctx.args))


def progressive(ctx: typer.Context) -> None:
    """Stream a progressive search over installed documentation into the engine, and measure."""
    _require("server,ann", "sglang", "faiss", "sklearn")
    from experiments.progressive.run import main as run

    raise typer.Exit(run(ctx.args))


def reproduce(ctx: typer.Context) -> None:
    """Run the whole evaluation, simulated at full scale and real at a small one, and report."""
    _require("server,experiments", "sglang", "matplotlib", "jinja2")
    from experiments.reproduce.run import main as run

    raise typer.Exit(run(ctx.args))


def version() -> None:
    """Print the versions of sglang-stream and of the SGLang that it found."""
    try:
        engine = f"SGLang {metadata.version('sglang')}"
    except metadata.PackageNotFoundError:
        engine = "SGLang is not installed"
    print(f"sglang-stream {metadata.version('sglang-stream')} ({engine})")


def _known(profile: str | None) -> EngineConfig:
    """The engine's defaults with what the profile of that name or file says."""
    if profile is None:
        return o.ENGINE
    loaded = load_profile(profile)
    return msgspec.structs.replace(o.ENGINE, pass_ms=loaded.pass_ms.value, cost=loaded.cost)


def _require(extra: str, *packages: str) -> None:
    """Raises WorkerUnavailable if a package is missing, naming the extra that brings it."""
    for package in packages:
        if util.find_spec(package) is None:
            raise WorkerUnavailable(
                f'this needs the package {package}: pip install "sglang-stream[{extra}]"'
            )


def _transfers_otherwise(flags: Sequence[str]) -> bool:
    """Whether SGLang is told how KV migrates; else it is by Mooncake."""
    return any(flag.startswith("--disaggregation-transfer-backend") for flag in flags)


def _require_model(path: str) -> None:
    """Raises at once what the worker would find only after loading SGLang for ten seconds."""
    is_folder = path.startswith(("/", "./", "../", "~"))
    if is_folder and not Path(path).expanduser().exists():
        raise InvalidRequest(f"--model-path {path}: there is no such folder")


def _writable(log: Path) -> Path:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("ab").close()
    except OSError as e:
        raise InvalidRequest(f"--worker-log {log}: {e.strerror}", param="--worker-log") from e
    return log
