"""Ordinary calls that pass through, over HTTP."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from router.identity import worker_tag
from sglang_stream.errors import EngineFailure, WorkerUnavailable
from tests.router.conftest import call_and_leave, error_of, until
from tests.router.fake_worker import FakeWorker
from tests.router.rig import Rig, health, rig


def test_an_answer_comes_back_as_it_is(client: httpx.Client, worker: FakeWorker) -> None:
    answer = client.post("/v1/completions", json={"prompt": [1]}, headers={"X-Mine": "1"})
    assert (answer.status_code, answer.json()) == (200, {"ok": True})
    assert len(answer.headers.get_list("date")) == 1
    (seen,) = worker.forwarded
    assert seen["body"] == {"prompt": [1]}
    assert seen["headers"]["x-mine"] == "1"
    assert seen["headers"]["host"] != client.base_url.netloc.decode()


def test_an_error_of_the_worker_gets_openais_shape(client: httpx.Client) -> None:
    fields = {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}
    bad = json.dumps({"object": "error", **fields})
    answer = client.post("/v1/chat/completions", json={"bad": bad})
    assert (answer.status_code, answer.json()) == (400, {"error": fields})
    assert answer.headers["x-kept"] == "yes"


@pytest.mark.parametrize("bad", ['{"error":{"message":"no"}}', '{"detail":"no"}', "[]", "no", ""])
def test_other_errors_of_the_worker_come_back_as_they_are(client: httpx.Client, bad: str) -> None:
    answer = client.post("/v1/chat/completions", json={"bad": bad})
    assert (answer.status_code, answer.text) == (400, bad)


def test_models(client: httpx.Client) -> None:
    models = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none").models.list()
    assert [model.id for model in models] == ["tiny"]


@pytest.mark.parametrize("name", ["a%12b", "a/b", "a%20b", "%C3%A9", "a%2Fb", "a%3Fb", "a%25b"])
def test_the_name_of_a_model_arrives_as_it_was_written(
    client: httpx.Client, worker: FakeWorker, name: str
) -> None:
    answer = httpx.get(f"{client.base_url}/v1/models/{name}?x=%12")
    assert answer.json() == {"path": f"/v1/models/{name}", "query": "x=%12"}


@pytest.mark.parametrize("path", ["../../server_info", "./a", 'a"b'])
def test_no_other_path_of_a_worker_can_be_reached(client: httpx.Client, path: str) -> None:
    """With `..`, which the call to the worker would resolve."""
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address) as raw:
        raw.sendall(f"GET /v1/models/{path} HTTP/1.0\r\nHost: a\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404 "), answer
    assert b"model_not_found" in answer


def test_events_are_not_held_back(client: httpx.Client, worker: FakeWorker) -> None:
    worker.gates = {1: threading.Event(), 2: threading.Event()}
    body = {"stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        received = answer.iter_text()
        for step in range(3):
            assert next(received) == f"data: {step}\n\n"
            worker.gates.get(step + 1, threading.Event()).set()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_ends_the_call(
    client: httpx.Client, worker: FakeWorker, streamed: bool
) -> None:
    worker.gates = {0: threading.Event()}
    body = {"stream": streamed}
    call_and_leave(client, "/v1/chat/completions", body, lambda: worker.forwarded)
    until(lambda: worker.cut == ["plain"])


def test_a_body_over_the_limit(client: httpx.Client, worker: FakeWorker) -> None:
    answer = client.post("/v1/completions", content=b"a" * 300_000)
    assert error_of(answer, 413)["code"] == "body_too_large"
    assert worker.forwarded == []


# --- workers that fail ------------------------------------------------------------------------

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def made(tokenizer_dir: Path) -> Iterator[Rig]:
    quick = {"retry_initial_backoff_ms": 1, "cb_failure_threshold": 100}
    with rig(tokenizer_dir, "unified", "unified", routers=1, **quick) as found:
        yield found


@pytest.fixture
def pair(made: Rig) -> Iterator[Rig]:
    """A router in front of two workers."""
    made.reset()
    for worker in made.workers.values():
        worker.forwarded = []
    yield made
    made.reset()


def asked(pair: Rig) -> str:
    """The URL of the worker that has got the call."""
    return next(url for url, worker in pair.workers.items() if worker.forwarded)


def events_of(received: Iterator[str]) -> list[str]:
    return "".join(received).removesuffix("\n\n").split("\n\n")


def error_in(event: str) -> dict[str, Any]:
    return dict(json.loads(event.removeprefix("data: "))["error"])


def test_an_answer_ends_when_its_worker_hangs(pair: Rig) -> None:
    for worker in pair.workers.values():
        worker.gates = {1: threading.Event()}
    with pair.routers[0].stream("POST", CHAT, json={"stream": True}) as answer:
        received = answer.iter_text()
        assert next(received) == "data: 0\n\n"
        pair.lose(asked(pair))
        (last,) = events_of(received)
    assert "silent" in error_in(last)["message"]


@pytest.mark.parametrize("settings", [{"request_timeout_secs": 0.5}])
@pytest.mark.parametrize("begun", [False, True])
def test_an_answer_that_takes_too_long(
    client: httpx.Client, worker: FakeWorker, begun: bool
) -> None:
    worker.gates = {int(begun): threading.Event()}
    with client.stream("POST", CHAT, json={"stream": True}) as answer:
        received = answer.iter_text()
        if begun:
            assert next(received) == "data: 0\n\n"
            error = error_in("".join(received))
        else:
            answer.read()
            error = error_of(answer, 503)
    assert "--request-timeout-secs (0.5 s)" in error["message"]
    until(lambda: worker.cut == ["plain"])


def test_an_answer_whose_connection_breaks(pair: Rig) -> None:
    for worker in pair.workers.values():
        worker.breaks_after = 1
    with pair.routers[0].stream("POST", CHAT, json={"stream": True}) as answer:
        first, cut, last = events_of(answer.iter_text())
    assert (first, cut) == ("data: 0", "data: ")
    assert error_in(last)["code"] == "worker_unavailable"

    whole = {"stream": True, "as": "application/json"}
    with (
        pair.routers[0].stream("POST", CHAT, json=whole) as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        answer.read()


@pytest.mark.parametrize("error", [EngineFailure("no forward"), WorkerUnavailable("queue full")])
def test_a_worker_that_fails_is_passed_by_and_then_left_alone(
    tokenizer_dir: Path, error: EngineFailure | WorkerUnavailable
) -> None:
    quick = {"retry_initial_backoff_ms": 1, "cb_failure_threshold": 3}
    with rig(tokenizer_dir, "unified", "unified", routers=1, **quick) as made:
        failing, healthy = made.workers.values()
        failing.fails = error
        for _ in range(12):
            assert made.routers[0].post(CHAT, json={}).json() == {"ok": True}
        assert (len(failing.forwarded), len(healthy.forwarded)) == (3, 12)


def test_the_only_worker_is_not_asked_again_for_what_it_failed(
    client: httpx.Client, worker: FakeWorker
) -> None:
    worker.fails = EngineFailure("no forward")
    assert error_of(client.post(CHAT, json={}), 500)["message"] == "no forward"
    assert len(worker.forwarded) == 1


def test_an_answer_outlives_the_prefill_worker(tokenizer_dir: Path) -> None:
    with rig(tokenizer_dir, "prefill", "decode", routers=1) as made:
        (url, prefill), (_, decode) = made.workers.items()
        decode.gates = {1: threading.Event()}
        prefill.gates = {2: threading.Event()}
        with made.routers[0].stream("POST", CHAT, json={"stream": True}) as answer:
            received = answer.iter_text()
            assert next(received) == "data: 0\n\n"
            made.lose(url)
            decode.gates[1].set()
            assert events_of(received) == ["data: 1", "data: 2"]


def test_a_running_answer_ends_on_a_worker_that_is_draining(pair: Rig) -> None:
    (router,) = pair.routers
    for worker in pair.workers.values():
        worker.gates = {1: threading.Event()}
    with router.stream("POST", CHAT, json={"stream": True}) as answer:
        received = answer.iter_text()
        assert next(received) == "data: 0\n\n"
        first = asked(pair)
        assert router.delete(f"/workers/{worker_tag(first)}").json()["draining"]
        threading.Event().wait(0.5)
        assert first in health(router)
        pair.workers[first].gates[1].set()
        assert events_of(received) == ["data: 1", "data: 2"]
    until(lambda: first not in health(router))
    router.post("/workers", json={"url": first})
