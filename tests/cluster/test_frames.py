"""What a broken or hostile peer may put on the chunk socket: no wrong token, and a counter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import zmq

from sglang_stream import messages as m
from tests.cluster.calls import append, cold, generate, opened, tokens
from tests.cluster.processes import SECRET, ClusterProcesses
from tests.harness import wait_until

ANSWER = 8


class Wire:
    """A DEALER socket to the worker that holds a stream, which sends frames as they are."""

    def __init__(self, worker_url: str, secret: str | None = SECRET) -> None:
        state = httpx.get(f"{worker_url}/server_info").json()["internal_states"][0]
        self.socket: Any = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if secret is not None:
            self.socket.curve_publickey, self.socket.curve_secretkey = zmq.curve_keypair()
            self.socket.curve_serverkey, _ = m.curve_keys(secret)
        self.socket.connect(state["sglang_stream"]["endpoint"])
        self._calls = 0

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(list(frames))

    def tell(self, question: m.Question) -> bytes:
        self._calls += 1
        self.send(self._calls.to_bytes(8, "big"), m.encode(question))
        return m.encode(question)

    def heard(self, timeout_s: float = 10) -> Any:
        assert self.socket.poll(timeout_s * 1000), "no answer on the chunk socket"
        return m.decode_said(self.socket.recv_multipart()[-1])


@pytest.fixture
def victim(cluster: ClusterProcesses) -> Iterator[tuple[str, str, Wire]]:
    """An open stream, its worker's URL, and a wire to it."""
    stream = opened(cluster.http, "append", tokens("frames", 20))
    url = cluster.http.get(f"/v1/streams/{stream}").json()["prefill_worker"]
    wire = Wire(url)
    yield stream, url, wire
    wire.socket.close()


def odd(url: str, kind: str) -> float:
    """How many odd events of a kind the worker has counted."""
    name = f'sglang_stream_odd_events_total{{kind="{kind}"}} '
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def chunk(stream: str, seq: int, ids: list[int], **fields: Any) -> m.Append:
    packed = m.pack_tokens(ids)
    return m.Append(stream, seq, packed, m.digest(packed), **fields)


def repeated(wire: Wire, stream: str) -> str:
    wire.tell(chunk(stream, 1, tokens("one", 100)))
    assert isinstance(wire.heard(), m.Accepted)
    return "repeated"


def reordered(wire: Wire, stream: str) -> str:
    wire.tell(chunk(stream, 3, tokens("three", 50)))
    assert wire.heard().code == "seq_gap"
    return "gap"


def other_content(wire: Wire, stream: str) -> str:
    wire.tell(chunk(stream, 1, tokens("forged", 100)))
    assert wire.heard().code == "seq_conflict"
    return "conflict"


def truncated(wire: Wire, stream: str) -> str:
    whole = m.encode(chunk(stream, 2, tokens("two", 50)))
    for end in (0, 1, 5, len(whole) // 2, len(whole) - 1):
        wire.send(b"12345678", whole[:end])
        assert wire.heard().code == "malformed"
    wire.send(b"one frame")
    wire.send(b"short id", b"", b"", whole)
    return "unreadable"


def torn_tokens(wire: Wire, stream: str) -> str:
    ids = m.pack_tokens(tokens("two", 50))[:-3]
    wire.tell(m.Append(stream, 2, ids, m.digest(ids)))
    assert wire.heard().code == "malformed"
    return "refused"


def noise(wire: Wire, stream: str) -> str:
    rng = random.Random(5)
    for _ in range(50):
        wire.send(b"12345678", rng.randbytes(rng.randint(1, 200)))
        assert wire.heard().code == "malformed"
    return "unreadable"


def foreign(wire: Wire, stream: str) -> str:
    for event in (
        chunk(stream, 2, tokens("theirs", 50), owner=b"somebody"),
        m.Abort(stream, owner=b"somebody"),
        m.Query(stream, owner=b"somebody"),
        m.Fetch(stream, owner=b"somebody"),
    ):
        wire.tell(event)
        assert wire.heard().code == "stream_not_found"
    return "foreign"


def unknown(wire: Wire, stream: str) -> str:
    wire.tell(chunk(f"st-{'0' * 40}", 1, [5]))
    assert wire.heard().code == "stream_not_found"
    return "unknown"


def outdated(wire: Wire, stream: str) -> str:
    wire.tell(chunk(stream, 2, tokens("late", 50), epoch=-1))
    assert wire.heard().code == "stream_moved"
    return "moved"


@pytest.mark.parametrize(
    "attack",
    [
        repeated,
        reordered,
        other_content,
        truncated,
        torn_tokens,
        noise,
        foreign,
        unknown,
        outdated,
    ],
    ids=lambda f: f.__name__,
)
def test_odd_frames_change_nothing_and_are_counted(
    cluster: ClusterProcesses,
    victim: tuple[str, str, Wire],
    attack: Callable[[Wire, str], str],
) -> None:
    stream, url, wire = victim
    http = cluster.http
    append(http, stream, 1, tokens("one", 100))
    kinds = ("repeated", "gap", "conflict", "unreadable", "refused", "foreign", "unknown", "moved")
    before = {kind: odd(url, kind) for kind in kinds}
    kind = attack(wire, stream)
    wait_until(lambda: odd(url, kind) > before[kind], 10, f"an event counted as {kind}")
    append(http, stream, 2, tokens("two", 80))
    tail = tokens("tail", 5)
    answer = generate(http, stream, tail, ANSWER, last_seq=2)
    prompt = [*tokens("frames", 20), *tokens("one", 100), *tokens("two", 80), *tail]
    assert (answer.error, answer.ids) == (None, cold(http, prompt, ANSWER).ids)
    wire.tell(m.Query(stream, owner=b"somebody"))
    assert wire.heard().code == "stream_not_found", "a finished stream is its owner's too"


@pytest.mark.parametrize("secret", [None, "another"])
def test_without_the_secret_nobody_is_heard(
    cluster: ClusterProcesses, victim: tuple[str, str, Wire], secret: str | None
) -> None:
    _, url, insider = victim
    outsider = Wire(url, secret)
    outsider.tell(m.Hello(m.PROTOCOL))
    insider.tell(m.Hello(m.PROTOCOL))
    assert isinstance(insider.heard(), m.Welcome)
    assert not outsider.socket.poll(500)
    outsider.socket.close()
