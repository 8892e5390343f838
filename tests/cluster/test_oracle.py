"""Streams on workers apart give the tokens of cold requests, alone and many at once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.cluster.calls import append, cold, generate, opened, tokens, update
from tests.cluster.processes import ClusterProcesses
from tests.harness import wait_until

ANSWER = 12


def streamed(url: str, seed: str, mode: str, *, along: bool) -> tuple[list[int], list[int]]:
    """The tokens of a stream whose context comes in random pieces, the last one `along` with the
    call that generates or before it, and those of a cold call."""
    rng = random.Random(seed)
    opening, tail = tokens(f"opening {seed}", 20), tokens(f"tail {seed}", 10)
    with httpx.Client(base_url=url, timeout=300) as http:
        stream = opened(http, mode, opening)
        context: list[int] = []
        for seq in range(1, 6):
            piece = tokens(f"{seed} {seq}", rng.randint(1, 400))
            kept = len(context) if mode == "append" else rng.randint(0, len(context))
            context = context[:kept] + piece
            sent = piece if mode == "append" else context
            if seq < 5 or not along:
                (append if mode == "append" else update)(http, stream, seq, sent)
        last = {"last": {"seq": 5, "input_ids": sent}} if along else {}
        answer = generate(http, stream, tail, ANSWER, last_seq=5, **last)
        assert answer.error is None
        counters = answer.usage["stream"]
        assert (counters["chunks"], counters["updates"]) == ((5, 0) if mode == "append" else (0, 5))
        assert counters["ready_tokens"] <= len(opening) + len(context)
        assert counters["early_kv_bytes"] + counters["late_kv_bytes"] > 0
        return answer.ids, cold(http, opening + context + tail, ANSWER).ids


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("mode", ["append", "update"])
def test_one_stream(cluster: ClusterProcesses, mode: str, along: bool) -> None:
    got, expected = streamed(cluster.routers[0].url, f"one {mode} {along}", mode, along=along)
    assert got == expected
    assert len(got) == ANSWER


def test_sixteen_streams_at_once(cluster: ClusterProcesses) -> None:
    url = cluster.routers[0].url
    with ThreadPoolExecutor(16) as pool:
        pairs = [
            pool.submit(
                streamed, url, f"many {i}", "append" if i % 2 else "update", along=i % 4 < 2
            )
            for i in range(16)
        ]
        for pair in pairs:
            got, expected = pair.result()
            assert got == expected
    holders = {w.url for w in cluster.of_role("prefill")}
    assert len(holders) == 2


def test_streams_spread_over_the_prefill_workers(cluster: ClusterProcesses) -> None:
    http = cluster.http
    streams = [opened(http, "append", tokens(f"spread {i}", 30)) for i in range(6)]
    held = [http.get(f"/v1/streams/{s}").json()["prefill_worker"] for s in streams]
    # Half each where both are as fast; one that computes faster gets a larger share, never all.
    assert min(held.count(w.url) for w in cluster.of_role("prefill")) >= 2


def test_a_shared_prefix_draws_a_stream(cluster: ClusterProcesses) -> None:
    http = cluster.http
    shared = tokens("shared", 1500)
    first = opened(http, "append", shared)
    wait_until(
        lambda: (
            http.get(f"/v1/streams/{first}").json()["usage"]["stream"]["computed_tokens"]
            >= len(shared)
        ),
        60,
        "the prefix computed",
    )
    place = http.get(f"/v1/streams/{first}").json()["prefill_worker"]
    worker = cluster.worker(place)
    wait_until(
        lambda: cluster.listed(worker)["load"]["todo_tokens"] == 0, 10, "the worker has reported"
    )
    for _ in range(3):
        stream = opened(http, "append", [*shared, *tokens("other", 40)])
        assert http.get(f"/v1/streams/{stream}").json()["prefill_worker"] == place
        http.delete(f"/v1/streams/{stream}")


def test_most_kv_moves_before_the_last_forward(cluster: ClusterProcesses) -> None:
    http = cluster.http
    stream = opened(http, "append", [])
    context = tokens("early", 2000)
    append(http, stream, 1, context)
    wait_until(
        lambda: (
            http.get(f"/v1/streams/{stream}").json()["usage"]["stream"]["computed_tokens"]
            >= len(context)
        ),
        60,
        "the context computed",
    )
    answer = generate(http, stream, tokens("tail", 100), 4)
    early, late = (answer.usage["stream"][f"{when}_kv_bytes"] for when in ("early", "late"))
    assert early == len(context) * (late // 100)
