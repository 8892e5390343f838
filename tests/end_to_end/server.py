"""`sglang-stream serve` with the small model, and what tests do with it over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from sglang_stream.engine.cpu.tiny_model import default_tiny_model
from sglang_stream.ports import choose_port
from tests.harness import wait_until

CONTEXT = 2048
MAX_OPEN = 12
GRACE_S = 3.0
MAX_BODY = 1 << 20
MAX_CHUNK = 1 << 18
PASS_TOKENS = 128

START_TIMEOUT_S = 180
LEAKS = ("leak detected", "Traceback", "Scheduler hit an exception")


@dataclass(frozen=True)
class Cold:
    """What one ordinary request generates for a prompt of which nothing is cached."""

    text: str
    tokens: list[int]


@dataclass
class Server:
    """A running server, and a client of it that raises nothing for error answers."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    output: Path
    http: httpx.Client

    # --- streams ------------------------------------------------------------------------------

    def open(self, **body: Any) -> str:
        """Opens a stream, append and without an opening unless told otherwise."""
        if not body.keys() & {"messages", "prompt", "input_ids"}:
            body["input_ids"] = []
        answer = self.http.post("/v1/streams", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def append(self, stream: str, seq: int, ids: Sequence[int] | None = None, **body: Any) -> Any:
        if ids is not None:
            body["input_ids"] = list(ids)
        return self.http.post(f"/v1/streams/{stream}/chunks", json={"seq": seq, **body})

    def update(self, stream: str, seq: int, ids: Sequence[int] | None = None, **body: Any) -> Any:
        if ids is not None:
            body["input_ids"] = list(ids)
        return self.http.put(f"/v1/streams/{stream}/context", json={"seq": seq, **body})

    def generate(self, stream: str, max_tokens: int = 8, /, **body: Any) -> httpx.Response:
        """Seals and generates greedily; one whole answer."""
        body = {**greedy(max_tokens), **body}
        return self.http.post(f"/v1/streams/{stream}/generate", json=body)

    def look(self, stream: str) -> httpx.Response:
        return self.http.get(f"/v1/streams/{stream}")

    def delete(self, stream: str) -> httpx.Response:
        return self.http.delete(f"/v1/streams/{stream}")

    def open_streams(self) -> list[dict[str, Any]]:
        return list(self.http.get("/v1/streams").json()["data"])

    def computed(self, stream: str, tokens: int) -> dict[str, Any]:
        """Waits until `tokens` of the stream were computed in passes; its state then."""

        def done() -> dict[str, Any] | None:
            state: dict[str, Any] = ok(self.look(stream))
            return state if state["usage"]["stream"]["computed_tokens"] >= tokens else None

        return dict(wait_until(done, 120, f"{tokens} tokens of {stream} computed"))

    def gone(self, stream: str, timeout_s: float = 30) -> None:
        """Waits until the stream is unknown."""
        wait_until(lambda: self.look(stream).status_code == 404, timeout_s, f"{stream} gone")

    # --- ordinary requests --------------------------------------------------------------------

    def cold(self, prompt: Sequence[int], max_tokens: int = 8) -> Cold:
        """One ordinary greedy request for the same ids, in a cache of its own (a new salt)."""
        body = {"model": "default", "prompt": list(prompt), "cache_salt": uuid.uuid4().hex}
        answer = ok(self.http.post("/v1/completions", json={**body, **greedy(max_tokens)}))
        assert answer["usage"]["prompt_tokens_details"] is None  # SGLang's way to say none cached
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        choice = answer["choices"][0]
        return Cold(choice["text"], choice["token_ids"])

    # --- the processes ------------------------------------------------------------------------

    def worker_metric(self, name: str) -> float:
        """The sum of a metric of the worker, whose address `/workers` tells."""
        worker = self.http.get("/workers").json()["workers"][0]
        return metric(httpx.get(f"{worker['url']}/metrics").text, name)

    def router_metric(self, name: str) -> float:
        return metric(self.http.get("/metrics").text, name)

    def processes(self) -> list[psutil.Process]:
        """The server's process and all below it."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    @contextlib.contextmanager
    def frozen_scheduler(self) -> Iterator[None]:
        """Nothing is scheduled or answered by the engine meanwhile: no first token can come."""
        schedulers = [p for p in self.processes() if p.name().startswith("sglang::sched")]
        assert len(schedulers) == 1, [p.name() for p in self.processes()]
        schedulers[0].suspend()
        try:
            yield
        finally:
            schedulers[0].resume()

    def handled(self) -> None:
        """Returns when the router has read what was sent to it before, and has acted on it.

        Its event loop serves connections in turn and these calls take several turns each.
        """
        for _ in range(3):
            assert httpx.get(f"{self.url}/health").status_code == 200

    def drop_streams(self) -> None:
        for stream in self.open_streams():
            assert self.delete(stream["id"]).status_code in (200, 404)

    def flush(self) -> None:
        """Empties the cache; fails if anything is still being generated."""
        answer = self.http.post("/flush_cache", params={"timeout": 30})
        assert answer.status_code == 200, answer.text

    def assert_healthy(self) -> None:
        """It runs, and neither SGLang's memory checks nor anything else has complained."""
        assert self.process.poll() is None, self.tail()
        for path in (self.log, self.output):
            text = path.read_text(errors="replace")
            for word in LEAKS:
                assert word not in text, f"{word!r} in {path}:\n{self.tail()}"

    def tail(self, lines: int = 40) -> str:
        texts = [p.read_text(errors="replace").splitlines() for p in (self.log, self.output)]
        return "\n".join([*texts[0][-lines:], "--- output:", *texts[1][-lines:]])

    def kill(self) -> None:
        """Ends what is left of it, at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in reversed(self.processes()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        self.http.close()


@dataclass
class Call:
    """A call whose answer is read later, or never: `close` is a client that vanishes."""

    connection: http.client.HTTPConnection
    events: list[dict[str, Any]] = field(default_factory=list)
    _response: http.client.HTTPResponse | None = None

    @property
    def response(self) -> http.client.HTTPResponse:
        if self._response is None:
            self._response = self.connection.getresponse()
        return self._response

    def next_event(self) -> dict[str, Any] | None:
        """The next server-sent event, None at `[DONE]` or the end."""
        assert self.response.status == 200, self.response.read()
        while line := self.response.readline():
            if line.startswith(b"data: [DONE]"):
                return None
            if line.startswith(b"data: "):
                self.events.append(json.loads(line[6:]))
                return self.events[-1]
        return None

    def tokens(self) -> list[int]:
        """All token ids of a streamed answer, read to its end."""
        while self.next_event() is not None:
            pass
        assert "error" not in self.events[-1], self.events[-1]
        return [t for e in self.events for c in e["choices"] for t in c.get("token_ids") or ()]

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Status and body of an answer in one piece."""
        return self.response.status, json.loads(self.response.read())

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self.connection.close()


def begin(server: Server, method: str, path: str, body: dict[str, Any] | None = None) -> Call:
    """Sends a call on a connection of its own and returns when the last byte was sent."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=120)
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json"})
    return Call(connection)


def begin_generate(server: Server, stream: str, max_tokens: int, /, **body: Any) -> Call:
    """Sends a generate call, streamed unless told otherwise."""
    path = f"/v1/streams/{stream}/generate"
    return begin(server, "POST", path, {**greedy(max_tokens), "stream": True, **body})


def greedy(max_tokens: int) -> dict[str, Any]:
    """The sampling fields of all answers that are compared."""
    return {
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def ok(answer: httpx.Response, status: int = 200) -> Any:
    """The body of an answer of that status."""
    assert answer.status_code == status, answer.text
    return answer.json()


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """What stands under "error" in an answer of that status and code, after a look at its shape."""
    assert answer.status_code == status, answer.text
    fields = answer.json()["error"]
    assert fields["code"] == code, fields
    assert fields["message"]
    assert {"type", "param"} <= fields.keys()
    return dict(fields)


def token_ids(answer: httpx.Response) -> list[int]:
    """The ids that a whole answer generated."""
    ids: list[int] = ok(answer)["choices"][0]["token_ids"]
    return ids


def metric(page: str, name: str) -> float:
    """The sum of the samples of a Prometheus page whose name and labels begin with `name`."""
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """`sglang-stream serve` on a free port, float32 so that its tokens can be compared exactly."""
    port = choose_port()
    log, output = folder / "worker.log", folder / "serve.out"
    command = [
        *(sys.executable, "-m", "sglang_stream.cli", "serve"),
        *("--model-path", str(default_tiny_model()), "--port", str(port), "--worker-log", str(log)),
        *("--max-open-streams", str(MAX_OPEN), "--resume-grace-s", str(GRACE_S)),
        *("--max-body-bytes", str(MAX_BODY), "--max-chunk-bytes", str(MAX_CHUNK)),
        *("--stream-pass-tokens", str(PASS_TOKENS)),
        *("--device", "cpu", "--dtype", "float32", "--context-length", str(CONTEXT)),
        *("--max-total-tokens", "30000", "--enable-cache-report", "--enable-metrics"),
        "--sleep-on-idle",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    }
    with output.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, text=True, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    server = Server(process, url, log, output, httpx.Client(base_url=url, timeout=120))
    try:
        wait_until(lambda: _announced(server), START_TIMEOUT_S, f"ready, see {log}", 0.2)
        yield server
    finally:
        server.kill()


def _announced(server: Server) -> bool:
    assert server.process.poll() is None, f"serve ended:\n{server.tail()}"
    return f"Ready at {server.url}." in server.output.read_text()
