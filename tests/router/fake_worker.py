"""A worker for the router's tests: the real rules of a stream, and answers from a script.

It runs in a thread: a ZeroMQ ROUTER socket that applies `Session`, and the few HTTP calls of
SGLang's that the router makes. Every step of an answer can be held back until the test lets go.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import zmq
import zmq.asyncio
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from sglang_stream import messages as m
from sglang_stream.errors import (
    SequenceConflict,
    StreamError,
    StreamMoved,
    StreamNotFound,
    StreamSealed,
)
from sglang_stream.session import Session, Verdict

USAGE = m.Usage(chunks=3, updates=1, lcp_tokens=7, computed_tokens=11, ready_tokens=10)

QUERY = -2
CHUNKS = -3
ABORTED = {"type": "abort", "message": "Aborted", "status_code": None}


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """`app` on a free port, in a thread; its URL."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """What a `spoken` worker answers to a prompt: ids whose text is one ASCII character each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append((31 * sum(ids[-3:]) + 7 * len(ids)) % 90)
    return ids[len(prompt) :]


def text_of(ids: Sequence[int]) -> str:
    """The text of such ids by the tests' tokenizer."""
    return "".join(chr(33 + i) for i in ids)


@dataclass
class FakeStream:
    session: Session
    opening: array[int]
    opened: m.Open
    chunks: dict[int, array[int]] = field(default_factory=dict)
    memo: bytes = b""
    touched_s: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> array[int]:
        return sum(self.chunks.values(), array("i", self.opening))

    @property
    def expired(self) -> bool:
        idle_s = time.monotonic() - self.touched_s
        return self.session.state == "open" and idle_s > self.opened.idle_timeout_s


