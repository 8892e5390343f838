"""The asynchronous side, against a real local server."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from sglang_stream import AsyncStream, stream_chat
from sglang_stream.errors import TooLarge
from tests.sglang_stream.sdk.fake_router import FakeRouter, failing, lost

pytestmark = pytest.mark.anyio


def chat(router: FakeRouter, chunks: Any, *args: Any, **options: Any) -> AsyncStream:
    stream = stream_chat(chunks, *args, base_url=f"{router.url}/v1", **options)
    assert isinstance(stream, AsyncStream)
    return stream


async def until(router: FakeRouter, condition: Any) -> None:
    await anyio.to_thread.run_sync(router.wait_for, condition)


async def from_list(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


async def test_chunks_arrive_in_order_and_the_answer_comes_back(router: FakeRouter) -> None:
    texts = [f"chunk {i}" for i in range(20)]
    stream = chat(router, from_list(texts), "Why?")
    pieces = [text async for text in stream]
    assert pieces == ["Hel", "lo, ", "world"]
    assert router.only_stream().context == texts
    assert stream.usage is not None
    assert stream.usage.stream is not None
    assert stream.usage.stream.chunks == router.only_stream().session.seq
    assert stream.t0 is not None
    assert stream.first_token_at is not None
    assert stream.t0 < stream.first_token_at
    completion = await stream.get_final_completion()
    assert completion["choices"][0]["message"]["content"] == "Hello, world"


@pytest.mark.parametrize("mode", ["append", "update"])
async def test_the_last_item_goes_along_with_the_generation(router: FakeRouter, mode: Any) -> None:
    """Nobody waits for the answer to a call that is known to be the last one."""
    items = ["a", "b"] if mode == "append" else [["a"], ["b"]]

    async def source() -> AsyncIterator[Any]:
        yield items[0]
        await until(router, lambda: router.applied() == 1)
        yield items[1]

    await chat(router, source(), mode=mode).get_final_completion()
    texts = "chunks" if mode == "append" else "documents"
    (call,) = router.of("generate")
    assert (call.body["last"], call.body["last_seq"]) == ({"seq": 2, texts: ["b"]}, 2)
    assert [body["seq"] for body in router.contents()] == [1, 2]
    assert router.only_stream().context == (["a", "b"] if mode == "append" else ["b"])


@pytest.mark.parametrize("items", [["a"], ["a", "b", "c"]])
async def test_what_goes_along_is_repeated_with_it(router: FakeRouter, items: list[str]) -> None:
    router.late_faults["generate"].append(lost)
    await chat(router, from_list(items)).get_final_completion()
    first, second = router.of("generate")
    assert first.body == second.body
    assert router.only_stream().context == items


async def test_pending_lists_coalesce(router: FakeRouter) -> None:
    gate = router.gates["context"] = threading.Event()

    async def lists() -> AsyncIterator[list[str]]:
        yield ["a"]
        await until(router, lambda: router.of("context"))
        yield ["b"]
        yield ["c"]
        gate.set()

    async with chat(router, lists(), mode="update") as stream:
        await stream.get_final_completion()
    assert router.contents() == [
        {"seq": 1, "documents": ["a"]},
        {"seq": 2, "documents": ["c"]},
    ]


async def test_a_producers_error_drops_the_stream_and_arrives_unchanged(router: FakeRouter) -> None:
    error = LookupError("no such page")

    async def chunks() -> AsyncIterator[str]:
        yield "a"
        await until(router, lambda: router.applied() == 1)
        raise error

    with pytest.raises(LookupError) as caught:
        await anext(chat(router, chunks()))
    assert caught.value is error
    assert router.streams == {}


async def test_a_stalled_producer_is_cancelled_when_the_server_refuses(router: FakeRouter) -> None:
    refusal = {"code": "too_large", "message": "too much"}
    router.faults["chunks"].append(failing(413, refusal))
    ended = []

    async def chunks() -> AsyncIterator[str]:
        try:
            yield "a"
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    with pytest.raises(TooLarge):
        await anext(chat(router, chunks()))
    assert ended == [True]
    assert router.streams == {}


async def test_a_bad_item_closes_the_producer(router: FakeRouter) -> None:
    ended = []

    async def lists() -> AsyncIterator[Any]:
        try:
            yield ["a"]
            yield "not a list"
        finally:
            ended.append(True)

    with pytest.raises(TypeError, match="item 2 is of type str: in update mode"):
        await anext(chat(router, lists(), mode="update"))
    assert ended == [True]
    assert router.streams == {}


async def test_cancelling_while_the_producer_is_waited_for(router: FakeRouter) -> None:
    ended = []

    async def chunks() -> AsyncIterator[str]:
        try:
            yield "a"
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    task = asyncio.create_task(chat(router, chunks()).get_final_completion())
    await until(router, lambda: router.applied() == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]
    assert router.streams == {}


async def test_cancelling_while_the_stream_is_being_opened(router: FakeRouter) -> None:
    gate = router.gates["open"] = threading.Event()
    task = asyncio.create_task(chat(router, from_list(["a"])).get_final_completion())
    await until(router, lambda: router.of("open"))
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(router.of("abort")) == 1
    assert router.streams == {}


async def test_cancelling_while_the_first_token_is_waited_for(router: FakeRouter) -> None:
    router.pace = threading.Semaphore(0)
    task = asyncio.create_task(chat(router, from_list(["a"])).get_final_completion())
    await until(router, lambda: router.of("generate"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert router.streams == {}


async def test_leaving_early_drops_the_generation(router: FakeRouter) -> None:
    router.pace = threading.Semaphore(1)
    async with chat(router, from_list(["a"])) as stream:
        assert await anext(stream) == "Hel"
    assert router.streams == {}
    await until(router, lambda: router.gone)
    with pytest.raises(RuntimeError, match="closed before its end"):
        await stream.get_final_completion()


async def test_a_break_out_of_a_loop_is_enough(router: FakeRouter) -> None:
    router.pace = threading.Semaphore(1)
    async for _ in chat(router, from_list(["a"])):
        break
    gc.collect()
    await until(router, lambda: router.of("abort"))


async def test_a_time_out_repeats_the_call(router: FakeRouter) -> None:
    async def items() -> AsyncIterator[str]:
        yield "a"
        await until(router, lambda: router.of("chunks"))

    router.late_faults["chunks"].append(lost)
    stream = chat(router, items())
    await stream.get_final_completion()
    assert [c.body["seq"] for c in router.of("chunks")] == [1, 1]
    assert router.only_stream().context == ["a"]


async def test_a_first_token_that_does_not_come_in_time(router: FakeRouter) -> None:
    router.pace = threading.Semaphore(0)

    async def release() -> None:
        await until(router, lambda: len(router.of("generate")) == 2)
        assert router.pace is not None
        router.pace.release(100)

    releasing = asyncio.create_task(release())
    stream = chat(router, from_list(["a"]), prompt="P", timeout=0.3)
    assert (await stream.get_final_completion())["choices"][0]["text"] == "Hello, world"
    await releasing
    bodies = [c.body for c in router.of("generate")]
    assert bodies[0] == bodies[1]


async def test_many_streams_at_once(router: FakeRouter) -> None:
    results: dict[int, str] = {}

    async def one(i: int) -> None:
        stream = chat(router, from_list([f"{i}:{j}" for j in range(5)]), f"Q{i}")
        results[i] = "".join([text async for text in stream])

    async with anyio.create_task_group() as group:
        for i in range(10):
            group.start_soon(one, i)
    assert results == dict.fromkeys(range(10), "Hello, world")
    contexts = sorted(stream.context for stream in router.streams.values())
    assert contexts == [[f"{i}:{j}" for j in range(5)] for i in range(10)]
