"""Asking through the SDK, synchronously and asynchronously, at a retriever's pace or at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import anyio

from sglang_stream import Usage, stream_chat
from tests.end_to_end.server import Server, ok
from tests.harness import wait_until


@dataclass(frozen=True)
class Asked:
    """An answer that came through the SDK. `prompt`: the ids that the server says it was for."""

    text: str
    prompt: list[int]
    tokens: list[int]
    usage: Usage


def ask(server: Server, items: Iterable[Any], *, asynchronous: bool, **options: Any) -> Asked:
    """One greedy request over `items`, read to its end."""
    if asynchronous:
        return asyncio.run(ask_async(server, in_thread(items), **options))
    with stream_chat(items, **settings(server, options)) as stream:
        text = "".join(stream)
        return asked(text, stream.get_final_completion(), stream.usage)


async def ask_async(server: Server, items: AsyncIterator[Any], **options: Any) -> Asked:
    async with stream_chat(items, **settings(server, options)) as stream:
        text = "".join([piece async for piece in stream])
        return asked(text, await stream.get_final_completion(), stream.usage)


def settings(server: Server, options: dict[str, Any]) -> dict[str, Any]:
    """The SDK's arguments for an answer that can be compared."""
    return {
        "base_url": server.url,
        "max_tokens": 8,
        "temperature": 0,
        "extra_body": {"return_token_ids": True, "ignore_eos": True},
        **options,
    }


def asked(text: str, completion: dict[str, Any], usage: Usage | None) -> Asked:
    """The whole answer, after a look at whether its parts agree."""
    assert usage is not None
    (choice,) = completion["choices"]
    chat = completion["object"] == "chat.completion"
    assert text == (choice["message"]["content"] if chat else choice["text"])
    assert choice["finish_reason"] == "length"
    answer = Asked(text, completion["prompt_token_ids"], choice["token_ids"], usage)
    assert usage.prompt_tokens == len(answer.prompt)
    assert usage.completion_tokens == len(answer.tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return answer


def paced(server: Server, items: Iterable[Any]) -> Iterator[Any]:
    """Yields each item when the engine has computed all before it, and ends when it has computed
    the last. The server must have one stream only and nothing in its cache."""
    for number, item in enumerate(items, 1):
        yield item
        wait_until(lambda n=number: _computed(server, n), 60, f"item {number} computed")


def _computed(server: Server, number: int) -> bool:
    opened = server.open_streams()
    if len(opened) != 1:
        return False
    state = ok(server.look(opened[0]["id"]))
    return bool(state["seq"] == number and state["held_tokens"] == state["usage"]["prompt_tokens"])


async def in_thread(items: Iterable[Any]) -> AsyncIterator[Any]:
    """The items of an iterable that may block."""
    iterator, end = iter(items), object()
    while (item := await anyio.to_thread.run_sync(next, iterator, end)) is not end:
        yield item