@dataclass
class FakeWorker:
    """What a test sets and what it finds afterwards.

    `script`: the cumulative texts of an answer, one event each; `gates[i]` holds event i back,
    `gates[QUERY]` the answers to queries, `gates[CHUNKS]` chunks before they take effect;
    `heard`: what came at the socket, answered or not.
    `finish`: the reason of the last event. `answers`: whether the socket answers at all.
    `spoken`: the length of an answer by `greedy` instead of the script; `breaks_after`: the event
    after which its connection ends; `fails`: the error of every answer. `secret`: of its
    socket. `report`: what it says unasked, right after each snapshot.
    """

    tokenizer: Path
    script: list[str] = field(default_factory=lambda: ["Hel", "Hello", "Hello there"])
    finish: dict[str, Any] = field(default_factory=lambda: {"type": "stop", "matched": 2})
    gates: dict[int, threading.Event] = field(default_factory=dict)
    role: m.Role = "unified"
    spoken: int | None = None
    breaks_after: int | None = None
    fails: StreamError | None = None
    incremental: bool = False
    supported: bool = True
    answers: bool = True
    context_len: int = 1000
    secret: str | None = None
    worker_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    flush_status: int = 200
    refusal: StreamError | None = None
    streams: dict[str, FakeStream] = field(default_factory=dict)
    forgotten: bool = False
    seals: list[dict[str, Any]] = field(default_factory=list)
    forwarded: list[dict[str, Any]] = field(default_factory=list)
    flushes: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    report: m.Report | None = None
    heard: list[m.Question] = field(default_factory=list)
    events: list[m.Event] = field(default_factory=list)
    endpoint: str = ""

    def app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            context = zmq.asyncio.Context()
            socket = context.socket(zmq.ROUTER)
            if self.secret is not None:
                socket.curve_server = True
                socket.curve_publickey, socket.curve_secretkey = m.curve_keys(self.secret)
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            self.endpoint = f"tcp://127.0.0.1:{port}"
            answering = asyncio.create_task(self._answer_all(socket))
            yield
            answering.cancel()
            for gate in self.gates.values():
                gate.set()
            socket.close(linger=0)
            context.term()

        app = FastAPI(lifespan=lifespan)
        app.add_api_route("/health", lambda: Response(), methods=["GET"])
        app.add_api_route("/model_info", lambda: {}, methods=["GET"])
        app.add_api_route("/server_info", self._server_info, methods=["GET"])
        app.add_api_route("/v1/models", self._models, methods=["GET"])
        app.add_api_route("/v1/models/{model:path}", _target, methods=["GET"])
        app.add_api_route("/flush_cache", self._flush, methods=["POST"])
        app.add_api_route("/generate", self._generate, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self._forwarded, methods=["POST"])
        app.add_api_route("/v1/completions", self._forwarded, methods=["POST"])
        return app

    # --- ZeroMQ ---------------------------------------------------------------------------------

    async def _answer_all(self, socket: Any) -> None:
        while True:
            peer, call_id, payload = await socket.recv_multipart()
            question = m.decode_question(payload)
            self.heard.append(question)
            if not self.answers:
                continue
            if isinstance(question, m.Query):
                await self._pass(QUERY)
            if isinstance(question, m.Append | m.Update):
                await self._pass(CHUNKS)
            try:
                answer = self._answer(question)
            except StreamError as e:
                answer = m.Refused(e.code, e.message, e.param, e.expected_seq, e.retry_after)
            await socket.send_multipart([peer, call_id, m.encode(answer)])
            if self.report is not None and isinstance(answer, m.Snapshot):
                await socket.send_multipart([peer, bytes(8), m.encode(self.report)])

    def _answer(self, question: m.Question) -> m.Answer:
        if isinstance(question, m.Hello):
            return m.Welcome(
                m.PROTOCOL, self.worker_id, self.role, self.context_len, 300, 1, 5000, 8
            )
        if isinstance(question, m.Resync):
            return m.Snapshot(0, b"")
        self.events.append(question)
        self._check(question)
        if isinstance(question, m.Open):
            return self._open(question)
        stream = self.streams.get(question.stream_id)
        if stream is None:
            raise StreamNotFound(f"stream {question.stream_id} is unknown")
        match question:
            case m.Query():
                session = stream.session
                length = len(stream.tokens)
                return m.Status(
                    session.stream_id, session.mode, session.state, session.seq, length, USAGE
                )
            case m.Fetch():
                if stream.session.state == "finished":
                    raise StreamSealed(f"stream {question.stream_id} has ended")
                return self._copy(stream, question.since)
            case m.Abort():
                if stream.session.state == "finished":
                    raise StreamSealed(f"stream {question.stream_id} has ended")
                stream.session.abort()
                del self.streams[question.stream_id]
                return m.Accepted(stream.session.seq, 0)
            case m.Append() | m.Update():
                return self._apply(stream, question)
        raise AssertionError(question)

    def _check(self, question: m.Event) -> None:
        """Owner, epoch and idle time-out, as the engine sees to them."""
        for stream_id in [i for i, s in self.streams.items() if s.expired]:
            del self.streams[stream_id]
        stream = self.streams.get(question.stream_id)
        if stream is None:
            return
        if question.owner not in (None, stream.opened.owner):
            raise StreamNotFound(f"stream {question.stream_id} is unknown")
        if isinstance(question, m.Query | m.Fetch) or question.epoch == stream.opened.epoch:
            return
        if question.epoch < stream.opened.epoch:
            raise StreamMoved(f"stream {question.stream_id} has moved")
        del self.streams[question.stream_id]

    def _open(self, event: m.Open) -> m.Accepted:
        if self.refusal is not None:
            raise self.refusal
        known = self.streams.get(event.stream_id)
        if known is not None:
            if known.opened.tokens != event.tokens or known.opened.mode != event.mode:
                raise SequenceConflict(f"stream {event.stream_id} is already open")
            return m.Accepted(known.session.seq, len(known.tokens))
        session = Session(event.stream_id, event.mode)
        opening = array("i", event.tokens)
        self.streams[event.stream_id] = FakeStream(session, opening, event, memo=event.memo)
        return m.Accepted(0, len(opening))

    def _copy(self, stream: FakeStream, since: int) -> m.Copy:
        session, opened = stream.session, stream.opened
        status = m.Status(
            session.stream_id, session.mode, session.state, session.seq, len(stream.tokens), USAGE
        )
        chunks = [(seq, ids.tobytes()) for seq, ids in stream.chunks.items() if seq > since]
        return m.Copy(
            status=status,
            epoch=opened.epoch,
            opening=opened.tokens,
            chunks=chunks,
            idle_timeout_s=opened.idle_timeout_s,
            namespace=opened.namespace,
            memo=stream.memo,
            owner=opened.owner,
        )

    def _apply(self, stream: FakeStream, event: m.Append | m.Update) -> m.Accepted:
        if self.refusal is not None:
            raise self.refusal
        kind = "append" if isinstance(event, m.Append) else "update"
        verdict = stream.session.check(kind, event.seq, event.digest)  # type: ignore[arg-type]
        if verdict is Verdict.APPLY:
            stream.session.record(event.seq, event.digest)
            stream.touched_s = time.monotonic()
            ids = array("i", event.tokens)
            if isinstance(event, m.Append):
                stream.chunks[event.seq] = ids
            else:
                stream.chunks = {event.seq: ids}
                stream.memo = stream.memo if event.memo is None else event.memo
        return m.Accepted(event.seq, len(stream.tokens), 5 if kind == "update" else 0)

    # --- HTTP -----------------------------------------------------------------------------------

    async def _server_info(self) -> dict[str, Any]:
        state = {"endpoint": self.endpoint, "worker_id": self.worker_id}
        return {
            "tokenizer_path": str(self.tokenizer),
            "model_path": str(self.tokenizer),
            "incremental_streaming_output": self.incremental,
            "disaggregation_bootstrap_port": 8998,
            "internal_states": [{"sglang_stream": state} if self.supported else {}],
        }

    async def _models(self) -> dict[str, Any]:
        card = {"id": "tiny", "object": "model", "max_model_len": self.context_len}
        return {"object": "list", "data": [card]}

    async def _flush(self, request: Request) -> Response:
        self.flushes.append(request.url.query)
        return Response("busy" if self.flush_status != 200 else "done", self.flush_status)

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        call = json.loads(body["sampling_params"]["custom_params"]["sglang_stream"])
        self.seals.append({**body, "call": call})
        answer = self._answered(body["rid"], call, body["sampling_params"])
        return StreamingResponse(answer, media_type="text/event-stream")

    async def _answered(
        self, rid: str, call: dict[str, Any], params: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        try:
            await self._pass(-1)
            try:
                stream = self.streams.get(call["id"])
                if self.fails is not None:
                    raise self.fails
                if stream is None:
                    raise StreamNotFound(f"stream {call['id']} is unknown")
                if stream.opened.epoch != call["epoch"]:
                    raise StreamMoved(f"stream {call['id']} has moved")
                stream.session.check_seal(call["last_seq"])
            except StreamError as e:
                yield _refused(e)
                return
            stream.session.seal()
            prompt = [*stream.tokens, *call["tail"]]
            async for event in self._events(prompt, params):
                if stream.session.state == "aborted":
                    yield _sse({"text": "", "meta_info": {"finish_reason": ABORTED}})
                    return
                yield event
            stream.session.finish()
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cut.append(rid)
            raise

    async def _events(self, prompt: list[int], params: dict[str, Any]) -> AsyncIterator[bytes]:
        said = ""
        script, all_ids = self.script, list(range(100, 100 + len(self.script)))
        if self.spoken is not None:
            count = params["max_new_tokens"] or self.spoken
            all_ids = greedy(prompt, 1 if self.role == "prefill" else count)
            script = [text_of(all_ids[: i + 1]) for i in range(len(all_ids))]
        for i, text in enumerate(script):
            await self._pass(i)
            if i == self.breaks_after:
                raise ConnectionResetError("as the test wants it")
            last = i == len(script) - 1
            first_new = i if self.incremental else 0
            meta = {
                "prompt_tokens": len(prompt),
                "completion_tokens": i + 1,
                "cached_tokens": 4,
                "finish_reason": self.finish if last else None,
            }
            new = text[len(said) :] if self.incremental else text
            said = text
            yield _sse({"text": new, "output_ids": all_ids[first_new : i + 1], "meta_info": meta})

    async def _forwarded(self, request: Request) -> Response:
        body = await request.json()
        self.forwarded.append({"headers": dict(request.headers), "body": body})
        if "bad" in body:
            return Response(body["bad"], 400, {"X-Kept": "yes"}, "application/json")
        if self.fails is not None:
            fields = {"object": "error", "message": self.fails.message, "code": self.fails.status}
            return Response(json.dumps(fields), self.fails.status, media_type="application/json")
        if not body.get("stream"):
            passing = asyncio.ensure_future(self._pass(0))
            while not passing.done():
                if await request.is_disconnected():
                    self.cut.append("plain")
                    passing.cancel()
                    break
                await asyncio.sleep(0.002)
            return Response(b'{"ok":true}', media_type="application/json")

        async def events() -> AsyncIterator[bytes]:
            try:
                for i in range(3):
                    await self._pass(i)
                    if i == self.breaks_after:
                        yield b"data: "
                        raise ConnectionResetError("as the test wants it")
                    yield b"data: %d\n\n" % i
            except asyncio.CancelledError:
                self.cut.append("plain")
                raise

        return StreamingResponse(events(), media_type=body.get("as", "text/event-stream"))

    async def _pass(self, step: int) -> None:
        gate = self.gates.get(step)
        while gate is not None and not gate.is_set():  # noqa: ASYNC110 (set by another thread)
            await asyncio.sleep(0.002)


async def _target(request: Request) -> dict[str, str]:
    """What was asked for, as it was written."""
    return {"path": request.scope["raw_path"].decode(), "query": request.url.query}


def _sse(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _refused(error: StreamError) -> bytes:
    reason = {
        "type": "abort",
        "message": error.message,
        "status_code": error.status,
        "sglang_stream_error": msgspec.json.encode(error.to_fields()).decode(),
    }
    return _sse({"text": "", "output_ids": [], "meta_info": {"finish_reason": reason}})
