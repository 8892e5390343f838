"""The stream calls besides generate, and the calls about the router itself, over HTTP."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from router.server import create_app
from sglang_stream import messages as m
from sglang_stream.errors import PromptTooLong
from tests.router.conftest import error_of, opened, router_config, until
from tests.router.fake_worker import FakeWorker, serving


def tokens(worker: FakeWorker, stream_id: str) -> list[int]:
    return worker.streams[stream_id].tokens.tolist()


def ids(text: str) -> list[int]:
    """The test tokenizer's ids of an ASCII text: it has one token for each byte."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = {" ": "Ġ", "\n": "Ċ"}
    return [alphabet.index(shown.get(c, c)) for c in text]


# --- open -------------------------------------------------------------------------------------


def test_open_answers_with_the_stream(client: httpx.Client, worker: FakeWorker) -> None:
    answer = client.post("/v1/streams", json={"input_ids": [5, 6], "mode": "update"})
    assert answer.status_code == 201
    stream = answer.json()
    assert stream["id"].startswith("st-")
    assert len(stream["id"]) == len("st-") + 40
    assert isinstance(stream.pop("created"), int)
    assert stream == {
        "id": stream["id"],
        "object": "stream",
        "mode": "update",
        "model": "tiny",
        "status": "open",
        "seq": 0,
        "held_tokens": 0,
        "swapped_tokens": 0,
        "priority": None,
        "usage": {
            "prompt_tokens": 2,
            "stream": {
                "chunks": 0,
                "updates": 0,
                "lcp_tokens": 0,
                "invalidated_tokens": 0,
                "computed_tokens": 0,
                "ready_tokens": 0,
                "early_kv_bytes": 0,
                "late_kv_bytes": 0,
                "preemptions": 0,
                "recomputed_tokens": 0,
            },
        },
    }
    assert tokens(worker, stream["id"]) == [5, 6]


def test_the_openings(client: httpx.Client, worker: FakeWorker) -> None:
    chat = opened(client, messages=[{"role": "system", "content": "Be."}], preamble="Q? ")
    assert tokens(worker, chat) == ids("<system>Be.</><user>Q? ")
    assert tokens(worker, opened(client, messages=[])) == ids("<user>")
    assert tokens(worker, opened(client, prompt="Hi")) == [256, *ids("Hi")]
    assert tokens(worker, opened(client, input_ids=[])) == []


def test_open_hands_the_idle_timeout_on(client: httpx.Client, worker: FakeWorker) -> None:
    opened(client, idle_timeout_s=7)
    opened(client)
    timeouts = [e.idle_timeout_s for e in worker.events if isinstance(e, m.Open)]
    assert timeouts == [7.0, 60.0]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "messages"),
        ({"prompt": "a", "input_ids": [1]}, "input_ids"),
        ({"prompt": "a", "mode": "replace"}, "mode"),
        ({"prompt": "a", "temperature": 1}, "temperature"),
        ({"prompt": 3}, "prompt"),
        ({"input_ids": [1, "2"]}, "input_ids.1"),
        ({"input_ids": [True]}, "input_ids.0"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"input_ids": [300]}, "input_ids"),
        ({"input_ids": [2**40]}, "input_ids"),
        ({"prompt": "a", "preamble": "b"}, "preamble"),
        ({"prompt": "a", "order": "sticky"}, "order"),
        ({"prompt": "a", "order": "best", "mode": "update"}, "order"),
        ({"prompt": "a", "idle_timeout_s": 0}, "idle_timeout_s"),
        ({"prompt": "a", "idle_timeout_s": 4000}, "idle_timeout_s"),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
    ],
)
def test_open_refuses_what_is_malformed(
    client: httpx.Client, worker: FakeWorker, body: dict[str, Any], named: str
) -> None:
    error = error_of(client.post("/v1/streams", json=body), 422)
    assert error["code"] == "malformed"
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]
    assert worker.events == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"prompt": "\\ud800"}', b"\xff"])
def test_a_body_that_is_no_json_object(client: httpx.Client, content: bytes) -> None:
    error_of(client.post("/v1/streams", content=content), 422)


