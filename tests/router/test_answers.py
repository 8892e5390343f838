"""Generate calls over HTTP: answers, refusals, repeats, and clients that vanish."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from router.generation import Generation
from sglang_stream import messages as m
from tests.router.conftest import call_and_leave, error_of, opened, until
from tests.router.fake_worker import QUERY, FakeWorker

CHAT: dict[str, Any] = {"messages": []}
STREAM_USAGE = {
    "chunks": 3,
    "updates": 1,
    "lcp_tokens": 7,
    "invalidated_tokens": 0,
    "computed_tokens": 11,
    "ready_tokens": 10,
    "early_kv_bytes": 0,
    "late_kv_bytes": 0,
    "preemptions": 0,
    "recomputed_tokens": 0,
}


def generate(client: httpx.Client, stream_id: str, /, **body: Any) -> httpx.Response:
    return client.post(f"/v1/streams/{stream_id}/generate", json=body)


def events(lines: Iterator[str]) -> list[Any]:
    """The data of all events; `[DONE]` as it is."""
    data = [line.removeprefix("data: ") for line in lines if line]
    return [d if d == "[DONE]" else json.loads(d) for d in data]


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The comings and goings of all clients that read a generation."""
    seen: list[str] = []
    attached = Generation.attached

    @contextmanager
    def noted(generation: Generation) -> Iterator[None]:
        try:
            with attached(generation):
                seen.append("came")
                yield
        finally:
            seen.append("left")

    monkeypatch.setattr(Generation, "attached", noted)
    return seen


def gate(worker: FakeWorker, *steps: int) -> list[threading.Event]:
    worker.gates.update({step: threading.Event() for step in steps})
    return [worker.gates[step] for step in steps]


# --- answers ----------------------------------------------------------------------------------


def test_a_whole_chat_completion(client: httpx.Client) -> None:
    answer = generate(client, opened(client, **CHAT), question="Why?", max_tokens=3)
    assert answer.status_code == 200
    body = answer.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello there"},
            "logprobs": None,
            "finish_reason": "stop",
            "matched_stop": 2,
        }
    ]
    usage = body["usage"]
    ttft = usage["stream"].pop("router_ttft_ms")
    assert 0 < ttft < 20_000
    prompt = len("<user>Why?</><assistant>")
    assert usage == {
        "prompt_tokens": prompt,
        "completion_tokens": 3,
        "total_tokens": prompt + 3,
        "prompt_tokens_details": {"cached_tokens": 4},
        "stream": STREAM_USAGE,
    }


def test_a_whole_text_completion_with_its_ids(client: httpx.Client, worker: FakeWorker) -> None:
    worker.finish = {"type": "length", "length": 3}
    stream = opened(client, input_ids=[7, 8])
    client.post(f"/v1/streams/{stream}/chunks", json={"seq": 1, "input_ids": [9]})
    answer = generate(client, stream, input_ids=[10], return_token_ids=True, last_seq=1).json()
    assert answer["object"] == "text_completion"
    assert answer["prompt_token_ids"] == [7, 8, 9, 10]
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "Hello there",
            "logprobs": None,
            "finish_reason": "length",
            "token_ids": [100, 101, 102],
        }
    ]


@pytest.mark.parametrize("incremental", [False, True])
def test_a_streamed_chat(client: httpx.Client, worker: FakeWorker, incremental: bool) -> None:
    assert not incremental or worker.incremental
    answer = generate(client, opened(client, **CHAT), stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    *chunks, last, done = events(answer.iter_lines())
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": "Hel"},
        {"content": "lo"},
        {"content": " there"},
    ]
    assert all(c["object"] == "chat.completion.chunk" and "usage" not in c for c in chunks)
    assert {c["choices"][0]["finish_reason"] for c in chunks} == {None}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["stream"]["ready_tokens"] == 10


@pytest.fixture
def worker(worker: FakeWorker, request: pytest.FixtureRequest) -> FakeWorker:
    """As everywhere, but in the form of events that the test asks for."""
    call = getattr(request.node, "callspec", None)
    worker.incremental = bool(call and call.params.get("incremental"))
    return worker


