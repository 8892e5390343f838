"""The router as a process of its own: how it starts and how it stops."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.router.conftest import opened, until
from tests.router.fake_worker import FakeWorker

PROGRAM = """
import sys
from router.server import run
from sglang_stream.config import RouterConfig, WorkerAddress
run(RouterConfig((WorkerAddress(sys.argv[1]),), port=int(sys.argv[2])))
print("returned")
"""


@contextmanager
def router_process(worker_url: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", PROGRAM, worker_url, str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readiness").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_running_answers_end(
    worker: FakeWorker, worker_url: str, number: signal.Signals
) -> None:
    worker.gates = {1: threading.Event()}
    with router_process(worker_url) as (process, client):
        until(lambda: is_ready(client), timeout_s=60)
        url = f"/v1/streams/{opened(client)}/generate"
        with client.stream("POST", url, json={"stream": True}) as answer:
            lines = answer.iter_lines()
            assert "Hel" in next(lines)
            process.send_signal(number)
            until(lambda: not is_ready(httpx.Client(base_url=client.base_url)))
            worker.gates[1].set()
            assert "data: [DONE]" in list(lines)
        output, _ = process.communicate(timeout=20)
        assert (process.returncode, output) == (0, "returned\n")