def test_open_names_a_model_that_is_not_served(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/streams", json={"prompt": "a", "model": "gpt"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    opened(client, model="tiny")


def test_a_refused_open_leaves_nothing(client: httpx.Client, worker: FakeWorker) -> None:
    worker.refusal = PromptTooLong("the prompt would have too many tokens")
    assert error_of(client.post("/v1/streams", json={"prompt": "a"}), 413)["code"] == (
        "prompt_too_long"
    )
    assert client.get("/v1/streams").json()["data"] == []


@pytest.mark.parametrize("settings", [{"max_open_streams": 2}])
def test_a_limit_on_open_streams(client: httpx.Client) -> None:
    first, _ = opened(client), opened(client)
    refused = client.post("/v1/streams", json={"prompt": "a"})
    assert error_of(refused, 429)["code"] == "limit_reached"
    assert refused.headers["Retry-After"] == "1"
    client.delete(f"/v1/streams/{first}")
    opened(client)


# --- append -----------------------------------------------------------------------------------


def test_chunks_add_up(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client)
    body = {"seq": 1, "chunks": ["ab", {"id": "x", "text": "c"}, ""]}
    answer = client.post(f"/v1/streams/{stream}/chunks", json=body)
    assert (answer.status_code, answer.json()) == (202, {"seq": 1, "tokens": 6})
    answer = client.post(f"/v1/streams/{stream}/chunks", json={"seq": 2, "input_ids": [9]})
    assert answer.json() == {"seq": 2, "tokens": 7}
    assert tokens(worker, stream) == [1, *ids("ab"), *ids("c\n\n"), 9]


def test_a_chunk_with_nothing_in_it_takes_its_number(client: httpx.Client) -> None:
    stream = opened(client)
    empty: list[dict[str, Any]] = [{"chunks": [""]}, {"input_ids": []}]
    for seq, body in enumerate(empty, start=1):
        answer = client.post(f"/v1/streams/{stream}/chunks", json={"seq": seq, **body})
        assert answer.json() == {"seq": seq, "tokens": 1}


def test_long_texts_keep_their_order(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client)
    for seq, text in enumerate(("a" * 9000, "b"), start=1):
        client.post(f"/v1/streams/{stream}/chunks", json={"seq": seq, "chunks": [text]})
    assert tokens(worker, stream) == [1, *ids("a" * 9000), *ids("b")]


def test_sequence_rules_reach_the_caller(client: httpx.Client, worker: FakeWorker) -> None:
    url = f"/v1/streams/{opened(client)}/chunks"
    first = client.post(url, json={"seq": 1, "chunks": ["a"]})
    assert client.post(url, json={"seq": 1, "chunks": ["a"]}).json() == first.json()
    conflict = error_of(client.post(url, json={"seq": 1, "chunks": ["b"]}), 409)
    assert conflict["code"] == "seq_conflict"
    gap = error_of(client.post(url, json={"seq": 4, "chunks": ["c"]}), 409)
    assert (gap["code"], gap["expected_seq"]) == ("seq_gap", 2)


def test_calls_of_the_other_mode(client: httpx.Client) -> None:
    appending, updating = opened(client), opened(client, mode="update")
    answer = client.put(f"/v1/streams/{appending}/context", json={"seq": 1, "documents": []})
    assert error_of(answer, 409)["code"] == "wrong_mode"
    answer = client.post(f"/v1/streams/{updating}/chunks", json={"seq": 1, "chunks": ["a"]})
    assert error_of(answer, 409)["code"] == "wrong_mode"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"chunks": ["a"]}, "seq"),
        ({"seq": 0, "chunks": ["a"]}, "seq"),
        ({"seq": 1.5, "chunks": ["a"]}, "seq"),
        ({"seq": "1", "chunks": ["a"]}, "seq"),
        ({"seq": 1}, "chunks"),
        ({"seq": 1, "chunks": ["a"], "input_ids": [1]}, "input_ids"),
        ({"seq": 1, "chunks": []}, "chunks"),
        ({"seq": 1, "chunks": [{"id": "a"}]}, "chunks.0"),
        ({"seq": 1, "chunks": [{"text": "a", "title": "b"}]}, "chunks.0"),
        ({"seq": 1, "chunks": ["a"], "documents": []}, "documents"),
        ({"seq": 1, "input_ids": [300]}, "input_ids"),
    ],
)
def test_malformed_chunks(client: httpx.Client, body: dict[str, Any], named: str) -> None:
    stream = opened(client)
    error = error_of(client.post(f"/v1/streams/{stream}/chunks", json=body), 422)
    assert named in error["message"]
    good = client.post(f"/v1/streams/{stream}/chunks", json={"seq": 1, "chunks": ["a"]})
    assert good.json() == {"seq": 1, "tokens": 2}


