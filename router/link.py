"""Questions to one worker over ZeroMQ, and their answers.

    ask -> [call id][question] -> DEALER ... ROUTER of the worker's scheduler
    answer <- the call id finds who waits
    report <- call id 0, unasked; `on_load` gets reports and snapshots as they were said

At most `credits` questions are unanswered at once; further ones wait here, first come first
served. Questions leave in the order in which `ask` was called.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec
import zmq

from sglang_stream.config import SECRET_VARIABLE
from sglang_stream.errors import EngineFailure, WorkerUnavailable, from_fields
from sglang_stream.messages import (
    PROTOCOL,
    Accepted,
    Answer,
    Copy,
    Event,
    Hello,
    Question,
    Refused,
    Report,
    Resync,
    Snapshot,
    Status,
    Welcome,
    curve_keys,
    decode_said,
    encode,
)

_CALL_ID_BYTES = 8

# A peer without our key closes the connection without a word; one without any key names the
# mechanism that it wants instead.
_REFUSALS = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class Link:
    """One connection to a worker's chunk socket; made inside a running event loop.

    `timeout_s`: how long a question waits for its answer. It is answered by the scheduler's loop,
    so a long forward delays it. `secret`: the worker's, if it has one. `on_load` gets what the
    worker says unasked, and snapshots, at once and in the order in which it was said. `heard_s`:
    the loop's time at which the worker was last heard.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        timeout_s: float,
        secret: str | None,
        on_load: Callable[[Report | Snapshot], None],
    ) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._on_load = on_load
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # the credits bound what waits to be sent
        if secret is not None:
            self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
            self._socket.curve_serverkey, _ = curve_keys(secret)
        self._monitor = self._socket.get_monitor_socket(_REFUSALS)
        self._socket.connect(endpoint)
        self._calls = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._credits = asyncio.Semaphore(1)
        self._closed: str | None = None
        self.heard_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        for socket, take in (
            (self._socket, self._receive),
            (self._monitor, self._receive_refusals),
        ):
            self._loop.add_reader(socket.FD, take)
            self._loop.call_soon(take)

    async def hello(self, timeout_s: float | None = None) -> Welcome:
        """Greets the worker; also its heartbeat, and therefore outside the credits.

        Raises WorkerUnavailable without an answer in time, for another secret or protocol.
        """
        answer = await self._exchange(Hello(PROTOCOL), timeout_s or self._timeout_s)
        if not isinstance(answer, Welcome) or answer.protocol != PROTOCOL:
            reason = answer.message if isinstance(answer, Refused) else "it speaks another protocol"
            raise WorkerUnavailable(f"the worker does not take this router: {reason}")
        return answer

    def grant(self, credits: int) -> None:
        """Sets how many questions may be unanswered; called once, before the first `ask`.

        One is kept for the heartbeat.
        """
        self._credits = asyncio.Semaphore(max(1, credits - 1))

    async def snapshot(self) -> None:
        """Has `on_load` be told all that the worker has cached. Raises WorkerUnavailable without
        an answer in time."""
        answer = await self._exchange(Resync(), self._timeout_s)
        if not isinstance(answer, Snapshot):
            raise EngineFailure(f"the worker answered with {type(answer).__name__}")

    async def ask(self, event: Event) -> Accepted | Status | Copy:
        """The worker's answer to `event`.

        Raises the error with which the worker refuses it; WorkerUnavailable if no answer comes in
        time (the event may have taken effect) or the link is closed.
        """
        async with self._credits:
            answer = await self._exchange(event, self._timeout_s)
        if isinstance(answer, Refused):
            raise from_fields(msgspec.structs.asdict(answer))
        if not isinstance(answer, Accepted | Status | Copy):
            raise EngineFailure(f"the worker answered with {type(answer).__name__}")
        return answer

    def close(self, reason: str) -> None:
        """Ends the link; whoever waits gets WorkerUnavailable with `reason`."""
        if self._closed is not None:
            return
        self._closed = reason
        for socket in (self._socket, self._monitor):
            self._loop.remove_reader(socket.FD)
        self._fail_all(WorkerUnavailable(reason))
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()

    async def _exchange(self, question: Question, timeout_s: float) -> Answer:
        if self._closed is not None:
            raise WorkerUnavailable(self._closed)
        call = next(self._calls)
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._waiting[call] = future
        try:
            self._socket.send_multipart(
                [call.to_bytes(_CALL_ID_BYTES, "big"), encode(question)], zmq.NOBLOCK
            )
            self._loop.call_soon(self._receive)
            return await asyncio.wait_for(future, timeout_s)
        except asyncio.TimeoutError:
            raise WorkerUnavailable(
                f"the worker did not answer within {timeout_s:g} s: try again"
            ) from None
        finally:
            del self._waiting[call]

    def _receive(self) -> None:
        """Takes all that has come. ZeroMQ's descriptor is no more than a hint, which sending may
        use up."""
        with suppress(zmq.Again):
            while self._closed is None:
                self._take(self._socket.recv_multipart(zmq.NOBLOCK))

    def _take(self, frames: list[bytes]) -> None:
        self.heard_s = time.monotonic()
        future = self._waiting.get(int.from_bytes(frames[0], "big"))
        try:
            said = decode_said(frames[-1])
        except msgspec.DecodeError as e:
            if future is not None and not future.done():
                future.set_exception(EngineFailure(f"the worker's answer cannot be read: {e}"))
            return
        if isinstance(said, Report | Snapshot):
            self._on_load(said)
        if not isinstance(said, Report) and future is not None and not future.done():
            future.set_result(said)  # otherwise its question has timed out

    def _receive_refusals(self) -> None:
        """Ends what waits when the worker's socket does not let us in; ZeroMQ itself only tries
        again."""
        with suppress(zmq.Again):
            while self._closed is None:
                self._monitor.recv_multipart(zmq.NOBLOCK)
                self._fail_all(
                    WorkerUnavailable(
                        f"the worker's chunk socket at {self._endpoint} refused the shared "
                        f"secret: {SECRET_VARIABLE} differs between it and this router"
                    )
                )

    def _fail_all(self, error: WorkerUnavailable) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
