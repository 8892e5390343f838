"""One generation on two workers: the prefill leg computes the prompt, the decode leg the answer.

    prefill   /generate, seals the stream ----last pass----> KV on its way --> ends
    decode    Open with all tokens, /generate: takes KV --------------------> tokens

Both begin at once, so that the decode worker has made room before the last pass ends. SGLang's own
transfer joins them by a room number. A leg that fails ends the other one at once.
"""

from __future__ import annotations

import asyncio
import secrets
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any

from router.events import WorkerEvent
from router.worker import Worker
from sglang_stream.errors import EngineFailure, StreamError
from sglang_stream.messages import Abort, Open, SealCall, pack_tokens

ROOMS = 1 << 63
"""Room numbers, which name the meeting of two legs, are below it."""
_LEG_IDLE_S = 60.0


async def generate_apart(
    prefill: Worker,
    decode: Worker,
    request: dict[str, Any],
    prompt: array[int],
    in_background: Callable[[Coroutine[Any, Any, None]], None],
) -> AsyncIterator[WorkerEvent]:
    """The events of the decode leg. Raises the error of whichever leg fails first.

    `request`: the call that seals the stream at `prefill`; `prompt`: all of its ids, the same that
    the seal makes there. `in_background` runs what must not hold up the caller.
    """
    leg_id = f"leg-{secrets.token_hex(16)}"
    bootstrap = {
        "bootstrap_host": prefill.host,
        "bootstrap_port": prefill.info.bootstrap_port,
        "bootstrap_room": secrets.randbelow(ROOMS),
    }
    await decode.ask(Open(leg_id, "append", pack_tokens(prompt), _LEG_IDLE_S))
    params = dict(request["sampling_params"])
    params["custom_params"] = SealCall(leg_id).to_custom_params()
    decode_call = {**request, "rid": secrets.token_hex(16), "sampling_params": params, **bootstrap}
    prefilling = asyncio.create_task(_drain(prefill.generate({**request, **bootstrap})))
    done = False
    try:
        async with aclosing(decode.generate(decode_call)) as events:  # type: ignore[type-var]
            yield await _first(events, prefilling)
            async for event in events:
                yield event
        done = True
    finally:
        prefilling.cancel()
        await asyncio.gather(prefilling, return_exceptions=True)
        if not done:
            in_background(_abort(decode, leg_id))


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


async def _abort(worker: Worker, leg_id: str) -> None:
    with suppress(StreamError):  # what is missed expires
        await worker.ask(Abort(leg_id))


async def _drain(events: AsyncIterator[WorkerEvent]) -> None:
    async with aclosing(events) as rest:  # type: ignore[type-var]
        async for _ in rest:
            pass