def test_unknown_streams(client: httpx.Client) -> None:
    url = "/v1/streams/st-0"
    calls = [
        client.get(url),
        client.delete(url),
        client.post(f"{url}/chunks", json={"seq": 1, "chunks": ["a"]}),
        client.put(f"{url}/context", json={"seq": 1, "documents": []}),
        client.post(f"{url}/generate", json={}),
    ]
    assert {error_of(answer, 404)["code"] for answer in calls} == {"stream_not_found"}


def test_a_stream_that_the_worker_dropped(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client)
    worker.streams.clear()
    body = {"seq": 1, "chunks": ["a"]}
    error_of(client.post(f"/v1/streams/{stream}/chunks", json=body), 404)
    assert client.get("/v1/streams").json()["data"] == []


# --- update -----------------------------------------------------------------------------------


def test_an_update_replaces_the_context(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client, mode="update")
    url = f"/v1/streams/{stream}/context"
    answer = client.put(url, json={"seq": 1, "documents": ["a", {"text": "b", "id": "2"}]})
    assert (answer.status_code, answer.json()) == (202, {"seq": 1, "tokens": 7, "lcp": 5})
    assert tokens(worker, stream) == [1, *ids("a\n\nb\n\n")]
    client.put(url, json={"seq": 5, "input_ids": [7, 8]})
    assert tokens(worker, stream) == [1, 7, 8]
    client.put(url, json={"seq": 3, "documents": ["late"]})
    assert tokens(worker, stream) == [1, 7, 8]
    client.put(url, json={"seq": 6, "documents": []})
    assert tokens(worker, stream) == [1]


def test_sticky_documents_stay_where_they_are(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client, mode="update", order="sticky")
    url = f"/v1/streams/{stream}/context"
    a, changed = {"id": "1", "text": "a"}, {"id": "1", "text": "A"}
    client.put(url, json={"seq": 1, "documents": [a, "b", "c"]})
    second = {"seq": 2, "documents": ["d", "c", changed]}
    client.put(url, json=second)
    assert tokens(worker, stream) == [1, *ids("A\n\nc\n\nd\n\n")]
    client.put(url, json={"seq": 3, "documents": ["d"]})
    client.put(url, json={"seq": 4, "documents": ["e", "d"]})
    assert tokens(worker, stream) == [1, *ids("d\n\ne\n\n")]
    # A repeat is the same content, whatever came after it.
    assert client.put(url, json=second).status_code == 202


def test_a_refused_update_does_not_move_documents(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client, mode="update", order="sticky")
    url = f"/v1/streams/{stream}/context"
    client.put(url, json={"seq": 1, "documents": ["a", "b"]})
    worker.refusal = PromptTooLong("too long")
    error_of(client.put(url, json={"seq": 2, "documents": ["b"]}), 413)
    worker.refusal = None
    client.put(url, json={"seq": 2, "documents": ["b", "a"]})
    assert tokens(worker, stream) == [1, *ids("a\n\nb\n\n")]


# --- look, delete -----------------------------------------------------------------------------


def test_look_and_delete(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client)
    client.post(f"/v1/streams/{stream}/chunks", json={"seq": 1, "chunks": ["ab"]})
    state = client.get(f"/v1/streams/{stream}").json()
    assert (state["status"], state["seq"], state["usage"]["prompt_tokens"]) == ("open", 1, 3)
    assert state["usage"]["stream"]["ready_tokens"] == 10
    listed = client.get("/v1/streams").json()
    assert (listed["object"], [s["id"] for s in listed["data"]]) == ("list", [stream])

    deleted = client.delete(f"/v1/streams/{stream}")
    assert deleted.status_code == 200
    assert deleted.json() == {"id": stream, "object": "stream", "deleted": True}
    assert worker.streams == {}
    error_of(client.delete(f"/v1/streams/{stream}"), 404)
    error_of(client.get(f"/v1/streams/{stream}"), 404)
    assert client.get("/v1/streams").json()["data"] == []


def test_an_idle_stream_is_forgotten(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client, idle_timeout_s=0.01)
    until(lambda: client.get("/v1/streams").json()["data"] == [])
    error_of(client.get(f"/v1/streams/{stream}"), 404)
    until(lambda: worker.streams == {})


# --- bodies over the limits -------------------------------------------------------------------


