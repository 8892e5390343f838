"""One request whose context arrives over time, from its first item to its last token.

    the caller's items --accept--> outbox --calls, one at a time--> server
                        end        the last one with generate --events--> pieces of text

Items are taken while calls are under way. The last call goes along with the one that generates, if
it is known to be the last by then: the answer need not wait until it was taken up. Nothing runs in
the background once the first text is there, nor before it is asked for. Every task lives inside
`pieces`, so cancelling or closing that ends everything, and the stream is dropped at the server
too.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import anyio
import httpx

from sglang_stream.errors import SequenceGap, StreamNotFound, StreamSealed
from sglang_stream.sdk.answer import Answer
from sglang_stream.sdk.client import ABORT_TIMEOUT_S, AsyncStreamClient, NoStreamsHere
from sglang_stream.sdk.items import parse_chunk, parse_context
from sglang_stream.sdk.outbox import AppendOutbox, Call, Outbox, UpdateOutbox
from sglang_stream.sdk.plan import Plan

ClientFactory = Callable[[], AsyncStreamClient]


class StreamedRequest:
    """The request itself, for one run of `pieces`.

    `t0`: when the caller's iterable yielded its last item (or ended, if it yielded none);
    `sealed_at`: when everything was sent and the answer was first asked for; `first_token_at`: when
    the first token was received; all by `time.perf_counter`, None before.
    """

    def __init__(self, plan: Plan, connect: ClientFactory) -> None:
        self.t0: float | None = None
        self.sealed_at: float | None = None
        self.first_token_at: float | None = None
        self.finished = False
        self.answer = Answer()
        self._plan = plan
        self._connect = connect
        self._outbox: Outbox = AppendOutbox() if plan.mode == "append" else UpdateOutbox()
        self._parse = parse_chunk if plan.mode == "append" else parse_context
        self._items = 0
        self._ended = False
        self._changed: anyio.Event | None = None
        self._stream_id: str | None = None
        self._plain_model: str | None = None
        self._last: Call | None = None
        self._request_id = uuid.uuid4().hex
        self._repairs_left = 8
        self._replays_left = 1

    def accept(self, item: Any, at: float) -> None:
        """Takes the caller's next item, yielded at `at`. Raises TypeError, ValueError if bad."""
        self._items += 1
        self._outbox.add(self._parse(item, self._items))
        self.t0 = at
        self._wake()

    def end(self, at: float) -> None:
        """There are no more items."""
        if self.t0 is None:
            self.t0 = at
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    async def pieces(self, source: AsyncIterable[Any] | None) -> AsyncGenerator[str, None]:
        """Sends the items of `source`, or those that `accept` gets, and yields the answer's text.

        Raises what `source` raises, unchanged, and every `StreamError`.
        """
        async with self._connect() as client:
            try:
                await _together(
                    lambda: self._open_and_send(client),
                    (lambda: self._pull(source)) if source is not None else None,
                )
                async with aclosing(self._generate(client)) as texts:
                    async for text in texts:
                        yield text
                self.finished = True
            finally:
                if self._stream_id is not None and not self.finished:
                    with anyio.CancelScope(shield=True):
                        await client.abort(self._stream_id)

    async def _pull(self, source: AsyncIterable[Any]) -> None:
        iterator = aiter(source)
        try:
            async for item in iterator:
                self.accept(item, time.perf_counter())
            self.end(time.perf_counter())
        finally:
            if isinstance(iterator, AsyncGenerator):
                await iterator.aclose()

    async def _open_and_send(self, client: AsyncStreamClient) -> None:
        try:
            await self._open(client)
        except NoStreamsHere:
            warnings.warn(
                f"{client.base_url} has no /v1/streams: all chunks are awaited and sent in one "
                "ordinary request. Start it with `sglang-stream serve` to prefill while waiting",
                stacklevel=1,
            )
            self._plain_model = self._plan.model or await _first_model(client)
        await self._send(client)

    async def _open(self, client: AsyncStreamClient) -> None:
        """Opens the stream. When cancelled it gives the answer a moment to come, so that a stream
        which the server has opened already can be dropped."""
        answered = anyio.Event()
        grace = anyio.CancelScope(shield=True)

        async def call() -> None:
            with grace:
                self._stream_id = await client.open(self._plan.opening())
            answered.set()

        async def wait() -> None:
            try:
                await answered.wait()
            finally:
                grace.deadline = anyio.current_time() + ABORT_TIMEOUT_S

        await _together(call, wait)

    async def _send(self, client: AsyncStreamClient) -> None:
        """Sends what there is until no more can come, and keeps the last call for `_generate`."""
        self._last = None
        while True:
            call = self._outbox.take() if self._plain_model is None else None
            if self._ended and (call is None or self._outbox.is_empty):
                self._last = call
                return
            if call is not None:
                await self._deliver(client, call)
            else:
                self._changed = anyio.Event()
                await self._changed.wait()

    async def _deliver(self, client: AsyncStreamClient, call: Call) -> None:
        assert self._stream_id is not None
        send = client.append if self._plan.mode == "append" else client.update
        try:
            await send(self._stream_id, call)
        except (SequenceGap, StreamNotFound) as e:
            await self._repair(client, e)

    async def _repair(self, client: AsyncStreamClient, error: SequenceGap | StreamNotFound) -> None:
        """Makes the outbox send again what the server has lost; raises `error` if that is no help.

        A gap: from the number it expects. A lost stream: everything, in a new one, once.
        """
        if isinstance(error, SequenceGap):
            self._repairs_left -= 1
            if self._repairs_left < 0 or not 0 < (error.expected_seq or 0) <= self._outbox.last_seq:
                raise error
            self._outbox.rewind(error.expected_seq or 1)
            return
        self._replays_left -= 1
        if self._replays_left < 0:
            raise error
        try:
            await self._open(client)
        except NoStreamsHere:
            raise error from None
        self._outbox.rewind(1)

    async def _generate(self, client: AsyncStreamClient) -> AsyncGenerator[str, None]:
        """The answer's text; everything before the first token may be done again."""
        attempt = 0
        self.sealed_at = time.perf_counter()
        while True:
            path, body = self._generation()
            try:
                async with aclosing(client.events(path, body)) as events:
                    async for event in events:
                        text = self.answer.add(event)
                        if self.first_token_at is None and self.answer.has_token:
                            self.first_token_at = time.perf_counter()
                        if text:
                            yield text
                return
            except (SequenceGap, StreamNotFound, StreamSealed) as e:
                if self.answer.has_token or self._stream_id is None:
                    raise
                if isinstance(e, StreamSealed):
                    if not attempt:
                        raise
                    # The call that failed has sealed it, and its answer is lost.
                    e = StreamNotFound(e.message)
                await self._repair(client, e)
                await self._send(client)
            except httpx.TransportError as e:
                if self.answer.has_token or attempt == client.max_retries:
                    raise client.unreachable(e) from e
                await client.pause(attempt)
                attempt += 1
            self.answer = Answer()

    def _generation(self) -> tuple[str, dict[str, Any]]:
        if self._plain_model is not None:
            return self._plan.plain(self._outbox.pieces(), self._plain_model)
        body = self._plan.generation(self._outbox.last_seq, self._request_id, self._last)
        return f"/v1/streams/{self._stream_id}/generate", body


async def _together(*steps: Callable[[], Awaitable[None]] | None) -> None:
    """Runs the steps at once, the last one in this task; the first failure ends the others.

    The failure is raised as it is: the caller's own error must not come in a group.
    """
    failures: list[BaseException] = []

    async def run(step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as e:
            failures.append(e)
            group.cancel_scope.cancel()

    *others, last = [step for step in steps if step is not None]
    async with anyio.create_task_group() as group:
        for step in others:
            group.start_soon(run, step)
        await run(last)
    if failures:
        raise failures[0]


async def _first_model(client: AsyncStreamClient) -> str:
    """The name of the first model that a plain server offers."""
    models = (await client.json("GET", "/v1/models")).get("data") or [{}]
    return str(models[0].get("id", "default"))
