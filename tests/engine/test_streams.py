"""Streams on the running engine, against cold requests with the same tokens."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sglang_stream import messages as m
from sglang_stream.config import EngineConfig
from sglang_stream.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    Malformed,
    PromptTooLong,
    SequenceConflict,
    SequenceGap,
    StreamNotFound,
    StreamSealed,
    WrongMode,
)
from tests.harness import Worker, running_worker, wait_until

CONTEXT = 2048


@pytest.fixture(scope="module")
def worker(log_dir: Path) -> Iterator[Worker]:
    config = EngineConfig(pass_tokens=128, max_streams=64)
    flags = ("--context-length", str(CONTEXT))
    with running_worker(log_dir / "streams.log", *flags, config=config) as running:
        yield running


@pytest.fixture(autouse=True)
def _empty_cache_before_and_quiet_memory_check_after(worker: Worker) -> Iterator[None]:
    worker.flush()
    yield
    worker.assert_healthy()


def tokens(seed: object, length: int) -> list[int]:
    rng = random.Random(str(seed))
    return [rng.randrange(100, 4000) for _ in range(length)]


def test_append_equals_a_cold_request(worker: Worker) -> None:
    chunks = [tokens(("a", i), n) for i, n in enumerate((300, 1, 170, 64))]
    stream = worker.open("append", tokens("opening", 20))
    for seq, chunk in enumerate(chunks, 1):
        worker.append(stream, seq, chunk)
    status = worker.idle(stream, 555)
    assert status.usage == m.Usage(chunks=4, computed_tokens=555)
    answer = worker.seal(stream, tokens("tail", 7), last_seq=4)
    assert answer.meta["cached_tokens"] == 555
    assert answer.meta["prompt_tokens"] == 562
    prompt = [*tokens("opening", 20), *(t for c in chunks for t in c), *tokens("tail", 7)]
    assert answer.tokens == worker.cold(prompt).tokens
    done = worker.status(stream)
    assert (done.state, done.usage.ready_tokens) == ("finished", 555)


def test_update_keeps_the_common_prefix_and_equals_a_cold_request(worker: Worker) -> None:
    docs = {name: tokens(("doc", name), 120) for name in "abcdef"}
    opening, tail = tokens("opening", 20), tokens("tail", 7)
    stream = worker.open("update", opening)
    worker.update(stream, 1, docs["a"] + docs["b"] + docs["c"])
    worker.idle(stream, 380)
    assert worker.update(stream, 2, docs["a"] + docs["d"] + docs["c"]).lcp == 140
    worker.idle(stream, 620)
    assert worker.update(stream, 3, docs["a"] + docs["d"] + docs["e"] + docs["f"]).lcp == 260
    status = worker.idle(stream, 860)
    assert status.usage == m.Usage(
        updates=3, lcp_tokens=420, invalidated_tokens=360, computed_tokens=860
    )
    answer = worker.seal(stream, tail, last_seq=3)
    prompt = opening + docs["a"] + docs["d"] + docs["e"] + docs["f"] + tail
    assert answer.tokens == worker.cold(prompt).tokens
    assert answer.meta["cached_tokens"] == 500


def test_a_stream_sealed_before_anything_was_computed(worker: Worker) -> None:
    prompt = tokens("unread", 700)
    stream = worker.open("append")
    worker.append(stream, 1, prompt)
    assert worker.seal(stream, [], last_seq=1).tokens == worker.cold(prompt).tokens


def test_two_updates_in_a_row_while_a_pass_runs(worker: Worker) -> None:
    """The updates are sent without waiting, so that they meet passes in the forward."""
    final = tokens("x", 300) + tokens("final", 400)
    stream = worker.open("update")
    versions = [tokens("x", 500 - 40 * i) + tokens(("y", i), 100) for i in range(6)] + [final]
    for seq, version in enumerate(versions, 1):
        raw = m.pack_tokens(version)
        worker.send(m.Update(stream, seq, raw, m.digest(raw)))
    answers = [worker.receive()[1] for _ in versions]
    assert [a.seq for a in answers if isinstance(a, m.Accepted)] == [1, 2, 3, 4, 5, 6, 7]
    answer = worker.seal(stream, [], last_seq=7)
    assert answer.tokens == worker.cold(final).tokens


@pytest.mark.parametrize("mode", ["append", "update"])
def test_a_chunk_that_waits_with_its_seal_goes_before_it(worker: Worker, mode: m.Mode) -> None:
    """The scheduler finds both when a forward ends."""
    prompt, tail = tokens(("waits", mode), 150), tokens("tail", 7)
    stream = worker.open(mode)
    raw = m.pack_tokens(prompt)
    event = m.Append if mode == "append" else m.Update
    with ThreadPoolExecutor() as others:
        long = others.submit(worker.cold, tokens(("long", mode), 1900), 1)
        computing = worker.send(m.Query(stream))
        while worker.socket.poll(100):
            worker.receive()
            computing = worker.send(m.Query(stream))
        chunk = worker.send(event(stream, 1, raw, m.digest(raw)))
        answer = worker.seal(stream, tail, last_seq=1)
        long.result()
    assert [worker.receive()[0] for _ in range(2)] == [computing, chunk]
    assert answer.tokens == worker.cold(prompt + tail).tokens


@pytest.mark.parametrize("stage", ["opened", "computing", "computed", "updated", "sealed"])
def test_abort_at_every_stage(worker: Worker, stage: str) -> None:
    """An aborted stream is gone, frees what it held, and does not touch its neighbour."""
    neighbour = worker.open("append", tokens(stage, 30))
    worker.append(neighbour, 1, tokens((stage, "n"), 200))
    stream = worker.open("update", tokens(stage, 30))
    if stage != "opened":
        worker.update(stream, 1, tokens((stage, 1), 900))
    if stage in ("computed", "updated", "sealed"):
        worker.idle(stream, 900)
    if stage == "updated":
        worker.update(stream, 2, tokens((stage, 2), 900))
    if stage == "sealed":
        with worker.http.stream(
            "POST", "/generate", json={**worker.body(stream, [], 1000, 1), "stream": True}
        ) as response:
            lines = response.iter_lines()
            next(lines)
            worker.abort(stream)
            text = "".join(lines)
        assert '"type":"abort"' in text
        wait_until(lambda: worker.status(stream).state == "finished", 30, "the generation to end")
    else:
        worker.abort(stream)
        with pytest.raises(StreamNotFound):
            worker.status(stream)
    answer = worker.seal(neighbour, [], last_seq=1)
    prompt = tokens(stage, 30) + tokens((stage, "n"), 200)
    assert answer.tokens == worker.cold(prompt).tokens


def test_a_client_that_vanishes_during_the_answer(worker: Worker) -> None:
    stream = worker.open("append")
    worker.append(stream, 1, tokens("vanish", 100))
    body = {**worker.body(stream, [], 1500, 1), "stream": True}
    with (
        httpx.Client(base_url=worker.url) as client,
        client.stream("POST", "/generate", json=body) as response,
    ):
        next(response.iter_lines())
    wait_until(lambda: worker.status(stream).state == "finished", 30, "the generation to end")


def test_sequence_numbers(worker: Worker) -> None:
    stream = worker.open("append")
    first, second = tokens("first", 40), tokens("second", 40)
    assert worker.append(stream, 1, first) == m.Accepted(1, 40)
    assert worker.append(stream, 1, first) == m.Accepted(1, 40)
    with pytest.raises(SequenceConflict):
        worker.append(stream, 1, second)
    with pytest.raises(SequenceGap) as gap:
        worker.append(stream, 3, second)
    assert gap.value.expected_seq == 2
    with pytest.raises(WrongMode):
        worker.update(stream, 2, second)
    with pytest.raises(SequenceGap) as missing:
        worker.seal(stream, [], last_seq=2)
    assert missing.value.expected_seq == 2
    worker.append(stream, 2, second)
    answer = worker.seal(stream, [], last_seq=2)
    assert answer.tokens == worker.cold(first + second).tokens
    with pytest.raises(StreamSealed):
        worker.append(stream, 3, first)
    with pytest.raises(StreamSealed):
        worker.seal(stream, [], last_seq=2)


def test_reversed_updates_leave_the_highest_number(worker: Worker) -> None:
    stream = worker.open("update")
    newest, stale = tokens("newest", 80), tokens("stale", 90)
    worker.update(stream, 9, newest)
    assert worker.update(stream, 4, stale).tokens == 80
    assert worker.seal(stream, [], last_seq=9).tokens == worker.cold(newest).tokens


def test_empty_chunks_and_documents(worker: Worker) -> None:
    stream = worker.open("append")
    worker.append(stream, 1, [])
    worker.append(stream, 2, tokens("something", 50))
    worker.append(stream, 3, [])
    assert worker.seal(stream, [], last_seq=3).tokens == worker.cold(tokens("something", 50)).tokens

    stream = worker.open("update", tokens("opening", 30))
    worker.update(stream, 1, tokens("docs", 100))
    worker.idle(stream, 130)
    assert worker.update(stream, 2, []) == m.Accepted(2, 30, 30)
    assert (
        worker.seal(stream, [5], last_seq=2).tokens
        == worker.cold([*tokens("opening", 30), 5]).tokens
    )

    stream = worker.open("append")
    with pytest.raises(InvalidRequest, match="empty"):
        worker.seal(stream)
    assert worker.status(stream).state == "open"
    worker.abort(stream)


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_prompts_around_the_context_length(worker: Worker, beyond: int) -> None:
    prompt = tokens("context", CONTEXT - 8 + beyond)
    stream = worker.open("append")
    worker.append(stream, 1, prompt[:-3])
    if beyond <= 0:
        answer = worker.seal(stream, prompt[-3:], max_new=8, last_seq=1)
        assert len(answer.tokens) == 8
        assert answer.tokens[:4] == worker.cold(prompt, 4).tokens
        return
    with pytest.raises(ContextLengthExceeded, match="at most 7"):
        worker.seal(stream, prompt[-3:], max_new=8, last_seq=1)
    assert len(worker.seal(stream, prompt[-3:], max_new=7, last_seq=1).tokens) == 7


def test_more_tokens_than_the_context(worker: Worker) -> None:
    stream = worker.open("append")
    worker.append(stream, 1, tokens("context", CONTEXT))
    with pytest.raises(PromptTooLong):
        worker.append(stream, 2, [5])
    with pytest.raises(ContextLengthExceeded):
        worker.seal(stream, [], max_new=1, last_seq=1)
    assert worker.status(stream).tokens == CONTEXT
    worker.abort(stream)


def test_token_ids_outside_the_vocabulary(worker: Worker) -> None:
    stream = worker.open("append")
    with pytest.raises(Malformed, match="vocabulary"):
        worker.append(stream, 1, [10_000_000])
    with pytest.raises(Malformed, match="vocabulary"):
        worker.seal(stream, [10_000_000])
    worker.append(stream, 1, [5])
    worker.abort(stream)
    ordinary = {"input_ids": [5, 10_000_000], "sampling_params": {"max_new_tokens": 2}}
    assert worker.http.post("/generate", json=ordinary).status_code == 400


def test_ids_that_are_prefixes_of_one_another(worker: Worker) -> None:
    prompts = {name: tokens(name, 150) for name in ("s1", "s10", "s100")}
    for name, prompt in prompts.items():
        worker.ask(m.Open(name, "append", b"", 60))
        worker.append(name, 1, prompt)
    worker.abort("s1")
    for name in ("s10", "s100"):
        assert worker.seal(name, [], last_seq=1).tokens == worker.cold(prompts[name]).tokens


def test_an_idle_stream_expires_and_frees_what_it_held(worker: Worker) -> None:
    stream = worker.open("append", idle_timeout_s=0.5)
    kept = worker.open("append", idle_timeout_s=600)
    worker.append(stream, 1, tokens("idle", 200))

    def gone() -> bool:
        # Asking for another stream keeps the scheduler awake and is no event of the idle one.
        worker.status(kept)
        try:
            worker.ask(m.Query(stream))
        except StreamNotFound:
            return True
        return False

    wait_until(gone, 10, "the idle stream to expire", 0.2)
    worker.abort(kept)
    wait_until(lambda: _metric(worker, "sglang_stream_held_tokens") == 0, 10, "no token held")


def test_a_flush_drops_kv_but_no_stream(worker: Worker) -> None:
    prompt = tokens("flush", 300)
    stream = worker.open("append")
    worker.append(stream, 1, prompt)
    worker.idle(stream, 300)
    assert worker.http.post("/flush_cache", params={"timeout": 60}).status_code == 200
    worker.idle(stream, 600)
    assert worker.seal(stream, [], last_seq=1).tokens == worker.cold(prompt).tokens


def test_what_cannot_be_read_is_refused_and_the_socket_lives_on(worker: Worker) -> None:
    for payload in (b"", b"\xc1", b"\x92\xa4Open\x01", m.encode(m.Hello(99))):
        worker.socket.send_multipart([b"12345678", payload])
        call_id, answer = worker.receive()
        assert call_id == b"12345678"
        assert isinstance(answer, m.Refused)
    worker.socket.send_multipart([b"one frame"])
    welcome = worker.ask(m.Hello(m.PROTOCOL))
    assert (welcome.context_len, welcome.page_size) == (CONTEXT, 1)


def test_sampling_fields_and_stop_strings_pass_through(worker: Worker) -> None:
    prompt = tokens("sampling", 60)
    plain = worker.cold(prompt, 12)
    stream = worker.open("append")
    worker.append(stream, 1, prompt)
    answer = worker.seal(stream, [], 12, 1, stop_token_ids=[plain.tokens[4]], ignore_eos=False)
    assert answer.tokens == plain.tokens[: plain.tokens.index(plain.tokens[4]) + 1]


def test_ordinary_requests_beside_streams(worker: Worker) -> None:
    """Requests that share the stream's prefix, while it is computed, in both directions."""
    shared = tokens("shared", 600)
    stream = worker.open("append")
    worker.append(stream, 1, shared)
    results: list[list[int]] = []

    def ask(i: int) -> None:
        with httpx.Client(base_url=worker.url, timeout=120) as client:
            body = {
                "input_ids": shared + tokens(("own", i), 20),
                "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
            }
            results.append(client.post("/generate", json=body).json()["output_ids"])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    answer = worker.seal(stream, tokens("own", 10), last_seq=1)
    for thread in threads:
        thread.join()
    assert answer.tokens == worker.cold(shared + tokens("own", 10)).tokens
    expected = [worker.cold(shared + tokens(("own", i), 20)).tokens for i in range(4)]
    assert sorted(results) == sorted(expected)


