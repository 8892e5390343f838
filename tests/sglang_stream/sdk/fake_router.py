"""A small server with the stream API's rules and none of its work, for tests of the client.

It runs under uvicorn in a thread, keeps what it was sent, and can be told to misbehave: `faults`
holds, per kind of call, what to do to the next ones; `gates` holds calls back until they are set,
`pace` every piece of an answer until it is released.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sglang_stream.errors import StreamError, StreamNotFound
from sglang_stream.messages import Mode, digest
from sglang_stream.session import Session, Verdict

Fault = Callable[[], Response | None]


@dataclass
class FakeStream:
    opening: dict[str, Any]
    session: Session
    context: list[Any] = field(default_factory=list)
    generated: int = 0


@dataclass
class Seen:
    """One call as it arrived."""

    kind: str
    stream_id: str
    body: dict[str, Any]
    headers: dict[str, str]
    port: int


class FakeRouter:
    """The server's state; `text` is what every generation answers, piece by piece."""

    def __init__(self) -> None:
        self.url = ""
        self.text = ["Hel", "lo, ", "world"]
        self.streams: dict[str, FakeStream] = {}
        self.calls: list[Seen] = []
        self.gone: list[str] = []
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.late_faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.gates: dict[str, threading.Event] = {}
        self.pace: threading.Semaphore | None = None
        self.break_answer: dict[str, Any] | None = None
        self.cut_answers = 0
        self._changed = threading.Condition()

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 10) -> None:
        """Blocks until `condition` holds; it is looked at before and after each call's effect."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "the condition did not come true"

    def of(self, kind: str) -> list[Seen]:
        return [call for call in self.calls if call.kind == kind]

    def contents(self) -> list[dict[str, Any]]:
        """The numbered calls in order, those that came with `generate` included."""
        found: list[dict[str, Any]] = []
        for call in self.calls:
            if call.kind in ("chunks", "context"):
                found.append(call.body)
            elif call.kind == "generate" and "last" in call.body:
                found.append(call.body["last"])
        return found

    def applied(self) -> int:
        """The last number that took effect, over all streams."""
        return max((stream.session.seq for stream in self.streams.values()), default=0)

    def only_stream(self) -> FakeStream:
        (stream,) = self.streams.values()
        return stream

    def app(self) -> Starlette:
        one = "/v1/streams/{id}"
        return Starlette(
            routes=[
                Route("/v1/streams", self._handler("open", self._open), methods=["POST"]),
                Route(f"{one}/chunks", self._handler("chunks", self._event), methods=["POST"]),
                Route(f"{one}/context", self._handler("context", self._event), methods=["PUT"]),
                Route(f"{one}/generate", self._handler("generate", self._run), methods=["POST"]),
                Route(one, self._handler("abort", self._abort), methods=["DELETE"]),
            ]
        )

    def _handler(self, kind: str, act: Callable[[Seen], Response]) -> Any:
        async def handle(request: Request) -> Response:
            raw = await request.body()
            body = json.loads(raw) if raw else {}
            assert request.client is not None
            stream_id = request.path_params.get("id", "")
            seen = Seen(kind, stream_id, body, dict(request.headers), request.client.port)
            with self._changed:
                self.calls.append(seen)
                self._changed.notify_all()
            if kind in self.gates:
                await asyncio.to_thread(self.gates[kind].wait, 20)
            fault = self.faults[kind].popleft()() if self.faults[kind] else None
            if fault is not None:
                return fault
            try:
                answer = act(seen)
            except StreamError as e:
                answer = JSONResponse({"error": e.to_fields()}, e.status)
            with self._changed:
                self._changed.notify_all()
            late = self.late_faults[kind].popleft()() if self.late_faults[kind] else None
            return late or answer

        return handle

    def _find(self, stream_id: str) -> FakeStream:
        if stream_id not in self.streams:
            raise StreamNotFound(f"no stream {stream_id}: open a new one")
        return self.streams[stream_id]

    def _open(self, seen: Seen) -> Response:
        stream_id = f"st-{uuid.uuid4().hex}"
        session = Session(stream_id, seen.body["mode"])
        self.streams[stream_id] = FakeStream(seen.body, session)
        return JSONResponse({"id": stream_id, "object": "stream", "status": "open"}, 201)

    def _event(self, seen: Seen) -> Response:
        stream = self._find(seen.stream_id)
        self._apply(stream, "append" if seen.kind == "chunks" else "update", seen.body)
        return JSONResponse({"seq": seen.body["seq"], "tokens": 0, "lcp": 0}, 202)

    @staticmethod
    def _apply(stream: FakeStream, event: Mode, body: dict[str, Any]) -> None:
        content = body.get("chunks", body.get("documents", body.get("input_ids")))
        key = digest(json.dumps(content).encode())
        verdict = stream.session.check(event, body["seq"], key)
        if verdict is Verdict.APPLY:
            stream.session.record(body["seq"], key)
            stream.context = stream.context + content if event == "append" else content

    def _run(self, seen: Seen) -> Response:
        stream = self._find(seen.stream_id)
        if stream.session.state == "open":
            if "last" in seen.body:
                self._apply(stream, stream.session.mode, seen.body["last"])
            stream.session.check_seal(seen.body["last_seq"])
            stream.session.seal()
        stream.generated += 1
        return StreamingResponse(self._events(stream, seen), media_type="text/event-stream")

    async def _events(self, stream: FakeStream, seen: Seen) -> AsyncIterator[str]:
        chat = "messages" in stream.opening
        top = {"id": "x", "model": "fake", "created": 1}
        top["object"] = "chat.completion.chunk" if chat else "text_completion"
        if self.cut_answers:
            self.cut_answers -= 1
            yield ": the connection ends here\n\n"
            return
        try:
            role = {"role": "assistant"}
            for text in self.text:
                if self.pace is not None:
                    await asyncio.to_thread(self.pace.acquire, timeout=20)
                choice = {"delta": {**role, "content": text}} if chat else {"text": text}
                role = {}
                yield _event(top, choice | {"token_ids": [len(text)]})
                if self.break_answer is not None:
                    yield f"data: {json.dumps({'error': self.break_answer})}\n\n"
                    return
            end = {"delta": {}} if chat else {"text": ""}
            yield _event(top, end | {"finish_reason": "stop"})
            usage = {"chunks": stream.session.seq, "ready_tokens": 7, "router_ttft_ms": 1.5}
            counts = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
            yield _event(top, None, usage=counts | {"stream": usage})
            yield "data: [DONE]\n\n"
        except (GeneratorExit, asyncio.CancelledError):
            with self._changed:
                self.gone.append(seen.stream_id)
                self._changed.notify_all()
            raise

    def _abort(self, seen: Seen) -> Response:
        self._find(seen.stream_id)
        del self.streams[seen.stream_id]
        return JSONResponse({"id": seen.stream_id, "object": "stream", "status": "aborted"})


def _event(top: dict[str, Any], choice: dict[str, Any] | None, **more: Any) -> str:
    choices = [] if choice is None else [{"index": 0, "finish_reason": None, **choice}]
    return f"data: {json.dumps({**top, 'choices': choices, **more})}\n\n"


def lost() -> Response:
    """An answer whose connection is cut in the middle of the body."""
    headers = {"Content-Length": "100", "Content-Type": "text/event-stream"}
    return Response(b"{", headers=headers, status_code=202)


def failing(status: int, error: dict[str, Any] | None = None, **headers: str) -> Fault:
    """An answer with an error, in the project's shape if `error` is given."""

    def answer() -> Response:
        if error is None:
            return Response("bad gateway", status_code=status, headers=headers)
        return JSONResponse({"error": error}, status, headers)

    return answer


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address of `app`, which runs under uvicorn in a thread until the end of the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        listener.listen(64)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
