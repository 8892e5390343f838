"""`sglang-stream serve`: workers and the router in front of them, on one machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sglang_stream.cli.addresses import WORKER_FLAGS
from sglang_stream.cli.processes import Service, supervise
from sglang_stream.cli.worker import gives, worker_command
from sglang_stream.config import EngineConfig, RouterConfig, WorkerAddress
from sglang_stream.errors import InvalidRequest
from sglang_stream.messages import Role
from sglang_stream.ports import choose_port, reachable_url

# SGLang looks for its SIGTERM every 5 s and then gives its schedulers 15 s to end.
WORKER_GRACE_S = 30.0
# The router lets answers that are being written end for 30 s, then ends by itself.
ROUTER_GRACE_S = 40.0
# SGLang's flags that change how its server is reached, which between the two is our affair.
REFUSED_FLAGS = ("--api-key", "--admin-api-key", "--ssl-keyfile", "--ssl-certfile")


# Settings that no process list must show.
IN_ENVIRONMENT = ("secret", "admin_api_key")
TP_FLAGS = ("--tp", "--tp-size", "--tensor-parallel-size")


@dataclass(frozen=True)
class ServePlan:
    """What `serve` was asked for. `router.workers` is where the workers will listen."""

    model_path: str
    engine: EngineConfig
    router: RouterConfig
    sglang_flags: Sequence[str]
    worker_log: Path
    start_timeout_s: float


def plan_workers(unified: int, prefill: int, decode: int) -> tuple[WorkerAddress, ...]:
    """Addresses on this machine for so many workers of each role; `unified` counts only where
    none is apart. Raises InvalidRequest."""
    if bool(prefill) != bool(decode):
        raise InvalidRequest("--prefill-workers and --decode-workers need each other: give both")
    prefilling: list[Role] = ["prefill"] * prefill
    decoding: list[Role] = ["decode"] * decode
    together: list[Role] = ["unified"] * unified
    return tuple(
        WorkerAddress(
            f"http://127.0.0.1:{choose_port()}", role, choose_port() if role == "prefill" else None
        )
        for role in [*prefilling, *decoding] or together
    )


def services(plan: ServePlan, environment: Mapping[str, str]) -> list[Service]:
    """The workers and the router of `plan`, in the order in which they start.

    Raises InvalidRequest for a flag of SGLang that cannot be used here.
    """
    for flag in REFUSED_FLAGS:
        if gives(plan.sglang_flags, flag):
            raise InvalidRequest(
                f"{flag} is not supported by serve: its worker is reached from this machine only, "
                "so protect the router's address instead",
                param=flag,
            )
    workers = [
        _worker(plan, environment, address, number)
        for number, address in enumerate(plan.router.workers)
    ]
    router = Service(
        "router",
        router_command(plan.router),
        f"{reachable_url(plan.router.host, plan.router.port)}/readiness",
        grace_s=ROUTER_GRACE_S,
    )
    return [*workers, router]


def _worker(
    plan: ServePlan, environment: Mapping[str, str], address: WorkerAddress, number: int
) -> Service:
    role = address.role or "unified"
    several = len(plan.router.workers) > 1
    host, _, port = address.url.removeprefix("http://").rpartition(":")
    flags = ["--host", host, "--port", port]
    if address.bootstrap_port is not None:
        flags += ["--disaggregation-bootstrap-port", str(address.bootstrap_port)]
    if several and not gives(plan.sglang_flags, "--base-gpu-id"):
        flags += ["--base-gpu-id", str(number * _tensor_parallel(plan.sglang_flags))]
    argv, additions = worker_command(
        plan.model_path, plan.engine, [*flags, *plan.sglang_flags], role=role
    )
    name = f"{role} worker {number + 1}" if several else "worker"
    log = plan.worker_log
    return Service(
        name,
        argv,
        f"{address.url}/health",
        env={**environment, **additions},
        log=log.with_stem(f"{log.stem}-{role}-{number + 1}") if several else log,
        grace_s=WORKER_GRACE_S,
        spare=several,
    )


def _tensor_parallel(flags: Sequence[str]) -> int:
    """GPUs of one worker, by SGLang's flag."""
    for flag, value in zip(flags, [*flags[1:], ""], strict=True):
        name, _, joined = flag.partition("=")
        given = joined or value
        if name in TP_FLAGS and given.isdigit():
            return int(given)
    return 1


def router_command(config: RouterConfig) -> list[str]:
    """The command line of `sglang-stream router` with these settings, but for the secret ones,
    which go by the environment."""
    argv = [sys.executable, "-m", "sglang_stream.cli", "router"]
    for name, value in msgspec.structs.asdict(config).items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("workers", *IN_ENVIRONMENT) or value is None:
            continue
        if isinstance(value, bool):
            argv += [flag] * value
        else:
            argv += [flag, str(value)]
    for address in config.workers:
        argv += [WORKER_FLAGS[address.role or "unified"], address.url]
        if address.bootstrap_port is not None:
            argv.append(str(address.bootstrap_port))
    return argv


async def serve(plan: ServePlan, environment: Mapping[str, str]) -> None:
    """Serves until a signal asks to stop. Raises as `services` and `supervise` do."""
    needed = services(plan, environment)
    console = Console(stderr=True, highlight=False)
    logs = [str(service.log) for service in needed if service.log is not None]
    whose = "The workers' logs are" if len(logs) > 1 else "The worker's log is"
    console.print(whose, *logs, soft_wrap=True)
    with _steps(console) as steps:

        def announce() -> None:
            steps.clear()
            print(ready_text(plan.router), flush=True)

        await supervise(
            needed,
            start_timeout_s=plan.start_timeout_s,
            say=steps.say,
            on_ready=announce,
        )


def ready_text(router: RouterConfig) -> str:
    """What a person reads when everything runs: the address and a first call to try."""
    url = reachable_url(router.host, router.port)
    header = "-H 'Content-Type: application/json'"
    return "\n".join(
        (
            f"Ready at {url}. Open a stream:",
            f"""  curl {url}/v1/streams {header} -d '{{"mode": "append", "prompt": "Pages:"}}'""",
            "send what is retrieved, while it is, to /v1/streams/ID/chunks, then ask:",
            f"""  curl {url}/v1/streams/ID/chunks {header} -d '{{"seq": 1, "chunks": ["..."]}}'""",
            f"""  curl -N {url}/v1/streams/ID/generate {header} """
            """-d '{"question": "...", "max_tokens": 64, "stream": true}'""",
            "OpenAI's /v1/chat/completions and /v1/completions are there too. Ctrl-C stops.",
        )
    )


class _Steps:
    """Shows one step at a time: on a terminal a spinner with its seconds, else plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)

    def say(self, step: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"{time.monotonic() - self._began:6.1f} s  {step}", soft_wrap=True)
            return
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.add_task(step, total=None)
        self._progress.start()

    def clear(self) -> None:
        if self._console.is_terminal:
            self._progress.stop()


@contextmanager
def _steps(console: Console) -> Iterator[_Steps]:
    steps = _Steps(console)
    try:
        yield steps
    finally:
        steps.clear()
