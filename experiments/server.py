"""A server of our own for a measurement: `sglang-stream serve` as a child process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from sglang_stream.errors import WorkerUnavailable

_POLL_S = 0.25
_STOP_S = 60.0


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


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
    Raises WorkerUnavailable with the last lines of its output if it does not start.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "sglang_stream.cli", "serve"]
    command += ["--model-path", str(model_path), "--port", str(port), *flags]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=_environment())
        try:
            started = time.monotonic()
            while not _is_ready(url):
                passed = time.monotonic() - started
                if process.poll() is not None or passed > start_timeout_s:
                    output.seek(0)
                    lines = output.read().splitlines()[-30:]
                    raise WorkerUnavailable("the server did not start:\n" + "\n".join(lines))
                waiting(passed)
                time.sleep(_POLL_S)
            yield url
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    """Several threads of several processes on few cores get in each other's way; one is steady."""
    return {"OMP_NUM_THREADS": "1", **os.environ}


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readiness", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
