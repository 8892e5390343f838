"""The router's own metrics, `sglang_stream_router_*`; each worker has its own page."""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_CLIENT_GONE = 499
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)


class RouterMetrics:
    """The counters of one router, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._list_workers: Callable[[], Iterable[tuple[str, str]]] = tuple
        self._open = Gauge(
            "sglang_stream_router_open_streams", "Streams not yet sealed.", registry=self._registry
        )
        self.chunks = Counter(
            "sglang_stream_router_chunks",
            "Chunk and context calls that a worker accepted.",
            registry=self._registry,
        )
        self.ttft = Histogram(
            "sglang_stream_router_ttft_seconds",
            "From a generate call's arrival to the first token at the router.",
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        self.requests = Counter(
            "sglang_stream_router_requests",
            "HTTP requests; status 499: the client left before the answer.",
            ["method", "route", "status"],
            registry=self._registry,
        )

        self.placements = Counter(
            "sglang_stream_router_placements",
            "Streams and requests given to a worker, by its role and the reason for it.",
            ["role", "reason"],
            registry=self._registry,
        )
        self.replays = Counter(
            "sglang_stream_router_replays",
            "Streams opened anew on another worker, before (worker_lost, drained, "
            "generation_failed) or after their first token (continued).",
            ["reason"],
            registry=self._registry,
        )
        self.migrations = Counter(
            "sglang_stream_router_migrations",
            "Generations whose KV moves from a prefill to a decode worker.",
            registry=self._registry,
        )
        self._queue = Gauge(
            "sglang_stream_router_queue_requests",
            "Calls that wait for a slot.",
            registry=self._registry,
        )
        self._workers = Gauge(
            "sglang_stream_router_workers",
            "Workers by role and state: ready, draining or lost.",
            ["role", "state"],
            registry=self._registry,
        )

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        self._queue.set_function(waiting)

    def watch(
        self, open_streams: Callable[[], int], workers: Callable[[], Iterable[tuple[str, str]]]
    ) -> None:
        """Where to look when the page is read; `workers`: role and state of each."""
        self._open.set_function(open_streams)
        self._list_workers = workers

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        self._workers.clear()
        for (role, state), count in Counted(self._list_workers()).items():
            self._workers.labels(role, state).set(count)
        return generate_latest(self._registry)


class RequestCounter:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: RouterMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answered = False

        def count(status: int) -> None:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(scope["method"], route, str(status)).inc()

        async def noting(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                count(message["status"])
            await send(message)

        unanswered = 500
        try:
            await self._app(scope, receive, noting)
            unanswered = _CLIENT_GONE
        finally:
            if not answered:
                count(unanswered)
