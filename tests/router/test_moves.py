"""Streams whose workers or routers are lost, and streams that are served by two routers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from router.moves import Moves
from sglang_stream import messages as m
from sglang_stream.session import Session
from tests.router.conftest import error_of, opened, until
from tests.router.fake_worker import greedy, text_of
from tests.router.rig import Rig, append, rig, text_from


@pytest.fixture(scope="module")
def made(tokenizer_dir: Path) -> Iterator[Rig]:
    with rig(tokenizer_dir, "unified", "unified") as found:
        yield found


@pytest.fixture
def pair(made: Rig) -> Iterator[Rig]:
    """Two routers in front of two workers."""
    made.reset()
    yield made
    made.reset()


ASK = {"input_ids": [50], "max_tokens": 8, "temperature": 0}
ANSWER_AFTER = [1, 11, 12, 13, 14, 15, 50]


def said(prompt: list[int]) -> str:
    return text_of(greedy(prompt, 8))


def test_a_worker_that_dies_between_chunks(pair: Rig) -> None:
    router = pair.routers[0]
    stream = opened(router)
    for seq in (1, 2, 3):
        append(router, stream, seq, [10 + seq])
    first = pair.holder(router, stream)
    second = pair.other(first)
    pair.lose(first)
    append(router, stream, 4, [14])
    append(router, stream, 5, [15])
    assert pair.tokens(second, stream) == ANSWER_AFTER[:-1]
    assert pair.holder(router, stream) == second
    assert pair.workers[second].streams[stream].opened.epoch == 1
    answer = router.post(f"/v1/streams/{stream}/generate", json=ASK | {"last_seq": 5})
    assert text_from(answer) == said(ANSWER_AFTER)
    # What it has left is dropped where it was, by a worker that was only silent.
    assert stream in pair.workers[first].streams
    pair.reset()
    until(lambda: stream not in pair.workers[first].streams)
    aborts = [e for e in pair.workers[first].events if e == m.Abort(stream)]
    assert aborts, "told with the epoch that it had there"


def test_a_stream_that_has_ended_is_not_opened_again(pair: Rig) -> None:
    router = pair.routers[0]
    stream = opened(router)
    append(router, stream, 1, [11])
    assert router.post(f"/v1/streams/{stream}/generate", json=ASK).status_code == 200
    first = pair.holder(router, stream)
    pair.lose(first)
    for path, body in (("chunks", {"seq": 2, "input_ids": [12]}), ("chunks", {"seq": 1})):
        refused = router.post(f"/v1/streams/{stream}/{path}", json={"input_ids": [11]} | body)
        assert error_of(refused, 409)["code"] == "stream_sealed"
    assert router.get(f"/v1/streams/{stream}").json()["status"] == "finished"
    assert stream not in pair.workers[pair.other(first)].streams


def test_an_update_stream_moves_with_its_latest_context(pair: Rig) -> None:
    one, two = pair.routers
    stream = opened(one, mode="update")
    url = f"/v1/streams/{stream}/context"
    for router, seq in ((one, 1), (two, 4), (one, 3)):
        answer = router.put(url, json={"seq": seq, "input_ids": [10 + seq] * seq})
        assert answer.status_code == 202, answer.text
    first = pair.holder(one, stream)
    assert pair.tokens(first, stream) == [1, *[14] * 4]
    pair.lose(first)
    until(lambda: pair.tokens(pair.other(first), stream) == [1, *[14] * 4])
    answer = one.put(url, json={"seq": 5, "input_ids": [15]})
    assert answer.json()["tokens"] == 2
    assert pair.tokens(pair.other(first), stream) == [1, 15]


@pytest.mark.parametrize("last_seq", [None, 5])
def test_calls_that_alternate_and_a_worker_lost_during_the_answer(
    pair: Rig, last_seq: int | None
) -> None:
    one, two = pair.routers
    stream = opened(one)
    for seq in range(1, 6):
        append((one, two)[seq % 2 == 1], stream, seq, [10 + seq])
    first = pair.holder(one, stream)
    pair.workers[first].gates = {3: threading.Event()}
    # The last chunk went through the other router.
    with ThreadPoolExecutor() as pool:
        body = ASK | {"last_seq": last_seq, "return_token_ids": True}
        answer = pool.submit(one.post, f"/v1/streams/{stream}/generate", json=body)
        until(lambda: any(s["call"]["id"] == stream for s in pair.workers[first].seals))
        pair.lose(first)
        assert text_from(answer.result()) == said(ANSWER_AFTER)
    answered = answer.result().json()
    assert answered["choices"][0]["token_ids"] == greedy(ANSWER_AFTER, 8)
    assert answered["usage"]["completion_tokens"] == 8
    assert answered["usage"]["prompt_tokens"] == len(ANSWER_AFTER)


def test_a_worker_lost_while_the_other_router_has_half_of_the_chunks(pair: Rig) -> None:
    one, two = pair.routers
    stream = opened(one)
    append(one, stream, 1, [11])
    append(two, stream, 2, [12])
    append(two, stream, 3, [13])
    append(one, stream, 4, [14])
    first = pair.holder(one, stream)
    second = pair.other(first)
    pair.lose(first)
    until(lambda: pair.tokens(second, stream) == ANSWER_AFTER[:5])
    append(two, stream, 5, [15])
    answer = two.post(f"/v1/streams/{stream}/generate", json=ASK | {"last_seq": 5})
    assert text_from(answer) == said(ANSWER_AFTER)


def test_what_the_other_router_did_not_know_is_sent_again(pair: Rig) -> None:
    router = pair.routers[0]
    stream = opened(router)
    for seq in range(1, 5):
        append(router, stream, seq, [10 + seq])
    # As if another router, which knew of the first two only, had moved it.
    held = pair.workers[pair.holder(router, stream)].streams[stream]
    known = {seq: held.chunks[seq] for seq in (1, 2)}
    session = Session(stream, "append")
    for seq, ids in known.items():
        session.record(seq, m.digest(ids.tobytes()))
    held.session, held.chunks = session, known
    append(router, stream, 5, [15])
    assert held.tokens.tolist() == ANSWER_AFTER[:-1]
    gap = router.post(f"/v1/streams/{stream}/chunks", json={"seq": 9, "input_ids": [1]})
    assert error_of(gap, 409)["expected_seq"] == 6


def test_a_router_that_knows_of_an_older_epoch_follows(pair: Rig) -> None:
    router = pair.routers[0]
    stream = opened(router)
    append(router, stream, 1, [11])
    held = pair.workers[pair.holder(router, stream)].streams[stream]
    held.opened = msgspec.structs.replace(held.opened, epoch=3)
    append(router, stream, 2, [12])
    assert held.tokens.tolist() == [1, 11, 12]
    sent = [e for w in pair.workers.values() for e in w.events if isinstance(e, m.Append)]
    assert [e.epoch for e in sent if e.stream_id == stream and e.seq == 2] == [0, 3]


def test_a_router_that_knows_of_an_older_epoch_deletes_the_later_one(pair: Rig) -> None:
    router = pair.routers[0]
    stream = opened(router)
    worker = pair.workers[pair.holder(router, stream)]
    held = worker.streams[stream]
    held.opened = msgspec.structs.replace(held.opened, epoch=3)
    assert router.delete(f"/v1/streams/{stream}").status_code == 200
    assert stream not in worker.streams


def test_another_opening_of_the_same_epoch_is_passed_by(pair: Rig) -> None:
    """The other router moves a stream that it takes for open, while this one continues its
    answer."""
    one, two = pair.routers
    stream = opened(one)
    append(one, stream, 1, [11])
    append(two, stream, 2, [12])
    first = pair.holder(one, stream)
    pair.workers[first].breaks_after = 4
    pair.workers[first].gates = {4: threading.Event()}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(one.post, f"/v1/streams/{stream}/generate", json=ASK)
        until(lambda: any(s["call"]["id"] == stream for s in pair.workers[first].seals))
        pair.lose(first)
        assert text_from(answer.result()) == said([1, 11, 12, 50])


def test_a_router_that_is_gone(pair: Rig) -> None:
    with ExitStack() as stack:
        gone = pair.add_router(stack)
        stream = opened(gone)
        append(gone, stream, 1, [11])
        pair.routers.remove(gone)
    for seq, router in zip((2, 3), pair.routers, strict=True):
        append(router, stream, seq, [10 + seq])
    assert pair.tokens(pair.holder(pair.routers[0], stream), stream) == [1, 11, 12, 13]
    error_of(pair.routers[0].get(f"/v1/streams/{stream[:-1]}x"), 404)


def test_a_router_that_has_nothing_to_do_with_a_stream_leaves_it_alone(pair: Rig) -> None:
    one, two = pair.routers
    stream = opened(one, idle_timeout_s=0.8)
    seq = 0
    while stream in {s["id"] for s in one.get("/v1/streams").json()["data"]}:
        seq += 1
        append(two, stream, seq, [11])
        threading.Event().wait(0.05)
    append(two, stream, seq + 1, [12])
    assert not [e for w in pair.workers.values() for e in w.events if e == m.Abort(stream)]
    append(one, stream, seq + 2, [13])
    assert len(pair.tokens(pair.holder(two, stream), stream)) == seq + 3


def test_an_answer_that_is_deleted_at_the_other_router_ends(pair: Rig) -> None:
    one, two = pair.routers
    stream = opened(one)
    append(two, stream, 1, [11])
    first = pair.holder(one, stream)
    pair.workers[first].gates = {3: threading.Event()}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(one.post, f"/v1/streams/{stream}/generate", json=ASK)
        until(lambda: any(s["call"]["id"] == stream for s in pair.workers[first].seals))
        assert two.delete(f"/v1/streams/{stream}").status_code == 200
        pair.workers[first].gates[3].set()
        error_of(answer.result(), 404)
    assert not pair.tokens(pair.other(first), stream), "it is not continued elsewhere"


def test_a_copy_that_was_left_behind_is_not_taken(pair: Rig) -> None:
    with ExitStack() as stack:
        gone = pair.add_router(stack)
        stream = opened(gone)
        append(gone, stream, 1, [11])
        first = pair.holder(gone, stream)
        pair.lose(first)
        append(gone, stream, 2, [12])
        pair.routers.remove(gone)
    pair.reset()
    assert pair.tokens(first, stream) == [1, 11], "the router that could tell it is no more"
    for seq, router in zip((3, 4), pair.routers, strict=True):
        append(router, stream, seq, [10 + seq])
    assert pair.tokens(pair.other(first), stream) == [1, 11, 12, 13, 14]


def test_what_was_left_on_workers_that_never_return_does_not_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.moves._REMEMBERED", 3)
    told: list[m.Abort] = []

    class Returned:
        def __init__(self, url: str) -> None:
            self.url = url

        async def ask(self, event: m.Abort) -> None:
            told.append(event)

    moves: Any = Moves(*[cast(Any, None)] * 5)
    gone, back = Returned("http://gone"), Returned("http://back")
    for i, worker in enumerate((back, back, gone, back, gone)):
        moves.left(SimpleNamespace(id=f"st-{i}", epoch=i, owner=b""), worker)
    asyncio.run(moves.clear_left(back))
    assert told == [m.Abort("st-3", epoch=3)]
    asyncio.run(moves.clear_left(gone))
    assert [abort.stream_id for abort in told] == ["st-3", "st-2", "st-4"]
    asyncio.run(moves.clear_left(back))
    assert len(told) == 3
