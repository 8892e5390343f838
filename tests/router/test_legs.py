"""Generations whose prompt is computed on one worker and whose answer on another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_stream import messages as m
from sglang_stream.errors import (
    ContextLengthExceeded,
    EngineFailure,
    StreamError,
    WorkerUnavailable,
)
from tests.router.conftest import error_of, opened, until
from tests.router.fake_worker import FakeWorker, greedy, text_of
from tests.router.rig import Rig, append, rig, text_from

ASK = {"input_ids": [50], "max_tokens": 8, "temperature": 0}
PROMPT = [1, 11, 12, 50]


@pytest.fixture(scope="module")
def made(tokenizer_dir: Path) -> Iterator[Rig]:
    roles: tuple[m.Role, ...] = ("prefill", "decode", "decode")
    quick = {"retry_max_retries": 1, "retry_initial_backoff_ms": 1, "cb_failure_threshold": 100}
    with rig(tokenizer_dir, *roles, routers=1, **quick) as found:
        yield found


@pytest.fixture
def apart(made: Rig) -> Iterator[Rig]:
    """A router in front of a prefill worker and two decode workers."""
    made.reset()
    for worker in made.workers.values():
        worker.seals, worker.cut, worker.events = [], [], []
    yield made
    made.reset()


def split(apart: Rig) -> tuple[FakeWorker, list[FakeWorker]]:
    prefill, *decode = apart.workers.values()
    return prefill, decode


def sealable(apart: Rig) -> str:
    router = apart.routers[0]
    stream = opened(router)
    append(router, stream, 1, [11])
    append(router, stream, 2, [12])
    return stream


def is_let_go(decode: list[FakeWorker], legs: int) -> bool:
    """Whether each leg that was opened was told to end, and no stream is left of it."""
    events = [e for w in decode for e in w.events]
    opens = [e.stream_id for e in events if isinstance(e, m.Open)]
    aborts = [e.stream_id for e in events if isinstance(e, m.Abort)]
    return len(opens) == legs and sorted(opens) == sorted(aborts)


def test_both_legs_meet_in_one_room(apart: Rig) -> None:
    prefill, decode = split(apart)
    stream = sealable(apart)
    answer = apart.routers[0].post(f"/v1/streams/{stream}/generate", json=ASK | {"last_seq": 2})
    assert text_from(answer) == text_of(greedy(PROMPT, 8))
    (sealed,) = prefill.seals
    (leg,) = [seal for w in decode for seal in w.seals]
    for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room"):
        assert sealed[name] == leg[name]
    assert (sealed["bootstrap_host"], sealed["bootstrap_port"]) == ("127.0.0.1", 8998)
    assert 0 <= sealed["bootstrap_room"] < 1 << 63
    assert (sealed["call"]["id"], sealed["call"]["tail"]) == (stream, [50])
    assert leg["call"]["id"] != stream
    assert leg["rid"] != sealed["rid"]
    assert leg["call"]["tail"] == []
    (opening,) = [e for w in decode for e in w.events if isinstance(e, m.Open)]
    assert opening.tokens == m.pack_tokens(PROMPT)


def test_a_prefill_leg_that_fails_ends_the_decode_leg(apart: Rig) -> None:
    prefill, decode = split(apart)
    stream = sealable(apart)
    prefill.fails = EngineFailure("no forward")
    for worker in decode:
        worker.gates = {0: threading.Event()}
    answer = apart.routers[0].post(f"/v1/streams/{stream}/generate", json=ASK)
    assert "no forward" in error_of(answer, 500)["message"]
    until(lambda: sum(len(w.cut) for w in decode) == 2)  # of both attempts
    until(lambda: is_let_go(decode, 2))


def test_a_decode_leg_that_fails_ends_the_prefill_leg(apart: Rig) -> None:
    prefill, decode = split(apart)
    stream = sealable(apart)
    prefill.gates = {0: threading.Event()}
    for worker in decode:
        worker.fails = EngineFailure("no room")
    answer = apart.routers[0].post(f"/v1/streams/{stream}/generate", json=ASK)
    assert "no room" in error_of(answer, 500)["message"]
    until(lambda: len(prefill.cut) == 2)
    until(lambda: is_let_go(decode, 2))


@pytest.mark.parametrize("error", [EngineFailure("no forward"), WorkerUnavailable("queue full")])
def test_a_prefill_worker_that_fails_is_not_asked_again_beside_another_one(
    tokenizer_dir: Path, error: StreamError
) -> None:
    quick = {"retry_initial_backoff_ms": 1, "cb_failure_threshold": 100}
    roles: tuple[m.Role, ...] = ("prefill", "prefill", "decode")
    with rig(tokenizer_dir, *roles, routers=1, **quick) as made, ThreadPoolExecutor() as pool:
        (router,) = made.routers
        alone, stream = sealable(made), sealable(made)  # on one each
        first, second = made.holder(router, stream), made.holder(router, alone)
        failing, healthy = made.workers[first], made.workers[second]
        *_, decode = made.workers.values()
        failing.fails = error
        decode.gates = {0: threading.Event()}  # it has no KV yet
        answer = pool.submit(router.post, f"/v1/streams/{stream}/generate", json=ASK)
        until(lambda: healthy.seals or answer.done())
        decode.gates[0].set()
        assert text_from(answer.result()) == text_of(greedy(PROMPT, 8))
        assert len(failing.seals) == 1
        assert healthy.streams[stream].opened.epoch == 1
        until(lambda: stream not in failing.streams)

        # It is better than none.
        made.lose(second)
        decode.gates = {0: threading.Event()}
        error_of(router.post(f"/v1/streams/{alone}/generate", json=ASK), error.status)
        assert len(failing.seals) == 1 + 4


def test_a_decode_worker_that_fails_is_not_asked_again_beside_another_one(
    tokenizer_dir: Path,
) -> None:
    quick = {"retry_initial_backoff_ms": 1, "cb_failure_threshold": 100}
    with rig(tokenizer_dir, "prefill", "decode", "decode", routers=0) as made:
        prefill, idle, busy = made.workers.values()
        idle.fails = EngineFailure("no room")
        busy.report = m.Report(1, 0.0, 0, 0, 0, 9, 9, 0, 0.0)
        router = made.add_router(**quick)
        stream = sealable(made)
        answer = router.post(f"/v1/streams/{stream}/generate", json=ASK)
        assert text_from(answer) == text_of(greedy(PROMPT, 8))
        assert (len(prefill.seals), len(idle.seals), len(busy.seals)) == (2, 1, 1)


def test_a_seal_that_the_prefill_worker_refuses_leaves_the_stream_open(apart: Rig) -> None:
    prefill, decode = split(apart)
    stream = sealable(apart)
    for worker in decode:
        worker.gates = {0: threading.Event()}
    url = f"/v1/streams/{stream}/generate"
    router = apart.routers[0]
    assert error_of(router.post(url, json=ASK | {"last_seq": 3}), 409)["expected_seq"] == 3
    until(lambda: is_let_go(decode, 1))
    assert prefill.streams[stream].session.state == "open"
    apart.reset()
    assert text_from(router.post(url, json=ASK | {"last_seq": 2})) == text_of(greedy(PROMPT, 8))


def test_a_request_that_the_decode_worker_refuses_leaves_the_stream_open(apart: Rig) -> None:
    _, decode = split(apart)
    stream = sealable(apart)
    for worker in decode:
        worker.fails = ContextLengthExceeded("over the KV pool")
    url = f"/v1/streams/{stream}/generate"
    router = apart.routers[0]
    assert error_of(router.post(url, json=ASK), 400)["code"] == "context_length_exceeded"
    until(lambda: router.get(f"/v1/streams/{stream}").json()["status"] == "open")
    apart.reset()
    assert text_from(router.post(url, json=ASK)) == text_of(greedy(PROMPT, 8))


@pytest.mark.parametrize("breaks", [False, True], ids=["silent", "disconnected"])
def test_a_decode_worker_lost_during_the_answer(apart: Rig, breaks: bool) -> None:
    prefill, decode = split(apart)
    router = apart.routers[0]
    stream = sealable(apart)
    for worker in decode:
        worker.gates = {5: threading.Event()}
    with ThreadPoolExecutor() as pool:
        body = ASK | {"return_token_ids": True}
        answer = pool.submit(router.post, f"/v1/streams/{stream}/generate", json=body)
        until(lambda: any(w.seals for w in decode))
        first, second = sorted(decode, key=lambda w: not w.seals)
        until(lambda: prefill.streams[stream].session.state == "finished")
        until(lambda: router.get(f"/v1/streams/{stream}").json()["status"] == "sealed")
        second.gates = {}
        if breaks:
            first.breaks_after = 5
            first.gates[5].set()
        else:
            apart.lose(next(url for url, w in apart.workers.items() if w is first))
        text_from(answer.result())
    choice = answer.result().json()["choices"][0]
    assert choice["token_ids"] == greedy(PROMPT, 8)
    assert choice["text"] == text_of(greedy(PROMPT, 8))
    assert prefill.streams[stream].opened.epoch == 1


def test_without_a_decode_worker_a_stream_is_not_opened(apart: Rig) -> None:
    _, decode = split(apart)
    for url, worker in apart.workers.items():
        if worker in decode:
            apart.lose(url)
    answer = apart.routers[0].post("/v1/streams", json={"input_ids": [1], "mode": "append"})
    assert error_of(answer, 503)["retry_after"] == 1


def begun(apart: Rig, router: httpx.Client, stream: str, pool: ThreadPoolExecutor) -> Any:
    """An answer of which the decode worker has given a part, after the prefill leg's end."""
    prefill, decode = split(apart)
    for worker in decode:
        worker.gates = {5: threading.Event()}
    answer = pool.submit(router.post, f"/v1/streams/{stream}/generate", json=ASK)
    until(lambda: any(w.seals for w in decode))
    until(lambda: prefill.streams[stream].session.state == "finished")
    until(lambda: router.get(f"/v1/streams/{stream}").json()["status"] == "sealed")
    return answer


