"""Two routers behind nginx: the calls of one stream alternate, and either may go."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.calls import append, cold, generate, opened, tokens, update
from tests.cluster.processes import KILLED_S, REPEATS, ClusterProcesses, Process
from tests.docker.nginx import nginx_program, running_nginx

ANSWER = 12


@pytest.fixture
def balanced(cluster: ClusterProcesses, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of nginx in front of the two routers."""
    if nginx_program() is None:
        pytest.skip("nginx is not installed: `make setup` does it as root")
    addresses = [router.url.removeprefix("http://") for router in cluster.routers]
    with (
        running_nginx(tmp_path, addresses) as url,
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        yield http


def chunk_calls(router: Process) -> float:
    """How many chunk and context calls a router has had accepted."""
    page = httpx.get(f"{router.url}/metrics").text.splitlines()
    name = "sglang_stream_router_chunks_total "
    return float(next(line for line in page if line.startswith(name)).removeprefix(name))


def test_the_calls_of_one_stream_alternate(
    cluster: ClusterProcesses, balanced: httpx.Client
) -> None:
    before = [chunk_calls(router) for router in cluster.routers]
    opening, tail = tokens("lb opening", 20), tokens("lb tail", 10)
    pieces = [tokens(f"lb {i}", 150) for i in range(8)]
    stream = opened(balanced, "append", opening)
    for seq, piece in enumerate(pieces, 1):
        append(balanced, stream, seq, piece)
    answer = generate(balanced, stream, tail, ANSWER, last_seq=8)
    prompt = [*opening, *(t for piece in pieces for t in piece), *tail]
    assert (answer.error, answer.ids) == (None, cold(cluster.http, prompt, ANSWER).ids)
    served = [chunk_calls(r) - b for r, b in zip(cluster.routers, before, strict=True)]
    assert sum(served) == 8
    assert min(served) >= 2


def test_an_update_stream_over_both(cluster: ClusterProcesses, balanced: httpx.Client) -> None:
    opening, tail = tokens("lbu opening", 20), tokens("lbu tail", 10)
    base = tokens("lbu base", 300)
    stream = opened(balanced, "update", opening)
    for seq in range(1, 7):
        context = [*base[: 50 * seq], *tokens(f"lbu {seq}", 100)]
        update(balanced, stream, seq, context)
    answer = generate(balanced, stream, tail, ANSWER, last_seq=6)
    expected = cold(cluster.http, [*opening, *context, *tail], ANSWER).ids
    assert (answer.error, answer.ids) == (None, expected)


@pytest.mark.parametrize("again", REPEATS)
@pytest.mark.parametrize("which", [0, 1])
def test_a_router_killed_between_chunks(
    cluster: ClusterProcesses, balanced: httpx.Client, which: int, again: int
) -> None:
    opening, tail = tokens("rk opening", 20), tokens("rk tail", 10)
    pieces = [tokens(f"rk {which} {again} {i}", 200) for i in range(6)]
    prompt = [*opening, *(t for piece in pieces for t in piece), *tail]
    expected = cold(cluster.routers[1 - which].client(), prompt, ANSWER).ids
    stream = opened(balanced, "append", opening)
    for seq, piece in enumerate(pieces, 1):
        if seq == 4:
            cluster.routers[which].kill()
            killed = time.monotonic()
        append(balanced, stream, seq, piece)
    call = uuid.uuid4().hex
    answer = generate(balanced, stream, tail, ANSWER, last_seq=6, request_id=call)
    took_s = time.monotonic() - killed
    print(f"router killed between chunks: answered after {took_s:.1f} s")
    assert took_s <= KILLED_S
    assert (answer.error, answer.ids) == (None, expected)


def test_a_worker_lost_after_the_router_that_opened(
    cluster: ClusterProcesses, balanced: httpx.Client
) -> None:
    """The router that is left has what the other one sent, and replays all of it."""
    opening, tail = tokens("rw opening", 20), tokens("rw tail", 10)
    pieces = [tokens(f"rw {i}", 200) for i in range(6)]
    prompt = [*opening, *(t for piece in pieces for t in piece), *tail]
    left = cluster.routers[1].client()
    expected = cold(left, prompt, ANSWER).ids
    stream = opened(balanced, "append", opening)
    for seq, piece in enumerate(pieces[:4], 1):
        append(balanced, stream, seq, piece)
    append(left, stream, 5, pieces[4])
    holder = left.get(f"/v1/streams/{stream}").json()["prefill_worker"]
    cluster.routers[0].kill()
    cluster.worker(holder).kill()
    append(balanced, stream, 6, pieces[5])
    answer = generate(balanced, stream, tail, ANSWER, last_seq=6)
    assert (answer.error, answer.ids) == (None, expected)
