"""Stream calls one by one: what is refused, with which status, and that it changes nothing."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from tests.end_to_end.asking import Asked, ask
from tests.end_to_end.server import (
    CONTEXT,
    MAX_BODY,
    MAX_CHUNK,
    MAX_OPEN,
    Server,
    error_of,
    ok,
    token_ids,
)
from tests.end_to_end.texts import ids
from tests.harness import wait_until

# --- sequence numbers -------------------------------------------------------------------------


def test_append_numbers(server: Server) -> None:
    """Repeated, repeated with other content, missing and reversed: only the right ones count."""
    first, second, third = (ids(("append", i), 40) for i in range(3))
    stream = server.open(input_ids=[7, 8])
    assert ok(server.append(stream, 1, first), 202) == {"seq": 1, "tokens": 42}
    assert ok(server.append(stream, 1, first), 202) == {"seq": 1, "tokens": 42}
    error_of(server.append(stream, 1, second), 409, "seq_conflict")
    gap = error_of(server.append(stream, 3, third), 409, "seq_gap")
    assert (gap["expected_seq"], gap["param"]) == (2, "seq")
    assert ok(server.append(stream, 2, second), 202) == {"seq": 2, "tokens": 82}
    assert ok(server.append(stream, 3, third), 202) == {"seq": 3, "tokens": 122}
    assert ok(server.append(stream, 2, second), 202)["seq"] == 2
    state = ok(server.look(stream))
    assert (state["seq"], state["usage"]["stream"]["chunks"]) == (3, 3)
    answer = server.generate(stream, last_seq=3)
    assert token_ids(answer) == server.cold([7, 8, *first, *second, *third]).tokens


def test_update_numbers(server: Server) -> None:
    """The highest number wins, gaps are allowed, what comes late is without effect."""
    newest, stale, other = (ids(name, 80) for name in ("newest", "stale", "other"))
    stream = server.open(mode="update", input_ids=[7, 8])
    assert ok(server.update(stream, 9, newest), 202) == {"seq": 9, "tokens": 82, "lcp": 2}
    assert ok(server.update(stream, 4, stale), 202)["tokens"] == 82
    assert ok(server.update(stream, 9, newest), 202)["tokens"] == 82
    error_of(server.update(stream, 9, other), 409, "seq_conflict")
    assert ok(server.update(stream, 12, [*newest[:50], 9]), 202)["lcp"] == 52
    assert ok(server.update(stream, 13, newest), 202)["lcp"] == 52
    assert ok(server.look(stream))["usage"]["stream"]["updates"] == 3
    answer = server.generate(stream, last_seq=13)
    assert token_ids(answer) == server.cold([7, 8, *newest]).tokens


def test_a_last_number_that_is_not_there_yet_seals_nothing(server: Server) -> None:
    first, second = ids("first", 60), ids("second", 60)
    stream = server.open()
    server.append(stream, 1, first)
    gap = error_of(server.generate(stream, last_seq=2, request_id="a"), 409, "seq_gap")
    assert (gap["expected_seq"], gap["param"]) == (2, "last_seq")
    assert ok(server.look(stream))["status"] == "open"
    assert ok(server.append(stream, 2, second), 202)["tokens"] == 120
    error_of(server.generate(stream, last_seq=1, request_id="a"), 409, "seq_conflict")
    answer = server.generate(stream, last_seq=2, request_id="a")
    assert token_ids(answer) == server.cold([*first, *second]).tokens


@pytest.mark.parametrize("mode", ["append", "update"])
def test_a_sealed_stream_takes_no_more(server: Server, mode: str) -> None:
    """A repeat of what it has is acknowledged: its first answer may have been lost."""
    content = ids("sealed", 50)
    stream = server.open(mode=mode)
    send = server.append if mode == "append" else server.update
    ok(send(stream, 1, content), 202)
    tokens = token_ids(server.generate(stream, last_seq=1))
    error_of(send(stream, 2, content), 409, "stream_sealed")
    error_of(server.generate(stream, last_seq=1), 409, "stream_sealed")
    assert ok(server.look(stream))["status"] == "finished"
    assert tokens == server.cold(content).tokens


def test_the_wrong_mode(server: Server) -> None:
    append, update = server.open(), server.open(mode="update")
    error_of(server.update(append, 1, [5]), 409, "wrong_mode")
    error_of(server.append(update, 1, [5]), 409, "wrong_mode")
    assert [ok(server.look(s))["seq"] for s in (append, update)] == [0, 0]


# --- lengths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_prompts_around_the_context_length(server: Server, beyond: int) -> None:
    """Prompt and answer fill the context to its last token, and no further."""
    prompt = ids("long", CONTEXT - 8 + beyond)
    stream = server.open()
    server.append(stream, 1, prompt[:-3])
    body: dict[str, Any] = {"input_ids": prompt[-3:], "last_seq": 1}
    if beyond > 0:
        refused = server.generate(stream, 8, **body)
        error = error_of(refused, 400, "context_length_exceeded")
        assert "at most 7" in error["message"]
        assert ok(server.look(stream))["status"] == "open"
        assert len(token_ids(server.generate(stream, 7, **body))) == 7
        return
    tokens = token_ids(server.generate(stream, 8, **body))
    assert len(tokens) == 8
    # SGLang's own requests end some tokens short of the context.
    assert tokens[:2] == server.cold(prompt, 2).tokens


def test_without_a_limit_the_answer_fills_the_context(server: Server) -> None:
    stream = server.open(input_ids=ids("long", CONTEXT - 12))
    body = {"temperature": 0, "ignore_eos": True}
    answer = ok(server.http.post(f"/v1/streams/{stream}/generate", json=body))
    assert answer["usage"]["total_tokens"] == CONTEXT


def test_more_tokens_than_the_context(server: Server) -> None:
    prompt = ids("long", CONTEXT)
    error_of(
        server.http.post("/v1/streams", json={"input_ids": [*prompt, 5]}), 413, "prompt_too_long"
    )
    stream, other = server.open(), server.open(mode="update", input_ids=[5])
    assert ok(server.append(stream, 1, prompt), 202)["tokens"] == CONTEXT
    error_of(server.append(stream, 2, [5]), 413, "prompt_too_long")
    error_of(server.append(stream, 2, chunks=["more"]), 413, "prompt_too_long")
    error_of(server.update(other, 1, prompt), 413, "prompt_too_long")
    assert ok(server.look(stream))["usage"]["prompt_tokens"] == CONTEXT
    assert ok(server.look(other))["usage"]["prompt_tokens"] == 1
    error_of(server.generate(stream, 1, last_seq=1), 400, "context_length_exceeded")
    assert server.delete(stream).status_code == 200


def test_bodies_over_the_limits(server: Server) -> None:
    stream = server.open()
    text = "a" * (MAX_CHUNK + 1)
    error_of(server.append(stream, 1, chunks=[text]), 413, "body_too_large")
    error_of(server.append(stream, 1, chunks=[text] * 5), 413, "body_too_large")
    too_much = server.http.post("/v1/completions", content=b" " * (MAX_BODY + 1))
    error_of(too_much, 413, "body_too_large")
    assert ok(server.append(stream, 1, [5]), 202) == {"seq": 1, "tokens": 1}


# --- nothing to send --------------------------------------------------------------------------


def test_empty_chunks(server: Server) -> None:
    stream = server.open(input_ids=[])
    assert ok(server.append(stream, 1, []), 202)["tokens"] == 0
    assert ok(server.append(stream, 2, chunks=[""]), 202)["tokens"] == 0
    error = error_of(server.generate(stream, last_seq=2), 400, "invalid_request")
    assert "empty" in error["message"]
    assert ok(server.append(stream, 3, ids("some", 50)), 202)["tokens"] == 50
    assert ok(server.append(stream, 4, chunks=["", ""]), 202)["tokens"] == 50
    assert token_ids(server.generate(stream, last_seq=4)) == server.cold(ids("some", 50)).tokens


def test_empty_documents(server: Server) -> None:
    """An empty document leaves its blank line; an empty list leaves nothing."""
    stream = server.open(mode="update", input_ids=ids("opening", 30))
    server.update(stream, 1, documents=["", "a page"])
    server.computed(stream, 31)
    assert ok(server.update(stream, 2, documents=[]), 202) == {"seq": 2, "tokens": 30, "lcp": 30}
    assert ok(server.update(stream, 3, documents=[""]), 202)["tokens"] > 30
    assert ok(server.update(stream, 4, []), 202)["tokens"] == 30
    answer = server.generate(stream, last_seq=4)
    assert token_ids(answer) == server.cold(ids("opening", 30)).tokens


# --- malformed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"seq": 0, "input_ids": [5]}, "seq"),
        ({"seq": 1, "input_ids": [8192]}, "input_ids"),
        ({"seq": 1, "input_ids": [-1]}, "input_ids"),
        ({"seq": 1, "input_ids": [2**31]}, "input_ids"),
        ({"seq": 1, "documents": ["a"]}, "documents"),
        ({"seq": 1, "chunks": [{"id": "a"}]}, "chunks"),
        ({"seq": 1}, ""),
        ({}, "seq"),
    ],
)
def test_malformed_chunks(server: Server, body: dict[str, Any], named: str) -> None:
    stream = server.open()
    answer = server.http.post(f"/v1/streams/{stream}/chunks", json=body)
    error = error_of(answer, 422, "malformed")
    assert str(error["param"] or "").startswith(named)
    assert ok(server.look(stream))["seq"] == 0


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"input_ids": [8192]},
        {"question": "a", "input_ids": [5]},
        {"response_format": "json"},
        {"n": 2},
        {"best_of": 2},
    ],
)
def test_malformed_generations_seal_nothing(server: Server, body: dict[str, Any]) -> None:
    stream = server.open(input_ids=[5])
    answer = server.http.post(f"/v1/streams/{stream}/generate", json=body)
    error_of(answer, 422, "malformed")
    assert ok(server.look(stream))["status"] == "open"


# --- streams that are not there ---------------------------------------------------------------


def assert_unknown(server: Server, stream: str) -> None:
    for answer in (
        server.append(stream, 1, [5]),
        server.update(stream, 1, [5]),
        server.generate(stream),
        server.look(stream),
        server.delete(stream),
    ):
        error_of(answer, 404, "stream_not_found")


@pytest.mark.parametrize("stream", ["st-", f"st-{'0' * 32}", "nonsense"])
def test_unknown_streams(server: Server, stream: str) -> None:
    assert_unknown(server, stream)


def test_ids_that_are_prefixes_of_one_another(server: Server) -> None:
    """The beginning of a stream's id is not its id."""
    stream = server.open(input_ids=[5])
    for part in (stream[:-1], stream + "0"):
        assert_unknown(server, part)
    assert len(token_ids(server.generate(stream))) == 8


