from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from router.sse import sse_data, sse_event

WIRE = b'data: {"a":1}\n\n: a comment\n\ndata: two\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_cut_anywhere(size: int) -> None:
    async def received() -> AsyncIterator[bytes]:
        for at in range(0, len(WIRE), size):
            yield WIRE[at : at + size]

    async def read() -> list[bytes]:
        return [data async for data in sse_data(received())]

    assert asyncio.run(read()) == [b'{"a":1}', b"two", b"[DONE]"]


def test_an_event() -> None:
    assert sse_event({"text": "a\nb"}) == b'data: {"text":"a\\nb"}\n\n'
