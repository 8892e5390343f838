"""The events of a worker's answers, as SGLang's `/generate` streams them.

Seam used: `sglang/srt/managers/tokenizer_manager.py` of SGLang 0.5.17.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from sglang_stream.errors import EngineFailure, StreamError, StreamNotFound, from_fields


class MetaInfo(msgspec.Struct):
    """`meta_info` of SGLang's answers, as far as it is used."""

    finish_reason: dict[str, Any] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class WorkerEvent(msgspec.Struct):
    """One event of a worker's answer (sglang/srt/managers/tokenizer_manager.py)."""

    text: str | None = None
    output_ids: msgspec.Raw = msgspec.Raw(b"[]")
    meta_info: MetaInfo = msgspec.field(default_factory=MetaInfo)
    error: dict[str, Any] | None = None


decode_event = msgspec.json.Decoder(WorkerEvent).decode


class AnswerCall:
    """The events of one call, read by a task of its own so that it can be made to fail."""

    def __init__(self, events: AsyncIterator[WorkerEvent]) -> None:
        self._queue: asyncio.Queue[WorkerEvent | StreamError | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._pump(events))

    def fail(self, error: StreamError) -> None:
        """Ends the call now; its reader gets `error` after what has arrived."""
        self._task.cancel()
        self._queue.put_nowait(error)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def __aiter__(self) -> AnswerCall:
        return self

    async def __anext__(self) -> WorkerEvent:
        item = await self._queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, StreamError):
            raise item
        return item

    async def _pump(self, events: AsyncIterator[WorkerEvent]) -> None:
        try:
            async for event in events:
                self._queue.put_nowait(event)
        except StreamError as e:
            self._queue.put_nowait(e)
        except Exception as e:
            self._queue.put_nowait(EngineFailure(f"the worker's answer was lost: {e!r}"))
        else:
            self._queue.put_nowait(None)


def raise_failure(event: WorkerEvent) -> None:
    """Raises the error that an event reports, if it does."""
    if event.error is not None:
        code = event.error.get("code")
        raise from_fields(event.error, status=code if isinstance(code, int) else 500)
    reason = event.meta_info.finish_reason
    if reason is None or reason.get("type") != "abort":
        return
    refusal = reason.get("sglang_stream_error")
    if refusal is not None:
        raise from_fields(msgspec.json.decode(refusal, type=dict[str, Any]))
    if reason.get("status_code") is None:
        # Somebody asked for it: the stream was deleted, or moved, through another router.
        raise StreamNotFound("the stream was deleted or taken over during its answer: ask again")
    message = f"the engine aborted the generation: {reason.get('message')}"
    raise from_fields({"message": message}, status=int(reason["status_code"]))


def http_error(status: int, body: bytes) -> StreamError:
    """The error in an answer of SGLang's HTTP server."""
    try:
        answer = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        answer = {}
    fields = answer.get("error", answer)
    if not isinstance(fields, dict) or "message" not in fields:
        fields = {"message": f"the worker answered {status}: {body[:500].decode(errors='replace')}"}
    return from_fields(fields, status=status)