@pytest.mark.parametrize("known", [False, True])
def test_an_answer_is_deleted_through_another_router(apart: Rig, known: bool) -> None:
    _, decode = split(apart)
    stream = sealable(apart)
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        other = apart.add_router(stack)
        apart.routers.remove(other)
        if known:
            assert other.get(f"/v1/streams/{stream}").json()["status"] == "open"
        answer = begun(apart, apart.routers[0], stream, pool)
        assert other.delete(f"/v1/streams/{stream}").status_code == 200
        until(lambda: is_let_go(decode, 1))
        for worker in decode:
            worker.gates[5].set()
        error_of(answer.result(), 404)
        error_of(other.delete(f"/v1/streams/{stream}"), 404)


def test_an_answer_is_deleted_by_its_owner_only(tokenizer_dir: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a:key-a\nb:key-b\n")
    settings = {"api_key_file": str(keys), "admin_api_key": "admin-key"}
    with rig(tokenizer_dir, "prefill", "decode", **settings) as keyed, ThreadPoolExecutor() as pool:
        one, two = keyed.routers
        one.headers["Authorization"] = "Bearer key-a"
        stream = sealable(keyed)
        answer = begun(keyed, one, stream, pool)
        foreign = {"Authorization": "Bearer key-b"}
        for router in (one, two):
            error_of(router.delete(f"/v1/streams/{stream}", headers=foreign), 404)
        assert not any(isinstance(e, m.Abort) for w in split(keyed)[1] for e in w.events)
        assert two.delete(f"/v1/streams/{stream}").status_code == 200, "by the admin"
        split(keyed)[1][0].gates[5].set()
        error_of(answer.result(), 404)
