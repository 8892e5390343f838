"""nginx's configuration: its numbers always, its behaviour where nginx is installed."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from router.server import KEEP_ALIVE_S
from sglang_stream.config import RouterConfig
from tests.docker.files import exposed
from tests.docker.nginx import SITE, nginx_program, running_nginx

real_nginx = pytest.mark.skipif(nginx_program() is None, reason="nginx is not installed")
CHUNKS = "/v1/streams/st-1/chunks"


def test_limits_are_those_of_the_routers() -> None:
    text = SITE.read_text()
    ports = {int(port) for port in re.findall(r"server router-\d:(\d+)", text)}
    assert ports == exposed("router")
    [mebibytes] = re.findall(r"client_max_body_size (\d+)m;", text)
    assert int(mebibytes) << 20 > RouterConfig().max_body_bytes
    [read_s] = re.findall(r"proxy_read_timeout (\d+)s;", text)
    assert int(read_s) >= RouterConfig().max_idle_timeout_s
    assert "proxy_buffering off;" in text, "a slow client's answers would go to nginx's disk"
    assert KEEP_ALIVE_S > 60, "nginx would reuse connections that a router has closed"


class FakeRouter:
    """Answers with its name and what it got. `release` lets the second half of an SSE answer go."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.release = threading.Event()
        routes = [
            Route("/v1/streams/{id}/generate", self.generate, methods=["POST"]),
            Route("/{path:path}", self.echo, methods=["GET", "POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="warning")
        self.server = uvicorn.Server(config)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self._thread.start()

    async def echo(self, request: Request) -> Response:
        received = len(await request.body())
        return JSONResponse({"router": self.name, "bytes": received})

    async def generate(self, request: Request) -> Response:
        def events() -> Iterator[bytes]:
            yield b"data: first\n\n"
            assert self.release.wait(30)
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        self.socket.close()


@contextlib.contextmanager
def fake_router(name: str) -> Iterator[FakeRouter]:
    router = FakeRouter(name)
    try:
        yield router
    finally:
        router.stop()


@contextlib.contextmanager
def dropper() -> Iterator[str]:
    """A router that dies on each call after it has received it: its `HOST:PORT`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drop() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)

        threading.Thread(target=drop, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@real_nginx
def test_calls_go_to_both_and_events_are_not_held_back(tmp_path: Path) -> None:
    with (
        fake_router("a") as a,
        fake_router("b") as b,
        running_nginx(tmp_path, [a.address, b.address]) as url,
        httpx.Client(base_url=url, timeout=20) as http,
    ):
        answers = [http.post(CHUNKS, json={"seq": i}).json()["router"] for i in range(4)]
        assert sorted(answers) == ["a", "a", "b", "b"]
        with http.stream("POST", "/v1/streams/st-1/generate", json={}) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "data: first"
            a.release.set()
            b.release.set()
            assert [line for line in lines if line] == ["data: [DONE]"]
        # What a router accepts passes; operators' pages are there for this machine.
        body = bytes(RouterConfig().max_body_bytes)
        assert http.post(CHUNKS, content=body).json()["bytes"] == len(body)
        assert http.get("/metrics").status_code == 200


@real_nginx
def test_a_router_that_is_gone_is_not_noticed(tmp_path: Path) -> None:
    with (
        fake_router("a") as a,
        fake_router("b") as b,
        running_nginx(tmp_path, [a.address, b.address]) as url,
        httpx.Client(base_url=url, timeout=20) as http,
    ):
        assert http.post(CHUNKS, json={}).status_code == 200
        a.stop()
        for path in (CHUNKS, "/v1/streams", "/v1/chat/completions", "/v1/models"):
            answers = [http.post(path, json={"x": "y"}) for _ in range(4)]
            assert [answer.json().get("router") for answer in answers] == ["b"] * 4
        b.stop()
        refusal = http.post(CHUNKS, json={})
        assert refusal.status_code == 503
        assert refusal.headers["retry-after"] == "1"
        assert refusal.json()["error"]["code"] == "worker_unavailable"


@real_nginx
@pytest.mark.parametrize(("path", "status"), [(CHUNKS, 200), ("/v1/chat/completions", 503)])
def test_only_calls_that_bear_it_are_sent_twice(tmp_path: Path, path: str, status: int) -> None:
    with (
        dropper() as dying,
        fake_router("b") as b,
        running_nginx(tmp_path, [dying, b.address]) as url,
    ):
        assert httpx.post(f"{url}{path}", json={}, timeout=20).status_code == status
