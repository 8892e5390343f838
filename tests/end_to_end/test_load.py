"""As many streams as may be open, in both modes, with ordinary requests in between."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest

from tests.end_to_end.asking import Asked, ask_async
from tests.end_to_end.server import MAX_OPEN, Server, greedy, ok
from tests.end_to_end.texts import ids

pytestmark = pytest.mark.anyio


async def retrieved(items: list[Any], rng: random.Random) -> AsyncIterator[Any]:
    """The items, with a retriever's pauses."""
    for item in items:
        await anyio.sleep(rng.uniform(0, 0.2))
        yield item


def plan(number: int) -> tuple[str, list[list[int]], list[int]]:
    """A stream's mode, its items, and the context that they come to. Some share blocks."""
    rng = random.Random(number)
    blocks = [ids(("block", b), 60) for b in range(6)]
    items = [
        [t for b in rng.sample(range(6), rng.randint(1, 4)) for t in blocks[b]]
        for _ in range(rng.randint(2, 5))
    ]
    if number % 2:
        return "update", items, items[-1]
    return "append", items, [t for item in items for t in item]


async def test_many_at_once(server: Server) -> None:
    """Streams and ordinary requests, all beginning together: every token is right."""
    prompts: dict[int, list[int]] = {}
    answers: dict[int, Asked] = {}
    plain: dict[int, list[int]] = {}

    async def stream(number: int) -> None:
        mode, items, context = plan(number)
        prompts[number] = [*ids("opening", 20), *context, *ids(number, 5)]
        answers[number] = await ask_async(
            server,
            retrieved(items, random.Random(number)),
            mode=mode,
            input_ids=ids("opening", 20),
            question_ids=ids(number, 5),
        )

    async def ordinary(number: int, client: httpx.AsyncClient) -> None:
        body = {"model": "default", "prompt": ids(("plain", number), 100), **greedy(8)}
        answer = await client.post("/v1/completions", json=body)
        plain[number] = ok(answer)["choices"][0]["token_ids"]

    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120) as client,
        anyio.create_task_group() as tasks,
    ):
        for number in range(MAX_OPEN):
            tasks.start_soon(stream, number)
            tasks.start_soon(ordinary, number, client)

    assert len(answers) == len(plain) == MAX_OPEN
    for number, answer in answers.items():
        assert answer.prompt == prompts[number]
        assert answer.tokens == server.cold(answer.prompt).tokens, f"stream {number}"
    for number, tokens in plain.items():
        assert tokens == server.cold(ids(("plain", number), 100)).tokens, f"request {number}"
