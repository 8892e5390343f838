"""A real web server whose pages are written down by each test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ARTICLE = "<p>Prefill computes keys and values for every token of the prompt, once.</p>" * 8


def html(body: str = ARTICLE, title: str = "A title") -> bytes:
    head = f"<!DOCTYPE html><html><head><title>{title}</title></head>"
    return f"{head}<body>{body}</body></html>".encode()


@dataclass
class Reply:
    """One answer. `endless`: the body is repeated until the client goes away."""

    body: bytes = field(default_factory=html)
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/html"})
    endless: bool = False


class Web(ThreadingHTTPServer):
    """Routes from paths to replies; a route may be a function, called in the request's thread."""

    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base = f"http://127.0.0.1:{self.server_port}"
        self.routes: dict[str, Reply | Callable[[], Reply]] = {}
        self.asked: list[str] = []
        self.agents: set[str] = set()
        # A function for a page that never comes sets `waiting` and holds until `release`.
        self.waiting = threading.Semaphore(0)
        self.release = threading.Event()
        self.clients_gone = threading.Semaphore(0)

    def url(self, path: str) -> str:
        return self.base + path

    def redirect(self, path: str, to: str) -> None:
        self.routes[path] = Reply(b"", 302, {"Location": to})

    def never(self) -> Reply:
        self.waiting.release()
        self.release.wait()
        return Reply()


class _Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.agents.add(self.headers["User-Agent"])
        found = self.server.routes.get(self.path, Reply(b"none", 404))
        reply = found() if callable(found) else found
        try:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if not reply.endless:
                self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)
            while reply.endless:
                self.wfile.write(reply.body)
        except OSError:
            self.server.clients_gone.release()

    def log_message(self, *args: object) -> None:
        """Silent."""
