"""One link to a worker's socket, which the test plays itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq
import zmq.asyncio

from router.link import Link
from sglang_stream import messages as m
from sglang_stream.errors import SequenceGap, WorkerUnavailable

WELCOME = m.Welcome(m.PROTOCOL, "w", "unified", 100, 50, 1, 5000, 3)


class Peer:
    """The worker's end: takes questions one by one and answers them in any order."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    async def take(self) -> tuple[list[bytes], m.Question]:
        *address, payload = await asyncio.wait_for(self._socket.recv_multipart(), 10)
        return address, m.decode_question(payload)

    async def answer(self, address: list[bytes], answer: m.Answer) -> None:
        await self._socket.send_multipart([*address, m.encode(answer)])

    async def is_silent(self) -> bool:
        return not await self._socket.poll(50)


@asynccontextmanager
async def linked(
    timeout_s: float = 10, load: list[m.Report | m.Snapshot] | None = None
) -> AsyncIterator[tuple[Link, Peer]]:
    load = [] if load is None else load
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    link = Link(zmq.Context.instance(), f"tcp://127.0.0.1:{port}", timeout_s, None, load.append)
    try:
        yield link, Peer(socket)
    finally:
        link.close("the test is over")
        socket.close(linger=0)
        context.term()


def run(test: Callable[[Link, Peer], Awaitable[None]], timeout_s: float = 10) -> None:
    async def main() -> None:
        async with linked(timeout_s) as (link, peer):
            await test(link, peer)

    asyncio.run(main())


def test_answers_find_their_questions_in_any_order() -> None:
    async def test(link: Link, peer: Peer) -> None:
        link.grant(3)
        asking = [asyncio.create_task(link.ask(m.Query(name))) for name in ("a", "b")]
        (to_a, a), (to_b, b) = await peer.take(), await peer.take()
        assert (a, b) == (m.Query("a"), m.Query("b"))
        assert len(to_a[1]) == 8
        await peer.answer(to_b, m.Accepted(2, 0))
        await peer.answer(to_a, m.Accepted(1, 0))
        assert [(await task).seq for task in asking] == [1, 2]

    run(test)


def test_a_refusal_is_raised_as_it_was() -> None:
    async def test(link: Link, peer: Peer) -> None:
        asking = asyncio.create_task(link.ask(m.Query("a")))
        address, _ = await peer.take()
        await peer.answer(address, m.Refused("seq_gap", "a gap", "seq", 7))
        with pytest.raises(SequenceGap, match="a gap") as refused:
            await asking
        assert (refused.value.param, refused.value.expected_seq) == ("seq", 7)

    run(test)


def test_no_more_questions_than_credits() -> None:
    async def test(link: Link, peer: Peer) -> None:
        link.grant(3)  # one is the heartbeat's
        asking = [asyncio.create_task(link.ask(m.Query(name))) for name in "abcd"]
        first, second = await peer.take(), await peer.take()
        assert await peer.is_silent()
        greeting = asyncio.create_task(link.hello())
        address, hello = await peer.take()
        assert hello == m.Hello(m.PROTOCOL)
        await peer.answer(address, WELCOME)
        assert await greeting == WELCOME
        await peer.answer(second[0], m.Accepted(0, 0))
        third = await peer.take()
        assert third[1] == m.Query("c")
        assert await peer.is_silent()
        await peer.answer(first[0], m.Accepted(0, 0))
        fourth = await peer.take()
        assert fourth[1] == m.Query("d")
        for address, _ in (third, fourth):
            await peer.answer(address, m.Accepted(0, 0))
        await asyncio.gather(*asking)

    run(test)


def test_no_answer_in_time_gives_the_credit_back() -> None:
    async def test(link: Link, peer: Peer) -> None:
        link.grant(2)
        with pytest.raises(WorkerUnavailable, match=r"within 0\.1 s"):
            await link.ask(m.Query("a"))
        late, _ = await peer.take()
        await peer.answer(late, m.Accepted(9, 0))
        asking = asyncio.create_task(link.ask(m.Query("b")))
        address, _ = await peer.take()
        await peer.answer(address, m.Accepted(1, 0))
        assert (await asking).seq == 1

    run(test, timeout_s=0.1)


def test_a_closed_link_leaves_nobody_waiting() -> None:
    async def test(link: Link, peer: Peer) -> None:
        link.grant(2)
        asking = [asyncio.create_task(link.ask(m.Query(name))) for name in "ab"]
        await peer.take()
        link.close("the worker is gone")
        for task in asking:
            with pytest.raises(WorkerUnavailable, match="is gone"):
                await task

    run(test)


@pytest.mark.parametrize(
    "answer", [m.Refused("malformed", "this worker speaks protocol 2"), m.Accepted(0, 0)]
)
def test_a_worker_of_another_protocol(answer: m.Answer) -> None:
    async def test(link: Link, peer: Peer) -> None:
        greeting = asyncio.create_task(link.hello())
        address, _ = await peer.take()
        await peer.answer(address, answer)
        with pytest.raises(WorkerUnavailable, match="protocol"):
            await greeting

    run(test)


def test_a_report_right_after_a_snapshot_is_told_after_it() -> None:
    report = m.Report(8, 0.0, 100, 0, 0, 0, 0, 0, 0.0)
    told: list[m.Report | m.Snapshot] = []

    async def main() -> None:
        async with linked(load=told) as (link, peer):
            asking = asyncio.create_task(link.snapshot())
            (identity, call), question = await peer.take()
            assert question == m.Resync()
            await peer.answer([identity, call], m.Snapshot(7, b""))
            await peer.answer([identity, bytes(8)], report)
            await asking
            async with asyncio.timeout(10):
                while len(told) < 2:  # noqa: ASYNC110 (nothing else tells)
                    await asyncio.sleep(0.001)

    asyncio.run(main())
    assert told == [m.Snapshot(7, b""), report]