def test_an_idle_stream_expires(server: Server) -> None:
    """Whether somebody asks for it or not; what it held is free again."""
    asked_for, forgotten = server.open(idle_timeout_s=1), server.open(idle_timeout_s=1)
    assert server.router_metric("sglang_stream_router_open_streams") == 2
    for stream in (asked_for, forgotten):
        ok(server.append(stream, 1, ids("idle", 200)), 202)
    server.gone(asked_for, 15)
    assert_unknown(server, asked_for)
    wait_until(
        lambda: server.router_metric("sglang_stream_router_open_streams") == 0, 15, "none open"
    )
    assert_unknown(server, forgotten)
    wait_until(lambda: server.worker_metric("sglang_stream_held_tokens") == 0, 15, "none held")


def test_calls_keep_a_stream_alive(server: Server) -> None:
    """Its time begins again with each chunk, also with a repeated one."""
    stream = server.open(idle_timeout_s=1.5)
    witness = server.open(idle_timeout_s=3)
    while server.look(witness).status_code == 200:
        ok(server.append(stream, 1, [5, 6]), 202)
    assert len(token_ids(server.generate(stream, last_seq=1))) == 8


# --- limits -----------------------------------------------------------------------------------


def test_too_many_open_streams(server: Server) -> None:
    streams = [server.open() for _ in range(MAX_OPEN)]
    refused = server.http.post("/v1/streams", json={"prompt": "one more"})
    assert error_of(refused, 429, "limit_reached")["type"] == "rate_limit_error"
    assert refused.headers["Retry-After"] == "1"
    assert server.delete(streams[3]).status_code == 200
    again = server.open(input_ids=[5])
    assert len(token_ids(server.generate(again))) == 8
    # A sealed stream is not open any more.
    assert server.http.post("/v1/streams", json={"prompt": "one more"}).status_code == 201