@pytest.mark.parametrize("incremental", [False, True])
def test_a_streamed_text_with_ids_and_usage(
    client: httpx.Client, worker: FakeWorker, incremental: bool
) -> None:
    answer = generate(
        client,
        opened(client, input_ids=[3]),
        stream=True,
        stream_options={"include_usage": True},
        return_token_ids=True,
    )
    first, *chunks, last, usage, done = events(answer.iter_lines())
    assert first["prompt_token_ids"] == [3]
    assert all("prompt_token_ids" not in chunk for chunk in chunks)
    choices = [c["choices"][0] for c in (first, *chunks, last)]
    assert [c["text"] for c in choices] == ["Hel", "lo", " there", ""]
    assert [c["token_ids"] for c in choices] == [[100], [101], [102], []]
    assert (usage["choices"], usage["usage"]) == ([], last["usage"])
    assert done == "[DONE]"


def test_no_character_is_cut(client: httpx.Client, worker: FakeWorker) -> None:
    worker.script = ["a\ufffd", "a\N{SNOWMAN}", "a\N{SNOWMAN}\ufffd\ufffd"]
    whole = generate(client, opened(client, prompt=""), stream=True, return_token_ids=True)
    texts = [e["choices"][0]["text"] for e in events(whole.iter_lines()) if e != "[DONE]"]
    assert texts == ["a", "\N{SNOWMAN}", "\ufffd\ufffd", ""]


def test_the_first_token_is_told_of_even_without_text(
    client: httpx.Client, worker: FakeWorker
) -> None:
    worker.script = ["", "", "x"]
    (second,) = gate(worker, 1)
    with client.stream(
        "POST", f"/v1/streams/{opened(client, **CHAT)}/generate", json={"stream": True}
    ) as answer:
        lines = (line for line in answer.iter_lines() if line)
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        second.set()
        rest = events(lines)
    assert rest[0]["choices"][0]["delta"] == {"content": "x"}


def test_the_least_tokens_of_an_answer_reach_the_worker(
    client: httpx.Client, worker: FakeWorker
) -> None:
    generate(client, opened(client), max_tokens=5, min_tokens=2)
    assert worker.seals[0]["sampling_params"]["min_new_tokens"] == 2


