"""Retrievers that fail, stall or are too slow, and callers that have read enough."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest

from sglang_stream import stream_chat
from sglang_stream.errors import StreamNotFound
from tests.end_to_end.asking import ask, ask_async, asked, in_thread, settings
from tests.end_to_end.server import Server, error_of, ok
from tests.end_to_end.texts import Prompts, ids, words
from tests.harness import wait_until

LONG = 1000
BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


class SiteIsDown(Exception):
    """What a retriever raises."""


def the_only_stream(server: Server, seq: int) -> str:
    """Waits until one stream is open and has `seq` calls; its id."""

    def found() -> str | None:
        streams = server.open_streams()
        ready = len(streams) == 1 and ok(server.look(streams[0]["id"]))["seq"] == seq
        return str(streams[0]["id"]) if ready else None

    return str(wait_until(found, 30, f"one stream with {seq} calls"))


def gone_everywhere(server: Server, stream: str) -> None:
    server.gone(stream)
    assert server.open_streams() == []
    wait_until(lambda: server.worker_metric("sglang_stream_held_tokens") == 0, 30, "no KV held")
    wait_until(lambda: server.worker_metric("sglang_stream_open_streams") == 0, 30, "none open")


@BOTH
def test_a_producer_that_raises(server: Server, asynchronous: bool) -> None:
    """Its own exception reaches the caller, and the stream is gone at once."""
    error, seen = SiteIsDown("503"), []

    def pages() -> Iterator[str]:
        yield words("page", 60)
        seen.append(the_only_stream(server, 1))
        raise error

    with pytest.raises(SiteIsDown) as caught:
        ask(server, pages(), asynchronous=asynchronous, question="?")
    assert caught.value is error
    error_of(server.look(seen[0]), 404, "stream_not_found")
    gone_everywhere(server, seen[0])


@BOTH
def test_an_item_of_no_known_kind(server: Server, asynchronous: bool) -> None:
    with pytest.raises(TypeError, match="item 2"):
        ask(server, ["a page", 7], asynchronous=asynchronous)
    wait_until(lambda: server.open_streams() == [], 10, "no stream left")


def test_others_go_on_while_one_stalls(server: Server) -> None:
    resume = threading.Event()

    def stalling() -> Iterator[str]:
        yield words("before", 60)
        assert resume.wait(60)
        yield words("after", 60)

    async def run() -> None:
        async def slow() -> None:
            answers.append(await ask_async(server, in_thread(stalling()), prompt="Slow:"))

        answers: list[Any] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(slow)
            await anyio.to_thread.run_sync(the_only_stream, server, 1)
            for i in range(3):
                quick = await ask_async(server, in_thread([words(i, 60)]), prompt="Quick:")
                assert quick.tokens == await anyio.to_thread.run_sync(cold, quick.prompt)
            assert len(server.open_streams()) == 1
            resume.set()
        assert answers[0].tokens == cold(answers[0].prompt)

    def cold(prompt: list[int]) -> list[int]:
        return server.cold(prompt).tokens

    asyncio.run(run())


def test_a_stream_that_expires_while_its_producer_stalls(server: Server, prompts: Prompts) -> None:
    """The SDK still has what it sent, and sends it again in a new stream."""
    pages = [words("early", 40), words("late", 40)]

    def stalling() -> Iterator[str]:
        yield pages[0]
        first = the_only_stream(server, 1)
        server.gone(first)
        yield pages[1]

    answer = ask(server, stalling(), asynchronous=False, prompt="Go: ", idle_timeout_s=1)
    assert prompts.decode(answer.prompt) == prompts.text({"prompt": "Go: "}, "".join(pages), "")
    assert answer.tokens == server.cold(answer.prompt).tokens


@pytest.mark.parametrize("leave", ["context", "close", "forget"])
def test_leaving_the_answer_early(server: Server, leave: str) -> None:
    """The generation ends in the engine, whichever way the caller leaves."""
    prompt, seen = ids(leave, 40), []

    def pages() -> Iterator[list[int]]:
        yield prompt
        seen.append(the_only_stream(server, 1))

    stream = stream_chat(pages(), input_ids=[7], **settings(server, {"max_tokens": LONG}))
    if leave == "context":
        with stream:
            assert next(stream)
    else:
        assert next(stream)
        stream.close() if leave == "close" else None
    del stream
    gone_everywhere(server, seen[0])
    server.flush()


@pytest.mark.anyio
async def test_leaving_the_answer_early_asynchronously(server: Server) -> None:
    seen: list[str] = []

    async def pages() -> AsyncIterator[str]:
        yield "a page"
        seen.append(await anyio.to_thread.run_sync(the_only_stream, server, 1))

    async with stream_chat(pages(), **settings(server, {"max_tokens": LONG})) as stream:
        async for _ in stream:
            break
    await anyio.to_thread.run_sync(gone_everywhere, server, seen[0])


@pytest.mark.anyio
async def test_a_cancelled_task_takes_its_stream_along(server: Server) -> None:
    """Cancelled while it waits for the retriever, and while it reads the answer."""

    async def pages(endless: bool) -> AsyncIterator[str]:
        yield "a page"
        seen.append(await anyio.to_thread.run_sync(the_only_stream, server, 1))
        if endless:
            reached.set()
            await anyio.sleep_forever()

    async def reading(endless: bool) -> None:
        async with stream_chat(pages(endless), **settings(server, {"max_tokens": LONG})) as stream:
            async for _ in stream:
                reached.set()

    for endless in (True, False):
        seen: list[str] = []
        reached = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reading, endless)
            with anyio.fail_after(60):
                await reached.wait()
            tasks.cancel_scope.cancel()
        await anyio.to_thread.run_sync(gone_everywhere, server, seen[0])


def test_a_deleted_stream_ends_the_reader(server: Server) -> None:
    """Somebody else drops the stream during the answer: what came stays, then the error comes."""
    seen: list[str] = []

    def pages() -> Iterator[str]:
        yield "a page"
        seen.append(the_only_stream(server, 1))

    with stream_chat(pages(), **settings(server, {"max_tokens": LONG})) as stream:
        assert next(stream)
        assert server.delete(seen[0]).status_code == 200
        with pytest.raises(StreamNotFound):
            list(stream)
    gone_everywhere(server, seen[0])


def test_a_completion_without_the_text_in_between(server: Server) -> None:
    """`get_final_completion` alone reads all."""
    with stream_chat([words("whole", 30)], prompt="Go", **settings(server, {})) as stream:
        completion = stream.get_final_completion()
        answer = asked(completion["choices"][0]["text"], completion, stream.usage)
        assert stream.ttft_s is not None
        assert stream.ttft_s > 0
    assert answer.tokens == server.cold(answer.prompt).tokens
