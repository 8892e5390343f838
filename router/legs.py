"""One generation on two workers: the prefill leg computes the prompt, the decode leg the answer.

    prefill   /generate, seals the stream ----last pass----> KV on its way --> ends
    decode    Open with all tokens, /generate: takes KV --------------------> tokens

Both begin at once, so that the decode worker has made room before the last pass ends. SGLang's own
transfer joins them by a room number. A leg that fails ends the other one at once.

A decode leg is named after its stream, so that any router can end it; its epoch is the time of the
attempt, so that a later attempt takes the place of an earlier one of which something is left.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing, suppress
from typing import Any

from router.events import WorkerEvent
from router.worker import Worker
from sglang_stream.errors import EngineFailure, StreamError
from sglang_stream.messages import Abort, Fetch, Open, SealCall, pack_tokens

ROOMS = 1 << 63
"""Room numbers, which name the meeting of two legs, are below it."""
_LEG_IDLE_S = 60.0


async def generate_apart(
    prefill: Worker,
    decode: Worker,
    stream_id: str,
    request: dict[str, Any],
    prompt: array[int],
    owner: bytes,
    failed: set[Worker],
    in_background: Callable[[Coroutine[Any, Any, None]], None],
) -> AsyncIterator[WorkerEvent]:
    """The events of the decode leg. Raises the error of whichever leg fails first.

    `request`: the call that seals the stream `stream_id` of `owner` at `prefill`; `prompt`: all of
    its ids, the same that the seal makes there. A worker whose leg fails joins `failed`.
    `in_background` runs what must not hold up the caller.
    """
    tokens = pack_tokens(prompt)
    leg = Open(_leg(stream_id), "append", tokens, _LEG_IDLE_S, time.time_ns(), owner)
    bootstrap = {
        "bootstrap_host": prefill.host,
        "bootstrap_port": prefill.info.bootstrap_port,
        "bootstrap_room": secrets.randbelow(ROOMS),
    }
    await decode.ask(leg)
    params = dict(request["sampling_params"])
    params["custom_params"] = SealCall(leg.stream_id, epoch=leg.epoch).to_custom_params()
    decode_call = {**request, "rid": secrets.token_hex(16), "sampling_params": params, **bootstrap}
    prefilling = asyncio.create_task(_drain(prefill.generate({**request, **bootstrap}, failed)))
    done = False
    try:
        async with aclosing(decode.generate(decode_call, failed)) as events:  # type: ignore[type-var]
            yield await _first(events, prefilling)
            async for event in events:
                yield event
        done = True
    finally:
        prefilling.cancel()
        await asyncio.gather(prefilling, return_exceptions=True)
        if not done:
            in_background(_abort(decode, Abort(leg.stream_id, leg.epoch, owner)))


async def end_answer(decoders: Iterable[Worker], stream_id: str, owner: bytes | None) -> bool:
    """Ends the decode leg of a stream, whichever router began it; whether there was one.

    `owner`: who asks for it; None for an admin, who may end everybody's.
    """

    async def end(worker: Worker) -> bool:
        try:
            leg = await worker.fetch(Fetch(_leg(stream_id), owner=owner))
            await worker.ask(Abort(_leg(stream_id), leg.epoch, leg.owner))
        except StreamError:
            return False
        return True

    return any(await asyncio.gather(*(end(w) for w in decoders)))


def _leg(stream_id: str) -> str:
    return f"leg-{stream_id}"


async def _first(events: AsyncIterator[WorkerEvent], prefilling: asyncio.Task[None]) -> WorkerEvent:
    """The decode leg's first event. Raises the prefill leg's error if that comes first."""
    first = asyncio.create_task(_next(events))
    try:
        await asyncio.wait({first, prefilling}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            prefilling.result()
        return await first
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def _next(events: AsyncIterator[WorkerEvent]) -> WorkerEvent:
    async for event in events:
        return event
    raise EngineFailure("the decode worker ended the answer without a token")


async def _abort(worker: Worker, abort: Abort) -> None:
    with suppress(StreamError):  # what is missed expires
        await worker.ask(abort)


async def _drain(events: AsyncIterator[WorkerEvent]) -> None:
    async with aclosing(events) as rest:  # type: ignore[type-var]
        async for _ in rest:
            pass
