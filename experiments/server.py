"""Servers for a measurement, as child processes: ours, or SGLang alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from sglang_stream.config import ENGINE_VARIABLE
from sglang_stream.errors import WorkerUnavailable
from sglang_stream.ports import choose_port

_POLL_S = 0.25
_STOP_S = 60.0


def default_model() -> str:
    """The folder of the small random model, built on first use (in a process of its own: only the
    engine may import torch)."""
    command = [sys.executable, "-m", "sglang_stream.engine.cpu.tiny_model"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().splitlines()[-1]


@contextmanager
def running_server(
    model_path: str | Path,
    flags: Sequence[str] = (),
    *,
    start_timeout_s: float = 600.0,
    waiting: Callable[[float], None] = lambda seconds: None,
) -> Iterator[str]:
    """Starts `sglang-stream serve` and gives its address once it answers.

    `flags` go to `serve`. `waiting` is called with the seconds that have passed, for a display.
    Raises WorkerUnavailable with the last lines of its output if it does not start, and in place of
    another WorkerUnavailable if it has ended meanwhile.
    """
    command = [sys.executable, "-m", "sglang_stream.cli", "serve", "--model-path", str(model_path)]
    with _running(command, flags, "/readiness", start_timeout_s, waiting) as url:
        yield url


@contextmanager
def running_sglang(
    model_path: str | Path,
    flags: Sequence[str] = (),
    *,
    streams: bool,
    start_timeout_s: float = 600.0,
    waiting: Callable[[float], None] = lambda seconds: None,
) -> Iterator[str]:
    """Starts SGLang's own server, without a router, and gives its address once it answers.

    `streams`: with stream support, as `sglang-stream worker` starts it, or as it comes. The rest
    is as for `running_server`.
    """
    ours, plain = ["sglang_stream.cli", "worker"], ["sglang.launch_server"]
    command = [sys.executable, "-m", *(ours if streams else plain), "--model-path", str(model_path)]
    with _running(command, flags, "/health", start_timeout_s, waiting) as url:
        yield url


@dataclass(frozen=True)
class SglangWorker:
    """A worker apart. `bootstrap_port`: of a prefill worker, None for a decode worker."""

    url: str
    bootstrap_port: int | None


@contextmanager
def running_sglang_router(
    workers: Sequence[SglangWorker], *, start_timeout_s: float = 60.0
) -> Iterator[str]:
    """Starts SGLang's own router before `workers` and gives its address once it answers.

    Raises as `running_server` does.
    """
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    flags = ["--host", "127.0.0.1", "--prometheus-port", str(choose_port())]
    for worker in workers:
        if worker.bootstrap_port is None:
            flags += ["--decode", worker.url]
        else:
            flags += ["--prefill", worker.url, str(worker.bootstrap_port)]
    with _running(command, flags, "/readiness", start_timeout_s, lambda _: None) as url:
        yield url


@contextmanager
def _running(
    command: Sequence[str],
    flags: Sequence[str],
    ready_path: str,
    start_timeout_s: float,
    waiting: Callable[[float], None],
) -> Iterator[str]:
    """Runs a server on a free port, in a process group of its own, until it is left."""
    port = choose_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as output, _leaving_on_sigterm():
        process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            stdout=output,
            stderr=output,
            env=_environment(),
            start_new_session=True,
        )
        try:
            started = time.monotonic()
            while not _is_ready(f"{url}{ready_path}"):
                passed = time.monotonic() - started
                if process.poll() is not None or passed > start_timeout_s:
                    raise WorkerUnavailable(f"the server did not start:\n{_last_lines(output)}")
                waiting(passed)
                time.sleep(_POLL_S)
            try:
                yield url
            except WorkerUnavailable as e:
                if process.poll() is None:
                    raise
                ended = f"the server ended with status {process.returncode}"
                raise WorkerUnavailable(f"{ended}:\n{_last_lines(output)}") from e
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_lines(output: IO[str]) -> str:
    output.seek(0)
    return "\n".join(output.read().splitlines()[-30:])


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM leave all contexts, as Ctrl-C does: a server must not outlive us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment() -> dict[str, str]:
    """Several threads of several processes on few cores get in each other's way; one is steady.

    Whether SGLang has stream support is decided by the command alone.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment.pop(ENGINE_VARIABLE, None)
    return environment


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
