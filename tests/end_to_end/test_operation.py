"""What tells an operator how the server is."""

from __future__ import annotations

from tests.end_to_end.server import (
    PASS_TOKENS,
    Server,
    begin_generate,
    error_of,
    ok,
    token_ids,
)
from tests.end_to_end.texts import ids


def test_health_and_readiness(server: Server) -> None:
    health = server.http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert ok(server.http.get("/readiness")) == {"status": "ready"}


def test_workers(server: Server) -> None:
    answer = ok(server.http.get("/workers"))
    (worker,) = answer["workers"]
    model = ok(server.http.get("/v1/models"))["data"][0]["id"]
    assert answer["total"] == 1
    assert (worker["role"], worker["healthy"], worker["model"]) == ("unified", True, model)
    assert worker["url"].startswith("http://127.0.0.1:")


def test_the_open_streams_with_what_each_holds(server: Server) -> None:
    server.flush()
    first, second = (server.open(input_ids=ids(name, 90)) for name in ("held 1", "held 2"))
    for stream in (first, second):
        server.computed(stream, 90)
    listed = {s["id"]: s for s in server.open_streams()}
    assert set(listed) == {first, second}
    for place, stream in enumerate((first, second)):
        state = listed[stream]
        assert (state["status"], state["priority"]) == ("open", place)
        assert (state["held_tokens"], state["swapped_tokens"]) == (90, 0)


def test_a_frozen_scheduler_does_not_stop_the_router(server: Server) -> None:
    """The router answers for itself, and what waited is done afterwards."""
    stream = server.open(input_ids=ids("frozen", 30))
    with server.frozen_scheduler():
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/metrics").status_code == 200
        assert [s["id"] for s in server.open_streams()] == [stream]
    assert token_ids(server.generate(stream)) == server.cold(ids("frozen", 30)).tokens


def test_metrics_of_the_router(server: Server) -> None:
    def read() -> dict[str, float]:
        names = ("chunks_total", "ttft_seconds_count", "ttft_seconds_sum", "open_streams")
        requests = {
            f"{method} {route} {status}": server.router_metric(
                f'sglang_stream_router_requests_total{{method="{method}",route="{route}",'
                f'status="{status}"'
            )
            for method, route, status in (
                ("POST", "/v1/streams", 201),
                ("POST", "/v1/streams/{stream_id}/chunks", 202),
                ("POST", "/v1/streams/{stream_id}/chunks", 409),
                ("POST", "/v1/streams/{stream_id}/generate", 200),
                ("GET", "other", 404),
            )
        }
        return requests | {
            name: server.router_metric(f"sglang_stream_router_{name}") for name in names
        }

    before = read()
    stream, other = server.open(), server.open()
    assert read()["open_streams"] == 2
    ok(server.append(stream, 1, ids("metrics", 50)), 202)
    ok(server.append(stream, 2, [5]), 202)
    error_of(server.append(stream, 9, [5]), 409, "seq_gap")
    assert len(token_ids(server.generate(stream))) == 8
    assert server.http.get("/nothing").status_code == 404
    assert read()["open_streams"] == 1
    assert server.delete(other).status_code == 200
    after = read()
    grown = {name: after[name] - before[name] for name in before}
    assert 0 < grown.pop("ttft_seconds_sum") < 60
    assert grown == {
        "POST /v1/streams 201": 2,
        "POST /v1/streams/{stream_id}/chunks 202": 2,
        "POST /v1/streams/{stream_id}/chunks 409": 1,
        "POST /v1/streams/{stream_id}/generate 200": 1,
        "GET other 404": 1,
        "chunks_total": 2,
        "ttft_seconds_count": 1,
        "open_streams": 0,
    }


def test_metrics_of_the_worker(server: Server) -> None:
    names = ("chunks_total", "passes_total", "pass_tokens_total", "ttft_seconds_count")
    before = {n: server.worker_metric(f"sglang_stream_{n}") for n in names}
    stream = server.open()
    ok(server.append(stream, 1, ids("worker", 300)), 202)
    server.computed(stream, 300)
    assert server.worker_metric("sglang_stream_open_streams") == 1
    assert server.worker_metric("sglang_stream_held_tokens") == 300
    assert len(token_ids(server.generate(stream))) == 8
    grown = {n: server.worker_metric(f"sglang_stream_{n}") - before[n] for n in names}
    # The pace that the worker has learned may cut passes shorter.
    assert grown.pop("passes_total") >= 300 / PASS_TOKENS
    assert grown == {"chunks_total": 1, "pass_tokens_total": 300, "ttft_seconds_count": 1}


def test_a_flush_takes_no_stream_along(server: Server) -> None:
    """The KV of an open stream goes and is computed anew."""
    prompt = ids("flushed", 200)
    stream = server.open(input_ids=prompt)
    server.computed(stream, 200)
    flushed = ok(server.http.post("/flush_cache", params={"timeout": 30}))
    assert [worker["flushed"] for worker in flushed["workers"]] == [True]
    server.computed(stream, 400)
    assert token_ids(server.generate(stream)) == server.cold(prompt).tokens


def test_a_flush_during_an_answer_is_refused(server: Server) -> None:
    """It names the worker, and disturbs nothing."""
    prompt = ids("busy", 30)
    stream = server.open(input_ids=prompt)
    call = begin_generate(server, stream, 100)
    call.next_event()
    refused = server.http.post("/flush_cache")
    error_of(refused, 503, "worker_unavailable")
    assert [worker["flushed"] for worker in refused.json()["workers"]] == [False]
    assert call.tokens() == server.cold(prompt, 100).tokens