blocks = st.lists(st.integers(0, 4), min_size=1, max_size=4)
plans = st.lists(
    st.tuples(
        st.sampled_from(["append", "update"]),
        st.lists(blocks, min_size=1, max_size=4),
        st.sampled_from(["seal", "seal", "seal", "abort"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=12,
    deadline=None,
    # No shrinking: each try runs the engine for seconds.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(plans, st.randoms(use_true_random=False))
def test_any_streams_in_any_interleaving(
    worker: Worker, drawn: list[tuple[m.Mode, list[list[int]], str, bool]], rng: random.Random
) -> None:
    """Streams whose chunks are drawn from five blocks, so that they share prefixes, take turns."""
    pieces = [tokens(("block", b), 60) for b in range(5)]
    opening = tokens("opening", 10)
    streams = []
    for mode, events, end, waits in drawn:
        chunks = [[t for b in event for t in pieces[b]] for event in events]
        final = chunks[-1] if mode == "update" else [t for c in chunks for t in c]
        stream_id = worker.open(mode, opening)
        streams.append((stream_id, mode, chunks, end, waits, opening + final))
    turns = [i for i, s in enumerate(streams) for _ in s[2]]
    rng.shuffle(turns)
    sent = dict.fromkeys(range(len(streams)), 0)
    for i in turns:
        stream_id, mode, chunks, _, waits, _ = streams[i]
        sent[i] += 1
        send = worker.append if mode == "append" else worker.update
        send(stream_id, sent[i], chunks[sent[i] - 1])
        if waits:
            wait_until(lambda: _metric(worker, "sglang_stream_held_tokens") > 0, 60, "a pass")
    for stream_id, _, chunks, end, _, prompt in streams:
        if end == "abort":
            worker.abort(stream_id)
        else:
            answer = worker.seal(stream_id, [7, 8], last_seq=len(chunks))
            assert answer.tokens == worker.cold([*prompt, 7, 8]).tokens
    worker.flush()
    worker.assert_healthy()


def _metric(worker: Worker, name: str) -> float:
    lines = worker.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_counters_are_on_the_metrics_page(worker: Worker) -> None:
    before = {n: _metric(worker, f"sglang_stream_{n}") for n in ("passes_total", "chunks_total")}
    stream = worker.open("append")
    worker.append(stream, 1, tokens("metrics", 300))
    worker.idle(stream, 300)
    started = time.monotonic()
    assert _metric(worker, "sglang_stream_open_streams") == 1
    assert _metric(worker, "sglang_stream_held_tokens") == 300
    assert _metric(worker, "sglang_stream_passes_total") >= before["passes_total"] + 3
    assert _metric(worker, "sglang_stream_chunks_total") == before["chunks_total"] + 1
    worker.seal(stream, [], last_seq=1)
    assert _metric(worker, "sglang_stream_ttft_seconds_sum") > 0
    assert time.monotonic() > started


def test_a_grammar_is_followed(worker: Worker) -> None:
    stream = worker.open("append", tokens("grammar", 200))
    answer = worker.seal(stream, [], 8, None, regex="[abc]{3}", ignore_eos=False)
    assert re.fullmatch("[abc]{3}", answer.text)


def test_a_grammar_that_is_none_leaves_the_stream_open(worker: Worker) -> None:
    prompt = tokens("no grammar", 200)
    stream = worker.open("append")
    worker.append(stream, 1, prompt)
    refused = worker.generate(worker.body(stream, [5], 8, 1, regex="("))
    assert refused.meta["finish_reason"]["status_code"] == 400
    assert worker.status(stream).state == "open"
    worker.append(stream, 2, [7])
    assert worker.seal(stream, [5], 8, 2).tokens == worker.cold([*prompt, 7, 5], 8).tokens