def test_bodies_over_the_limit(client: httpx.Client) -> None:
    stream = opened(client)
    url = f"/v1/streams/{stream}/chunks"
    big = b'{"seq": 1, "chunks": ["' + b"a" * 300_000 + b'"]}'
    assert error_of(client.post(url, content=big), 413)["code"] == "body_too_large"

    def parts() -> Any:
        yield from (big[at : at + 10_000] for at in range(0, len(big), 10_000))

    assert error_of(client.post(url, content=parts()), 413)["code"] == "body_too_large"
    text = {"seq": 1, "chunks": ["ok", "a" * 50_001]}
    assert error_of(client.post(url, json=text), 413)["code"] == "body_too_large"
    wide = {"seq": 1, "chunks": ["\N{SNOWMAN}" * 20_000]}
    assert error_of(client.post(url, json=wide), 413)["code"] == "body_too_large"
    assert client.post(url, json={"seq": 1, "chunks": ["a" * 50_000]}).status_code == 202


def test_a_body_that_ends_early(client: httpx.Client) -> None:
    address = urlsplit(str(client.base_url))
    with socket.create_connection((address.hostname, address.port)) as raw:
        raw.sendall(b"POST /v1/streams HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(10)
        assert raw.recv(1000).partition(b"\r\n")[0] in (b"", b"HTTP/1.1 422 Unprocessable Entity")
    opened(client)


# --- the router itself ------------------------------------------------------------------------


def test_routes_and_methods_that_do_not_exist(client: httpx.Client) -> None:
    assert error_of(client.get("/v2"), 404)["code"] == "not_found"
    answer = client.put("/v1/streams", json={})
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert "POST" in answer.headers["Allow"] or "GET" in answer.headers["Allow"]


def test_health_readiness_workers(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/readiness").status_code == 200
    worker = client.get("/workers").json()["workers"][0]
    assert (worker["role"], worker["healthy"], worker["model"]) == ("unified", True, "tiny")


def test_flush_cache(client: httpx.Client, worker: FakeWorker) -> None:
    assert client.post("/flush_cache?timeout=2").json()["workers"][0]["flushed"]
    assert client.get("/flush_cache").status_code == 200
    assert worker.flushes == ["timeout=2", ""]
    worker.flush_status = 400
    failed = client.post("/flush_cache")
    assert "busy" in error_of(failed, 503)["message"]
    assert failed.json()["workers"][0]["reason"] == "busy"


def test_a_worker_without_stream_support(tokenizer_dir: Path) -> None:
    worker = FakeWorker(tokenizer_dir, supported=False)
    with serving(worker.app()) as worker_url:
        app = create_app(router_config(worker_url))
        with serving(app) as url, httpx.Client(base_url=url, timeout=20) as http:
            until(lambda: "sglang-stream worker" in http.get("/readiness").text)
            error = error_of(http.post("/v1/streams", json={"prompt": "a"}), 503)
            assert "sglang-stream worker" in error["message"]


def test_without_a_worker(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, but nothing listens
        taken.bind(("127.0.0.1", 0))
        app = create_app(router_config(f"http://127.0.0.1:{taken.getsockname()[1]}"))
        with serving(app) as url, httpx.Client(base_url=url, timeout=20) as http:
            assert http.get("/health").status_code == 200
            assert error_of(http.get("/readiness"), 503)["code"] == "worker_unavailable"
            unavailable = http.post("/v1/streams", json={"prompt": "a"})
            error_of(unavailable, 503)
            assert unavailable.headers["Retry-After"] == "1"
            error_of(http.post("/v1/completions", json={}), 503)
            error_of(http.post("/flush_cache"), 503)
            assert not http.get("/workers").json()["workers"][0]["healthy"]


def test_a_worker_that_was_started_anew(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client)
    client.post(f"/v1/streams/{stream}/chunks", json={"seq": 1, "input_ids": [7, 8]})
    worker.streams.clear()
    worker.worker_id = "another"
    until(lambda: stream in worker.streams and worker.streams[stream].chunks)
    assert worker.streams[stream].opened.epoch == 1
    assert list(worker.streams[stream].tokens) == [1, 7, 8]
    until(lambda: client.get("/readiness").status_code == 200)
    seen = client.get(f"/v1/streams/{stream}").json()
    assert (seen["seq"], seen["usage"]["prompt_tokens"]) == (1, 3)
    assert client.post(f"/v1/streams/{stream}/chunks", json={"seq": 2, "input_ids": [9]}).is_success
