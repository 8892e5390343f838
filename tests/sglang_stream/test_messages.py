"""Fingerprints of prefixes, and the keys of the chunk sockets."""

from __future__ import annotations

import asyncio
import hashlib
from array import array

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from router.link import Link
from sglang_stream import messages as m
from sglang_stream.errors import WorkerUnavailable

WELCOME = m.Welcome(m.PROTOCOL, "w", "unified", 100, 50, 1, 5000, 3)
lengths = st.integers(0, 3 * m.PREFIX_BLOCK + 1)


def prompt(length: int, salt: int = 0) -> bytes:
    return m.pack_tokens([i * 7 + salt for i in range(length)])


@given(lengths)
def test_a_block_covers_the_prompt_up_to_its_end(length: int) -> None:
    tokens = prompt(length)
    blocks = m.prefix_blocks(tokens)
    assert len(blocks) == length // m.PREFIX_BLOCK
    assert len(set(blocks)) == len(blocks)
    for i, block in enumerate(blocks, 1):
        raw = tokens[: 4 * m.PREFIX_BLOCK * i]
        assert block == hashlib.blake2b(raw, digest_size=8).digest()
        assert m.prefix_blocks(raw) == blocks[:i]


@given(st.integers(0, 3 * m.PREFIX_BLOCK - 1))
def test_prompts_share_the_blocks_before_their_first_difference(at: int) -> None:
    one = array("i", prompt(3 * m.PREFIX_BLOCK))
    other = array("i", one)
    other[at] += 1
    mine, theirs = m.prefix_blocks(one.tobytes()), m.prefix_blocks(other.tobytes())
    same = at // m.PREFIX_BLOCK
    assert mine[:same] == theirs[:same]
    assert not set(mine[same:]) & set(theirs[same:])


def test_namespaces_share_nothing() -> None:
    tokens = prompt(600)
    found = [m.prefix_blocks(tokens, name) for name in (None, "a", "b")]
    assert len({block for blocks in found for block in blocks}) == 6
    assert m.prefix_blocks(tokens, "") == m.prefix_blocks(tokens, None)


def test_the_keys_follow_from_the_secret() -> None:
    public, secret = m.curve_keys("s")
    assert (public, secret) == m.curve_keys("s")
    assert zmq.curve_public(secret) == public
    assert m.curve_keys("t")[0] != public


def greeted(workers_secret: str | None, routers_secret: str | None) -> m.Welcome:
    """What a router's greeting is answered with by a worker's socket."""

    async def main() -> m.Welcome:
        context = zmq.Context()
        socket = zmq.asyncio.Context(context).socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        if workers_secret is not None:
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = m.curve_keys(workers_secret)
        port = socket.bind_to_random_port("tcp://127.0.0.1")

        async def answer() -> None:
            while True:
                *address, payload = await socket.recv_multipart()
                assert m.decode_question(payload) == m.Hello(m.PROTOCOL)
                await socket.send_multipart([*address, m.encode(WELCOME)])

        answering = asyncio.create_task(answer())
        link = Link(context, f"tcp://127.0.0.1:{port}", 0.3, routers_secret, lambda _: None)
        try:
            return await link.hello(timeout_s=10.0 if workers_secret == routers_secret else None)
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            link.close("the test is over")
            socket.close()
            context.term()

    return asyncio.run(main())


@pytest.mark.parametrize("secret", [None, "s", "é" * 100])
def test_who_has_the_secret_is_answered(secret: str | None) -> None:
    assert greeted(secret, secret) == WELCOME


@pytest.mark.parametrize("secrets", [("s", "t"), ("s", None), (None, "s")])
def test_who_has_it_not_is_told_so(secrets: tuple[str | None, str | None]) -> None:
    with pytest.raises(WorkerUnavailable, match="refused the shared secret: SGLANG_STREAM_SECRET"):
        greeted(*secrets)
