"""Prefill and decode workers, routers and nginx as processes, and what can befall them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sglang_stream.engine.cpu.tiny_model import default_tiny_model
from sglang_stream.messages import Role
from sglang_stream.ports import choose_port
from tests.harness import wait_until

START_TIMEOUT_S = 180
SECRET = "a secret of the tests"
REPEATS = [pytest.param(0, id="once")] + [  # of a test in which a process is killed or stopped
    pytest.param(i, id=f"again-{i}", marks=pytest.mark.long) for i in range(1, 5)
]
KILLED_S, STOPPED_S = 5.0, 10.0  # to the first right token, besides the replay's prefill
BAD_WORDS = ("leak detected", "Scheduler hit an exception", "Traceback (most recent call last)")


@dataclass
class Process:
    """A process group with a log."""

    name: str
    command: list[str]
    url: str
    log: Path
    env: dict[str, str]
    health: str
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        wait_until(self._ready, START_TIMEOUT_S, f"{self.name} ready, see {self.log}", 0.1)

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Ends it at once, if it runs."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} ended:\n{self.text()[-3000:]}"
        try:
            return httpx.get(f"{self.url}{self.health}", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


@dataclass
class WorkerProcess(Process):
    role: Role = "unified"
    bootstrap_port: int = 0

    def scheduler(self) -> psutil.Process:
        """The process of its scheduler alone."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if "scheduler" in " ".join(child.cmdline()) or "scheduler" in child.name():
                return child
        raise AssertionError(f"{self.name} has no scheduler process")

    def flags(self) -> list[str]:
        """How a router is told of it."""
        if self.role == "prefill":
            return ["--prefill", self.url, str(self.bootstrap_port)]
        return ["--decode" if self.role == "decode" else "--worker", self.url]

    def assert_quiet(self) -> None:
        """SGLang's checks have found nothing."""
        for word in BAD_WORDS:
            assert word not in self.text(), f"{word!r} in the log of {self.name}: {self.log}"


def worker_process(role: Role, folder: Path, name: str, *flags: str) -> WorkerProcess:
    port, bootstrap = choose_port(), choose_port()
    command = [
        *(sys.executable, "-m", "sglang_stream.cli", "worker", "--role", role),
        *("--model-path", str(default_tiny_model()), "--port", str(port)),
        *("--dtype", "float32", "--enable-metrics", "--max-total-tokens", "60000"),
        *(("--disaggregation-bootstrap-port", str(bootstrap)) if role == "prefill" else ()),
        *flags,
    ]
    env = {
        "OMP_NUM_THREADS": "1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        "SGLANG_STREAM_SECRET": SECRET,
    }
    return WorkerProcess(
        name,
        command,
        f"http://127.0.0.1:{port}",
        folder / f"{name}.log",
        env,
        "/health",
        role=role,
        bootstrap_port=bootstrap,
    )


def router_process(
    workers: Sequence[WorkerProcess], folder: Path, name: str, *flags: str
) -> Process:
    port = choose_port()
    command = [
        *(sys.executable, "-m", "sglang_stream.cli", "router", "--port", str(port)),
        *(flag for worker in workers for flag in worker.flags()),
        *flags,
    ]
    url = f"http://127.0.0.1:{port}"
    env = {"SGLANG_STREAM_SECRET": SECRET}
    return Process(name, command, url, folder / f"{name}.log", env, "/readiness")


@dataclass
class ClusterProcesses:
    """Workers and routers that run; `http`: a client of the first router."""

    workers: list[WorkerProcess]
    routers: list[Process]
    folder: Path
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.routers[0].url, timeout=120)

    def worker(self, url: str) -> WorkerProcess:
        return next(w for w in self.workers if w.url == url)

    def of_role(self, role: Role) -> list[WorkerProcess]:
        return [w for w in self.workers if w.role == role]

    def listed(self, worker: WorkerProcess) -> dict[str, Any]:
        """A worker as the router sees it."""
        workers = self.http.get("/workers").json()["workers"]
        return next(w for w in workers if w["url"] == worker.url)

    def counted(self, name: str, **labels: str) -> float:
        """A counter of the first router."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = (sample for family in families for sample in family.samples)
        return sum(s.value for s in samples if s.name == name and s.labels == labels)

    def flush(self) -> None:
        """Ends all streams and empties all caches."""
        for router in self.routers:
            with httpx.Client(base_url=router.url, timeout=60) as http:
                for stream in http.get("/v1/streams").json()["data"]:
                    http.delete(f"/v1/streams/{stream['id']}")
        answer = self.http.post("/flush_cache?timeout=60")
        assert answer.status_code == 200, answer.text

    def heal(self) -> None:
        """Starts what has been killed, and waits until the routers know."""
        ended = [p for p in (*self.workers, *self.routers) if p.process is None]
        for process in ended:
            process.start()
        for process in (*self.workers, *self.routers):
            process.wait_ready()
        for worker in self.workers:
            wait_until(
                lambda w=worker: self.listed(w)["healthy"], START_TIMEOUT_S, f"{worker.name} used"
            )


@contextlib.contextmanager
def running_cluster(
    folder: Path,
    roles: Sequence[Role],
    *flags: str,
    routers: int = 1,
    router_flags: Sequence[str] = (),
) -> Iterator[ClusterProcesses]:
    """A worker for each of `roles`, and routers in front of them; `flags` go to the workers."""
    workers = [worker_process(role, folder, f"{role}-{i}", *flags) for i, role in enumerate(roles)]
    fronts = [router_process(workers, folder, f"router-{i}", *router_flags) for i in range(routers)]
    cluster = ClusterProcesses(workers, fronts, folder)
    try:
        for worker in workers:
            worker.start()
        for front in fronts:
            front.start()
        cluster.heal()
        yield cluster
    finally:
        cluster.http.close()
        for process in (*fronts, *workers):
            process.kill()
