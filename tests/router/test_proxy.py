"""Ordinary calls that pass through, over HTTP."""

from __future__ import annotations

import json
import socket
import threading

import httpx
import openai
import pytest

from tests.router.conftest import call_and_leave, error_of, until
from tests.router.fake_worker import FakeWorker


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
