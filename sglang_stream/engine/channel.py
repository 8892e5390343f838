"""The scheduler's end of the chunk socket (rank 0 only)."""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass

import msgspec
import zmq

from sglang_stream import messages as m
from sglang_stream.config import EngineConfig
from sglang_stream.engine.metrics import EngineMetrics
from sglang_stream.errors import Malformed, StreamError
from sglang_stream.policy import CostModel

logger = logging.getLogger(__name__)

_PER_POLL = 256  # so that a flood of chunks cannot keep the scheduler from its batches
_FORGET_S = 30.0  # a router greets every second; one that has gone gets no more reports
_UNASKED = bytes(8)


@dataclass(frozen=True)
class StreamEvent:
    """An event with the way back for its answer and the time at which rank 0 received it."""

    peer: bytes
    call_id: bytes
    event: m.Event | m.Resync | m.Configure
    now: float


@dataclass(frozen=True)
class Tick:
    """Rank 0's clock, and its costs where they are new."""

    now: float
    cost: CostModel | None


@dataclass(frozen=True)
class Expire:
    """Rank 0 found these streams idle for too long."""

    stream_ids: tuple[str, ...]


class Channel:
    """A bound ROUTER socket. `endpoint` is where routers connect."""

    def __init__(self, config: EngineConfig, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self.worker_id = uuid.uuid4().hex
        self._credits = config.credits
        self._routers: dict[bytes, float] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        if config.secret is not None:
            self._socket.curve_server = True
            self._socket.curve_publickey, self._socket.curve_secretkey = m.curve_keys(config.secret)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        if config.port:
            self._socket.bind(f"tcp://{config.host}:{config.port}")
            self.port = config.port
        else:
            self.port = self._socket.bind_to_random_port(f"tcp://{config.host}")
        self.endpoint = f"tcp://{config.host}:{self.port}"

    def wake(self, poller: zmq.Poller) -> None:
        """Makes a poller return when events arrive; SGLang's idle scheduler sleeps on one."""
        poller.register(self._socket, zmq.POLLIN)

    def poll(self, welcome: m.Welcome) -> list[StreamEvent]:
        """The events that have arrived. `Hello` and what cannot be read is answered right here."""
        events: list[StreamEvent] = []
        now = time.monotonic()
        while len(events) < _PER_POLL:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) != 3 or len(frames[1]) != len(_UNASKED):
                logger.warning("dropped a message of %d frames on the chunk socket", len(frames))
                self._metrics.odd.labels("unreadable").inc()
                continue
            peer, call_id, payload = frames
            try:
                question = m.decode_question(payload)
            except msgspec.DecodeError as e:
                self._metrics.odd.labels("unreadable").inc()
                self.refuse(peer, call_id, Malformed(f"the message cannot be read: {e}"))
                continue
            if isinstance(question, m.Hello):
                greeting = self._greet(question, welcome)
                if greeting is welcome:
                    self._routers[peer] = now
                self.answer(peer, call_id, greeting)
            else:
                events.append(StreamEvent(peer, call_id, question, now))
        return events

    def report(self, report: m.Report) -> None:
        """Tells every router that greeted this worker lately."""
        now = time.monotonic()
        payload = m.encode(report)
        for peer, greeted_s in list(self._routers.items()):
            if now - greeted_s > _FORGET_S:
                del self._routers[peer]
            else:
                self._socket.send_multipart([peer, _UNASKED, payload])

    @property
    def has_routers(self) -> bool:
        return bool(self._routers)

    def answer(self, peer: bytes, call_id: bytes, answer: m.Answer) -> None:
        self._socket.send_multipart([peer, call_id, m.encode(answer)])

    def refuse(self, peer: bytes, call_id: bytes, error: StreamError) -> None:
        self.answer(peer, call_id, refusal(error))

    def welcome(
        self, role: m.Role, context_len: int, vocab_size: int, page_size: int, kv_tokens: int
    ) -> m.Welcome:
        return m.Welcome(
            protocol=m.PROTOCOL,
            worker_id=self.worker_id,
            role=role,
            context_len=context_len,
            vocab_size=vocab_size,
            page_size=page_size,
            kv_tokens=kv_tokens,
            credits=self._credits,
        )

    @staticmethod
    def _greet(hello: m.Hello, welcome: m.Welcome) -> m.Answer:
        if hello.protocol == m.PROTOCOL:
            return welcome
        return m.Refused(
            code=Malformed.code,
            message=f"this worker speaks protocol {m.PROTOCOL}, not {hello.protocol}: "
            "install the same version of sglang-stream on both sides",
        )


def refusal(error: StreamError) -> m.Refused:
    return m.Refused(
        code=error.code,
        message=error.message,
        param=error.param,
        expected_seq=error.expected_seq,
        retry_after=error.retry_after,
    )
