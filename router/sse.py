"""Server-sent events, read and written."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"


def sse_event(content: Any) -> bytes:
    """`content` as one event of JSON."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


async def sse_data(received: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The data of each event in `received`, which may be cut anywhere. One data line an event."""
    rest = b""
    async for part in received:
        *events, rest = (rest + part).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event[6:]