def test_the_seal_that_reaches_the_worker(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client, **CHAT)
    body = {
        "question": "Why?",
        "last_seq": 0,
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "stop": ["x"],
        "stop_token_ids": [3],
        "seed": 11,
        "n": 1,
        "ignore_eos": True,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "skip_special_tokens": False,
        "logit_bias": {"5": 1.5},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    }
    assert generate(client, stream, **body).status_code == 200
    (seal,) = worker.seals
    assert (seal["input_ids"], seal["stream"], len(seal["rid"])) == ([0], True, 32)
    params = seal["sampling_params"]
    del params["custom_params"]
    assert params == {
        "max_new_tokens": 5,
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "stop": ["x"],
        "stop_token_ids": [3],
        "sampling_seed": 11,
        "ignore_eos": True,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "skip_special_tokens": False,
        "logit_bias": {"5": 1.5},
        "json_schema": '{"type":"object"}',
    }
    call = seal["call"]
    assert (call["id"], call["last_seq"]) == (stream, 0)
    assert len(call["tail"]) == len("Why?</><assistant>")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"tools": []}, "tools"),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"max_tokens": 1, "min_tokens": 2}, "min_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"question": "a", "input_ids": [1]}, "input_ids"),
        ({"input_ids": [300]}, "input_ids"),
        ({"regex": "a", "json_schema": "{}"}, "regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"last_seq": -1}, "last_seq"),
        ({"request_id": ""}, "request_id"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_a_malformed_generate_changes_nothing(
    client: httpx.Client, worker: FakeWorker, body: dict[str, Any], named: str
) -> None:
    stream = opened(client)
    assert named in error_of(generate(client, stream, **body), 422)["message"]
    assert worker.seals == []
    assert generate(client, stream).status_code == 200


def test_the_context_length(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client, input_ids=[1] * 990)
    refused = error_of(generate(client, stream, input_ids=[2, 3], max_tokens=9), 400)
    assert refused["code"] == "context_length_exceeded"
    assert generate(client, stream, input_ids=[2, 3], max_tokens=8).status_code == 200
    full = opened(client, input_ids=[1] * 1000)
    assert error_of(generate(client, full), 400)["code"] == "context_length_exceeded"
    assert generate(client, opened(client, input_ids=[1] * 999)).status_code == 200
    assert worker.seals[-1]["sampling_params"]["max_new_tokens"] is None


# --- refusals and failures --------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_a_refused_seal_leaves_the_stream_open(
    client: httpx.Client, worker: FakeWorker, streamed: bool
) -> None:
    stream = opened(client)
    call = {"last_seq": 1, "request_id": "r", "stream": streamed}
    gap = error_of(generate(client, stream, **call), 409)
    assert (gap["code"], gap["expected_seq"]) == ("seq_gap", 1)
    assert client.get(f"/v1/streams/{stream}").json()["status"] == "open"
    client.post(f"/v1/streams/{stream}/chunks", json={"seq": 1, "input_ids": [4]})
    assert generate(client, stream, **call).status_code == 200


def test_an_abort_of_the_engine_is_an_error(client: httpx.Client, worker: FakeWorker) -> None:
    worker.finish = {"type": "abort", "message": "out of memory", "status_code": 500}
    worker.script = [""]
    error = error_of(generate(client, opened(client), stream=True), 500)
    assert "out of memory" in error["message"]


def test_an_error_after_the_first_token_is_an_event(
    client: httpx.Client, worker: FakeWorker
) -> None:
    worker.finish = {"type": "abort", "message": "out of memory", "status_code": 500}
    answer = generate(client, opened(client), stream=True)
    assert answer.status_code == 200
    *chunks, error = events(answer.iter_lines())
    assert [c["choices"][0]["text"] for c in chunks] == ["Hel", "lo"]
    assert error["error"]["code"] == "engine_failure"
    assert error_of(generate(client, opened(client)), 500)["code"] == "engine_failure"


def test_an_answer_that_just_stops(client: httpx.Client, worker: FakeWorker) -> None:
    worker.script = []
    assert error_of(generate(client, opened(client)), 500)["code"] == "engine_failure"


# --- afterwards -------------------------------------------------------------------------------


def test_a_sealed_stream_takes_nothing_more(client: httpx.Client, worker: FakeWorker) -> None:
    stream, updating = opened(client), opened(client, mode="update")
    for sealed in (stream, updating):
        assert generate(client, sealed, request_id="r").status_code == 200
    answer = client.post(f"/v1/streams/{stream}/chunks", json={"seq": 1, "chunks": ["a"]})
    assert error_of(answer, 409)["code"] == "stream_sealed"
    worker.streams.clear()  # the worker has forgotten, the router has not
    answer = client.put(f"/v1/streams/{updating}/context", json={"seq": 1, "documents": []})
    assert error_of(answer, 409)["code"] == "stream_sealed"
    assert error_of(generate(client, stream), 409)["code"] == "stream_sealed"
    assert error_of(generate(client, stream, request_id="s"), 409)["code"] == "stream_sealed"
    again = error_of(generate(client, stream, request_id="r"), 409)
    assert again["code"] == "generation_started"
    state = client.get(f"/v1/streams/{stream}").json()
    assert (state["status"], state["usage"]["stream"]) == ("finished", STREAM_USAGE)
    assert client.get("/v1/streams").json()["data"] == []
    assert client.delete(f"/v1/streams/{stream}").status_code == 200
    error_of(client.delete(f"/v1/streams/{stream}"), 404)


# --- repeats and clients that vanish ----------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_a_repeat_before_the_first_token_joins(
    client: httpx.Client, worker: FakeWorker, readers: list[str], streamed: bool
) -> None:
    (first,) = gate(worker, 0)
    stream = opened(client, **CHAT)
    call = {"request_id": "r", "stream": streamed}
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(generate, client, stream, **call) for _ in range(2)]
        until(lambda: readers == ["came", "came"])
        other = error_of(generate(client, stream, request_id="s"), 409)
        assert other["code"] == "stream_sealed"
        first.set()
        answers = [w.result() for w in waiting]
    assert [a.status_code for a in answers] == [200, 200]
    assert answers[0].text == answers[1].text
    assert len(worker.seals) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_comes_back(
    client: httpx.Client, worker: FakeWorker, readers: list[str], streamed: bool
) -> None:
    (first,) = gate(worker, 0)
    stream = opened(client)
    call = {"request_id": "r", "stream": streamed}
    vanish(client, worker, stream, call)
    until(lambda: readers == ["came", "left"])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(generate, client, stream, **call)
        until(lambda: readers == ["came", "left", "came"])
        first.set()
        answer = waiting.result()
    assert answer.status_code == 200
    assert "there" in answer.text
    assert worker.cut == []
    assert len(worker.seals) == 1


