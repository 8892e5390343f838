"""More KV wanted than there is: open streams must never stand in the way of full requests."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sglang_stream.config import EngineConfig
from tests.harness import Worker, running_worker, wait_until

POOL = 4096


@pytest.fixture(scope="module")
def worker(log_dir: Path) -> Iterator[Worker]:
    config = EngineConfig(pass_tokens=256)
    flags = ("--max-total-tokens", str(POOL), "--context-length", "4000")
    with running_worker(log_dir / "pressure.log", *flags, config=config) as running:
        yield running


@pytest.fixture(autouse=True)
def _empty_cache_before_and_quiet_memory_check_after(worker: Worker) -> Iterator[None]:
    worker.flush()
    yield
    worker.flush()
    worker.assert_healthy()


def tokens(seed: object, length: int) -> list[int]:
    rng = random.Random(str(seed))
    return [rng.randrange(100, 4000) for _ in range(length)]


def fill_with_idle_streams(worker: Worker) -> list[str]:
    """Open streams that hold nearly the whole pool and then say nothing."""
    streams = []
    for i in range(9):
        stream = worker.open("append")
        worker.append(stream, 1, tokens(("idle", i), 420))
        worker.idle(stream, 400)
        streams.append(stream)
    return streams


def test_an_ordinary_request_is_admitted_while_idle_streams_hold_the_pool(worker: Worker) -> None:
    """Without unlocking victims it would get NO_TOKEN, and SGLang would not look at it again."""
    fill_with_idle_streams(worker)
    prompt = tokens("ordinary", 2500)
    assert worker.cold(prompt).meta["prompt_tokens"] == 2500


def test_decoding_takes_kv_from_streams_instead_of_aborting(worker: Worker) -> None:
    """Requests that outgrow the pool while streams hold KV; SGLang alone would abort them."""
    answers: list[httpx.Response] = []

    def decode(i: int) -> None:
        with httpx.Client(base_url=worker.url, timeout=300) as client:
            params = {"temperature": 0, "max_new_tokens": 600, "ignore_eos": True}
            body = {"input_ids": tokens(("decode", i), 300), "sampling_params": params}
            answers.append(client.post("/generate", json=body))

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    streams = []
    for i in range(8):
        stream = worker.open("append")
        worker.append(stream, 1, tokens(("open", i), 400))
        streams.append(stream)
    for thread in threads:
        thread.join()
    assert [a.status_code for a in answers] == [200, 200, 200]
    assert [a.json()["meta_info"]["completion_tokens"] for a in answers] == [600, 600, 600]
    for i, stream in enumerate(streams):
        answer = worker.seal(stream, [9], last_seq=1)
        assert answer.tokens == worker.cold([*tokens(("open", i), 400), 9]).tokens


@pytest.mark.parametrize("mode", ["append", "update"])
def test_more_streams_than_memory_all_get_the_right_tokens(worker: Worker, mode: str) -> None:
    """Twelve streams of 1,000 tokens each on a pool of 4,096, sealed in another order."""
    prompts = {i: tokens((mode, i), 1000) for i in range(12)}
    ids = {i: worker.open(mode) for i in prompts}  # type: ignore[arg-type]
    send = worker.append if mode == "append" else worker.update
    for seq in (1, 2):
        for i, prompt in prompts.items():
            part = prompt[500 * (seq - 1) : 500 * seq] if mode == "append" else prompt[: 500 * seq]
            send(ids[i], seq, part)
    order = sorted(prompts, key=lambda i: (i * 7) % 12)
    results: dict[int, list[int]] = {}

    def seal(i: int) -> None:
        with httpx.Client(base_url=worker.url, timeout=300) as client:
            response = client.post("/generate", json=worker.body(ids[i], [3], 8, 2))
            results[i] = response.json()["output_ids"]

    threads = [threading.Thread(target=seal, args=(i,)) for i in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in order:
        assert results[i] == worker.cold([*prompts[i], 3]).tokens


def test_a_preempted_stream_is_computed_again(worker: Worker) -> None:
    streams = fill_with_idle_streams(worker)
    worker.cold(tokens("evicts", 2500))
    for i, stream in enumerate(streams):
        worker.append(stream, 2, tokens(("more", i), 20))
    prompt = [*tokens(("idle", 0), 420), *tokens(("more", 0), 20)]
    assert worker.seal(streams[0], [], last_seq=2).tokens == worker.cold(prompt).tokens
    text = worker.http.get("/metrics").text
    line = next(x for x in text.splitlines() if x.startswith("sglang_stream_preemptions_total"))
    assert float(line.split()[-1]) > 0


def test_streams_that_do_not_fit_together_come_to_rest(worker: Worker) -> None:
    """A working stream takes the KV of idle ones; they do not take it back before they work."""
    fill_with_idle_streams(worker)
    late = worker.open("append")
    worker.append(late, 1, tokens("late", 3000))
    wait_until(
        lambda: worker.status(late).usage.computed_tokens >= 3000, 60, "the late stream computed"
    )
    counts = [_passes(worker)]

    def at_rest() -> bool:
        counts.append(_passes(worker))
        return counts[-1] == counts[-2]

    wait_until(at_rest, 20, "no more passes", step_s=1)
    answer = worker.seal(late, [], last_seq=1)
    assert answer.tokens == worker.cold(tokens("late", 3000)).tokens


def _passes(worker: Worker) -> float:
    lines = worker.http.get("/metrics").text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("sglang_stream_passes_total"))
