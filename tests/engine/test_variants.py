"""The same promises under the engine's other settings, one worker for each."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sglang_stream.config import EngineConfig
from sglang_stream.errors import StreamNotFound
from tests.engine.pressure import Load
from tests.harness import Worker, running_worker

_TWO_RANKS = ("--tp-size", "2")
_SMALL_CHUNKS = ("--chunked-prefill-size", "96", "--schedule-policy", "lpm")
_PAGES = ("--page-size", "16")
_NO_OVERLAP = ("--disable-overlap-schedule",)

VARIANTS = {
    "small-chunked-prefill-no-overlap": (*_SMALL_CHUNKS, *_NO_OVERLAP),
    "two-ranks-pages-of-16": (*_TWO_RANKS, *_PAGES),
}
LONG_VARIANTS = {
    "no-overlap": _NO_OVERLAP,
    "pages-of-16": _PAGES,
    "small-chunked-prefill": _SMALL_CHUNKS,
    "two-ranks": _TWO_RANKS,
    "pages-of-16-no-overlap": (*_PAGES, *_NO_OVERLAP),
    "priorities": ("--enable-priority-scheduling", "--schedule-policy", "fcfs"),
    "no-chunked-prefill": ("--chunked-prefill-size", "-1"),
}


def tokens(seed: object, length: int) -> list[int]:
    rng = random.Random(str(seed))
    return [rng.randrange(100, 4000) for _ in range(length)]


@pytest.mark.parametrize(
    "name", [*VARIANTS, *(pytest.param(n, marks=pytest.mark.long) for n in LONG_VARIANTS)]
)
def test_oracle(log_dir: Path, name: str) -> None:
    flags = {**VARIANTS, **LONG_VARIANTS}[name]
    config = EngineConfig(pass_tokens=200)
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if "--tp-size" in flags else {}
    flags = ("--context-length", "4000", "--max-total-tokens", "6000", *flags)
    with running_worker(log_dir / f"{name}.log", *flags, config=config, **environment) as worker:
        _appends(worker)
        worker.flush()
        _updates(worker)
        worker.flush()
        _aborts(worker)
        worker.flush()
        if name != "small-chunked-prefill-no-overlap":  # policies are met in `test_policies`
            _under_pressure(worker)
            worker.flush()
        worker.assert_healthy()
        if "--tp-size" in flags:
            _ranks_decided_alike(worker)


def _ranks_decided_alike(worker: Worker) -> None:
    """Each rank logs a digest of its decisions when the cache is flushed."""
    digests: dict[str, list[str]] = {"TP0": [], "TP1": []}
    for line in worker.log.read_text(errors="replace").splitlines():
        if "sglang-stream: " in line and ", digest " in line:
            rank = next(r for r in digests if r in line)
            digests[rank].append(line.partition("sglang-stream: ")[2])
    assert digests["TP0"] == digests["TP1"]
    assert len(digests["TP0"]) == 4  # one for each part of the test


def _under_pressure(worker: Worker) -> None:
    """Many more streams than fit, with victims that are swapped and victims that are not."""
    worker.configure("srpf", "auto", "soft")
    assert Load(worker).run() == []
    assert worker.metric("preemptions_total") > 0


def _appends(worker: Worker) -> None:
    """Four streams at once whose chunks end inside pages; more KV than the pool has."""
    prompts = {i: tokens(("append", i % 3), 1203) + tokens(i, 333) for i in range(4)}
    streams = {i: worker.open("append", p[:7]) for i, p in prompts.items()}
    for seq in (1, 2, 3):
        for i, prompt in prompts.items():
            worker.append(streams[i], seq, prompt[7:][517 * (seq - 1) : 517 * seq])
    for i, prompt in prompts.items():
        answer = worker.seal(streams[i], tokens("tail", 5), last_seq=3)
        assert answer.tokens == worker.cold(prompt + tokens("tail", 5)).tokens
        assert worker.status(streams[i]).usage.ready_tokens <= len(prompt)


def _updates(worker: Worker) -> None:
    """Documents inserted, dropped and flipped back, also while passes run."""
    docs = {d: tokens(("doc", d), 110) for d in "abcdefgh"}
    stream = worker.open("update", tokens("opening", 21))
    lists = ["abcd", "abecd", "abecd", "abe", "abcdfg", "ab", "abecdh"]
    for seq, names in enumerate(lists, 1):
        worker.update(stream, seq, [t for d in names for t in docs[d]])
    prompt = tokens("opening", 21) + [t for d in lists[-1] for t in docs[d]]
    worker.status(stream)
    answer = worker.seal(stream, tokens("tail", 5), last_seq=len(lists))
    assert answer.tokens == worker.cold(prompt + tokens("tail", 5)).tokens


def _aborts(worker: Worker) -> None:
    """An abort in the middle of the passes, beside a stream with the same prefix."""
    shared = tokens("shared", 900)
    gone, kept = worker.open("append"), worker.open("append")
    worker.append(gone, 1, shared)
    worker.append(kept, 1, shared)
    worker.abort(gone)
    with pytest.raises(StreamNotFound):
        worker.seal(gone)
    assert worker.seal(kept, [3], last_seq=1).tokens == worker.cold([*shared, 3]).tokens