def vanish(client: httpx.Client, worker: FakeWorker, stream: str, call: dict[str, Any]) -> None:
    """A generate call whose client is gone when its seal has reached the worker."""
    sealed = len(worker.seals)
    call_and_leave(
        client, f"/v1/streams/{stream}/generate", call, lambda: len(worker.seals) > sealed
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_stays_away(client: httpx.Client, worker: FakeWorker, streamed: bool) -> None:
    gate(worker, 0)
    stream = opened(client)
    vanish(client, worker, stream, {"request_id": "r", "stream": streamed})
    until(lambda: worker.cut == [worker.seals[0]["rid"]])
    until(lambda: [e for e in worker.events if isinstance(e, m.Abort)] == [m.Abort(stream)])
    error_of(generate(client, stream, request_id="r"), 404)
    error_of(client.get(f"/v1/streams/{stream}"), 404)


@pytest.mark.parametrize("settings", [{"resume_grace_s": 60.0}])
def test_a_client_gone_after_the_first_token_ends_it(
    client: httpx.Client, worker: FakeWorker
) -> None:
    gate(worker, 1)
    stream = opened(client)
    call = {"stream": True, "request_id": "r"}
    with client.stream("POST", f"/v1/streams/{stream}/generate", json=call) as answer:
        assert "Hel" in next(answer.iter_lines())
    until(lambda: worker.cut == [worker.seals[0]["rid"]])
    again = error_of(generate(client, stream, request_id="r"), 409)
    assert again["code"] == "generation_started"


def test_a_look_during_which_the_client_leaves(client: httpx.Client, worker: FakeWorker) -> None:
    """The worker's answer is older than the end, and does not bring the stream back."""
    gate(worker, 1)
    stream = opened(client)
    url = f"/v1/streams/{stream}/generate"
    with ThreadPoolExecutor(1) as pool:
        with client.stream("POST", url, json={"stream": True}) as answer:
            lines = answer.iter_lines()
            assert "Hel" in next(lines)
            until(lambda: m.Query(stream) in worker.events)
            (query,) = gate(worker, QUERY)
            looking = pool.submit(client.get, f"/v1/streams/{stream}")
            until(lambda: worker.heard.count(m.Query(stream)) == 2)
        until(lambda: worker.cut == [worker.seals[0]["rid"]])
        query.set()
        error_of(looking.result(), 404)
    error_of(client.get(f"/v1/streams/{stream}"), 404)


def test_two_readers_one_leaves(
    client: httpx.Client, worker: FakeWorker, readers: list[str]
) -> None:
    first, second = gate(worker, 0, 1)
    stream = opened(client)
    call = {"stream": True, "request_id": "r"}

    def first_line() -> str:
        url = f"/v1/streams/{stream}/generate"
        with client.stream("POST", url, json=call) as answer:
            return next(answer.iter_lines())

    with ThreadPoolExecutor(2) as pool:
        staying = pool.submit(generate, client, stream, **call)
        leaving = pool.submit(first_line)
        until(lambda: readers == ["came", "came"])
        first.set()
        assert "Hel" in leaving.result()
        until(lambda: readers == ["came", "came", "left"])
        second.set()
        assert "there" in staying.result().text
    assert worker.cut == []


def test_delete_ends_a_generation(client: httpx.Client, worker: FakeWorker) -> None:
    gate(worker, 1)
    stream = opened(client)
    body = {"stream": True}
    with client.stream("POST", f"/v1/streams/{stream}/generate", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        assert client.delete(f"/v1/streams/{stream}").status_code == 200
        (error,) = events(lines)
    assert error["error"]["code"] == "stream_not_found"
    until(lambda: worker.cut)
    error_of(client.delete(f"/v1/streams/{stream}"), 404)


def test_delete_before_the_first_token(client: httpx.Client, worker: FakeWorker) -> None:
    gate(worker, 0)
    stream = opened(client)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(generate, client, stream)
        until(lambda: worker.seals)
        assert client.delete(f"/v1/streams/{stream}").status_code == 200
        error_of(waiting.result(), 404)
    until(lambda: worker.cut)


def test_delete_when_the_worker_is_done_already(client: httpx.Client, worker: FakeWorker) -> None:
    gate(worker, 1)
    stream = opened(client)
    url = f"/v1/streams/{stream}/generate"
    with client.stream("POST", url, json={"stream": True}) as answer:
        lines = answer.iter_lines()
        assert "Hel" in next(lines)
        worker.streams[stream].session.finish()
        assert client.delete(f"/v1/streams/{stream}").status_code == 200
    error_of(client.get(f"/v1/streams/{stream}"), 404)
