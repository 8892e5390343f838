"""`sglang-stream serve`: one worker and the router in front of it."""

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

from sglang_stream.cli.ports import reachable_url
from sglang_stream.cli.processes import Service, supervise
from sglang_stream.cli.worker import gives, worker_command
from sglang_stream.config import EngineConfig, RouterConfig
from sglang_stream.errors import InvalidRequest

# SGLang looks for its SIGTERM every 5 s and then gives its schedulers 15 s to end.
WORKER_GRACE_S = 30.0
# The router lets answers that are being written end for 30 s, then ends by itself.
ROUTER_GRACE_S = 40.0
# SGLang's flags that change how its server is reached, which between the two is our affair.
REFUSED_FLAGS = ("--api-key", "--admin-api-key", "--ssl-keyfile", "--ssl-certfile")


@dataclass(frozen=True)
class ServePlan:
    """What `serve` was asked for. `router.worker_url` is where the worker will listen."""

    model_path: str
    engine: EngineConfig
    router: RouterConfig
    sglang_flags: Sequence[str]
    worker_log: Path
    start_timeout_s: float


def services(plan: ServePlan, environment: Mapping[str, str]) -> list[Service]:
    """The worker and the router of `plan`, in the order in which they start.

    Raises InvalidRequest for a flag of SGLang that cannot be used here.
    """
    for flag in REFUSED_FLAGS:
        if gives(plan.sglang_flags, flag):
            raise InvalidRequest(
                f"{flag} is not supported by serve: its worker is reached from this machine only, "
                "so protect the router's address instead",
                param=flag,
            )
    host, _, port = plan.router.worker_url.removeprefix("http://").rpartition(":")
    argv, additions = worker_command(
        plan.model_path, plan.engine, ["--host", host, "--port", port, *plan.sglang_flags]
    )
    worker = Service(
        "worker",
        argv,
        f"{plan.router.worker_url}/health",
        env={**environment, **additions},
        log=plan.worker_log,
        grace_s=WORKER_GRACE_S,
    )
    router = Service(
        "router",
        router_command(plan.router),
        f"{reachable_url(plan.router.host, plan.router.port)}/readiness",
        grace_s=ROUTER_GRACE_S,
    )
    return [worker, router]


def router_command(config: RouterConfig) -> list[str]:
    """The command line of `sglang-stream router` with these settings."""
    argv = [sys.executable, "-m", "sglang_stream.cli", "router"]
    for name, value in msgspec.structs.asdict(config).items():
        flag = "--worker" if name == "worker_url" else f"--{name.replace('_', '-')}"
        argv += [flag, str(value)]
    return argv


async def serve(plan: ServePlan, environment: Mapping[str, str]) -> None:
    """Serves until a signal asks to stop. Raises as `services` and `supervise` do."""
    needed = services(plan, environment)
    console = Console(stderr=True, highlight=False)
    console.print(f"The worker's log is {plan.worker_log}", soft_wrap=True)
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
