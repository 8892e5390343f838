"""Real workers for tests: SGLang on the CPU with the small model, and a plain client for them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import zmq

from sglang_stream import messages as m
from sglang_stream.config import ENGINE_VARIABLE, EngineConfig
from sglang_stream.engine.cpu.tiny_model import default_tiny_model
from sglang_stream.errors import StreamError, StreamNotFound, StreamSealed, from_fields
from sglang_stream.policy.types import Invalidation, PolicyName, Preemption
from sglang_stream.ports import choose_port

START_TIMEOUT_S = 180


def wait_until(condition: Any, timeout_s: float, what: str, step_s: float = 0.02) -> Any:
    """Polls until `condition()` is truthy and returns it; fails with `what` after the time-out."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(step_s)


@dataclass
class Generation:
    """One answer of a worker's `/generate`."""

    tokens: list[int]
    text: str
    meta: dict[str, Any]
    error: StreamError | None = None


@dataclass
class Worker:
    """A running worker process group and a chunk socket to it."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    http: httpx.Client
    socket: Any = None
    endpoint: str = ""
    opened: list[str] = field(default_factory=list)
    reports: list[m.Report] = field(default_factory=list)
    _calls: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def connect(self) -> None:
        state = self.http.get("/get_server_info").json()["internal_states"][0]["sglang_stream"]
        self.endpoint = state["endpoint"]
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(self.endpoint)

    def send(self, question: m.Question) -> bytes:
        call_id = next(self._calls).to_bytes(8, "big")
        self.socket.send_multipart([call_id, m.encode(question)])
        return call_id

    def receive(self, timeout_s: float = 60) -> tuple[bytes, m.Answer]:
        while True:
            what = f"no answer on the chunk socket; see {self.log}"
            assert self.socket.poll(timeout_s * 1000), what
            call_id, payload = self.socket.recv_multipart()
            said = m.decode_said(payload)
            if not isinstance(said, m.Report):
                return call_id, said
            self.reports.append(said)

    def ask(self, question: m.Question, timeout_s: float = 60) -> Any:
        """Sends one question and returns its answer. Raises the error of a refusal."""
        call_id = self.send(question)
        answered, answer = self.receive(timeout_s)
        assert answered == call_id
        if isinstance(answer, m.Refused):
            raise from_fields(
                {
                    "code": answer.code,
                    "message": answer.message,
                    "param": answer.param,
                    "expected_seq": answer.expected_seq,
                    "retry_after": answer.retry_after,
                }
            )
        return answer

    def open(self, mode: m.Mode, opening: Sequence[int] = (), idle_timeout_s: float = 600) -> str:
        stream_id = f"st-{uuid.uuid4().hex}"
        self.ask(m.Open(stream_id, mode, m.pack_tokens(opening), idle_timeout_s))
        self.opened.append(stream_id)
        return stream_id

    def append(self, stream_id: str, seq: int, tokens: Sequence[int]) -> m.Accepted:
        raw = m.pack_tokens(tokens)
        return self.ask(m.Append(stream_id, seq, raw, m.digest(raw)))

    def update(self, stream_id: str, seq: int, tokens: Sequence[int]) -> m.Accepted:
        raw = m.pack_tokens(tokens)
        return self.ask(m.Update(stream_id, seq, raw, m.digest(raw)))

    def status(self, stream_id: str) -> m.Status:
        return self.ask(m.Query(stream_id))

    def abort(self, stream_id: str) -> m.Accepted:
        return self.ask(m.Abort(stream_id))

    def configure(
        self, policy: PolicyName, preemption: Preemption, invalidation: Invalidation
    ) -> m.Accepted:
        return self.ask(m.Configure(policy, preemption, invalidation))

    def metric(self, name: str) -> float:
        """The sum of the samples of `sglang_stream_*` metrics whose name and labels begin so."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(x.split()[-1]) for x in lines if x.startswith(f"sglang_stream_{name}"))

    def idle(self, stream_id: str, computed: int) -> m.Status:
        """Waits until `computed` tokens of the stream were computed in passes."""
        return wait_until(
            lambda: (s := self.status(stream_id)).usage.computed_tokens >= computed and s,
            120,
            f"{computed} tokens of {stream_id} computed",
        )

    def body(
        self, stream_id: str, tail: Sequence[int], max_new: int, last_seq: int | None, **params: Any
    ) -> dict[str, Any]:
        seal = m.SealCall(stream_id, last_seq, list(tail))
        return {
            "input_ids": [0],
            "rid": uuid.uuid4().hex,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": max_new,
                "ignore_eos": True,
                "custom_params": seal.to_custom_params(),
                **params,
            },
        }

    def seal(
        self,
        stream_id: str,
        tail: Sequence[int] = (),
        max_new: int = 8,
        last_seq: int | None = None,
        **params: Any,
    ) -> Generation:
        """Seals a stream and returns its greedy answer. Raises the error of a refusal."""
        answer = self.generate(self.body(stream_id, tail, max_new, last_seq, **params))
        if answer.error is not None:
            raise answer.error
        return answer

    def generate(self, body: dict[str, Any]) -> Generation:
        """Reads a whole answer. Always streamed: only so do the reasons of a refusal come back."""
        with self.http.stream("POST", "/generate", json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            events = [
                json.loads(line[6:])
                for line in response.iter_lines()
                if line.startswith("data: ") and line != "data: [DONE]"
            ]
        tokens = events[-1].get("output_ids", [])
        meta = events[-1].get("meta_info", {})
        reason = (meta.get("finish_reason") or {}).get("sglang_stream_error")
        error = from_fields(json.loads(reason)) if reason else None
        assert "error" not in events[-1], events[-1]
        return Generation(tokens, events[-1].get("text", ""), meta, error)

    def cold(self, tokens: Sequence[int], max_new: int = 8) -> Generation:
        """The same prompt as one ordinary request that can use nothing cached."""
        answer = self.generate(
            {
                "input_ids": list(tokens),
                "extra_key": uuid.uuid4().hex,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": max_new,
                    "ignore_eos": True,
                },
            }
        )
        assert answer.meta["cached_tokens"] == 0
        return answer

    def flush(self) -> None:
        """Ends all streams of this client and empties the cache."""
        for stream_id in self.opened:
            with contextlib.suppress(StreamNotFound, StreamSealed):
                self.abort(stream_id)
        self.opened.clear()
        response = self.http.post("/flush_cache", params={"timeout": 60})
        assert response.status_code == 200, response.text

    def assert_healthy(self) -> None:
        """The process lives and SGLang's memory checks have found nothing."""
        assert self.process.poll() is None, self.tail()
        text = self.log.read_text(errors="replace")
        for word in ("leak detected", "Traceback", "Scheduler hit an exception"):
            assert word not in text, f"{word!r} in the log:\n{self.tail(25)}"

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.http.close()
        if self.socket is not None:
            self.socket.close()


@contextlib.contextmanager
def running_worker(
    log: Path, *flags: str, config: EngineConfig | None = None, streams: bool = True, **env: str
) -> Iterator[Worker]:
    """A worker on a free port, float32 so that its tokens can be compared exactly."""
    port = choose_port()
    command = [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", str(default_tiny_model()), "--port", str(port)),
        *("--device", "cpu", "--dtype", "float32", "--sleep-on-idle", "--enable-metrics"),
        *(flags if "--max-total-tokens" in flags else ("--max-total-tokens", "100000", *flags)),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        **env,
    }
    if streams:
        environment[ENGINE_VARIABLE] = (config or EngineConfig()).to_json()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    worker = Worker(process, url, log, httpx.Client(base_url=url, timeout=300))
    try:
        wait_until(lambda: _ready(worker), START_TIMEOUT_S, f"worker ready, see {log}", 0.2)
        if streams:
            worker.connect()
        yield worker
    finally:
        worker.stop()


def _ready(worker: Worker) -> bool:
    assert worker.process.poll() is None, f"the worker ended:\n{worker.tail()}"
    try:
        return worker.http.get("/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