def test_the_sdk_waits_for_its_turn(server: Server) -> None:
    streams = [server.open() for _ in range(MAX_OPEN)]
    answers: list[Asked] = []

    def asking() -> None:
        answers.append(ask(server, ["some text"], asynchronous=False, prompt="Go"))

    refusals = 'sglang_stream_router_requests_total{method="POST",route="/v1/streams",status="429"'
    before = server.router_metric(refusals)
    thread = threading.Thread(target=asking)
    thread.start()
    wait_until(lambda: server.router_metric(refusals) > before, 30, "a refusal")
    assert server.delete(streams[0]).status_code == 200
    thread.join(60)
    assert answers[0].tokens == server.cold(answers[0].prompt).tokens


def test_a_path_or_method_that_is_not_there(server: Server) -> None:
    for answer in (server.http.get("/v1/nothing"), server.http.put("/v1/streams", json={})):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["message"]


def test_the_object_that_describes_a_stream(server: Server) -> None:
    stream = server.open(mode="update", messages=[{"role": "system", "content": "Be."}])
    state = ok(server.look(stream))
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    assert state["object"] == "stream"
    assert (state["id"], state["mode"], state["model"]) == (stream, "update", model)
    assert (state["status"], state["seq"]) == ("open", 0)
    assert [s["id"] for s in server.open_streams()] == [stream]
    error_of(
        server.http.post("/v1/streams", json={"prompt": "a", "model": "gpt"}),
        404,
        "model_not_found",
    )
