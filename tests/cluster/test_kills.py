"""Whatever process dies or stops, the stream goes on and its tokens are those of a cold request.

Each test prints a row of the table of recovery times: from the fault to the first token after it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.calls import Answer, append, cold, generate, generating, opened, tokens, update
from tests.cluster.processes import (
    KILLED_S,
    REPEATS,
    STOPPED_S,
    ClusterProcesses,
    WorkerProcess,
)
from tests.harness import wait_until

ANSWER = 24


class Stream:
    """An append stream over `cluster` with what a cold request would answer to it."""

    def __init__(
        self, cluster: ClusterProcesses, name: str, size: int = 1200, answer: int = ANSWER
    ) -> None:
        self.http = cluster.http
        self.opening = tokens(f"{name} opening", 20)
        self.pieces = [tokens(f"{name} {i}", size // 4) for i in range(4)]
        self.tail = tokens(f"{name} tail", 10)
        prompt = [*self.opening, *(t for piece in self.pieces for t in piece), *self.tail]
        self.expected = cold(self.http, prompt, answer).ids
        started = time.monotonic()
        cold(self.http, prompt, 1)
        self.prefill_s = time.monotonic() - started
        cluster.flush()
        self.id = opened(self.http, "append", self.opening)

    def send(self, first: int, last: int) -> None:
        for seq in range(first, last + 1):
            append(self.http, self.id, seq, self.pieces[seq - 1])

    def holder(self, cluster: ClusterProcesses) -> WorkerProcess:
        return cluster.worker(self.http.get(f"/v1/streams/{self.id}").json()["prefill_worker"])

    def answer(self) -> Answer:
        return generate(self.http, self.id, self.tail, ANSWER, last_seq=4)

    def check(self, answer: Answer) -> None:
        assert answer.error is None
        assert answer.ids == self.expected
        assert answer.usage["completion_tokens"] == len(self.expected)


@contextmanager
def recovery(what: str, limit_s: float) -> Iterator[Callable[[], None]]:
    """Times from the beginning of the block to the call of what it gives."""
    began = time.monotonic()
    took: list[float] = []
    yield lambda: took.append(time.monotonic() - began)
    print(f"{what}: first right token after {took[0]:.1f} s (limit {limit_s:.1f} s)")
    assert took[0] <= limit_s


def first_token(stream: Stream, note: Callable[[], None]) -> Answer:
    """The stream's answer; `note` is called with its first token."""
    answer = Answer()
    ids = generating(stream.http, stream.id, stream.tail, ANSWER, answer, last_seq=4)
    for _ in ids:
        if len(answer.ids) >= 1:
            note()
    return answer


@pytest.mark.parametrize("again", REPEATS)
def test_a_prefill_worker_killed_while_chunks_arrive(cluster: ClusterProcesses, again: int) -> None:
    stream = Stream(cluster, f"killed {again}")
    stream.send(1, 2)
    holder = stream.holder(cluster)
    with recovery("prefill worker killed between chunks", KILLED_S + stream.prefill_s) as note:
        holder.kill()
        stream.send(3, 4)
        answer = first_token(stream, note)
    stream.check(answer)
    assert stream.holder(cluster) is not holder


@pytest.mark.parametrize("again", REPEATS)
def test_an_update_stream_whose_worker_is_killed(cluster: ClusterProcesses, again: int) -> None:
    http = cluster.http
    opening, tail = tokens("u opening", 10), tokens("u tail", 10)
    lists = [tokens(f"u {again} {i}", 400) for i in range(3)]
    expected = cold(http, [*opening, *lists[0][:200], *lists[2], *tail], ANSWER).ids
    stream = opened(http, "update", opening)
    update(http, stream, 1, lists[0])
    update(http, stream, 2, [*lists[0][:300], *lists[1]])
    cluster.worker(http.get(f"/v1/streams/{stream}").json()["prefill_worker"]).kill()
    answered = update(http, stream, 3, [*lists[0][:200], *lists[2]])
    assert answered["lcp"] == len(opening) + 200
    answer = generate(http, stream, tail, ANSWER, last_seq=3)
    assert (answer.error, answer.ids) == (None, expected)


@pytest.mark.parametrize("again", REPEATS)
def test_a_prefill_worker_killed_between_the_seal_and_the_first_token(
    cluster: ClusterProcesses, again: int
) -> None:
    stream = Stream(cluster, f"sealed {again}", size=8000)
    stream.send(1, 4)
    holder = stream.holder(cluster)
    limit_s = KILLED_S + stream.prefill_s
    answers: list[Answer] = []
    with recovery("prefill worker killed after the seal", limit_s) as note:
        thread = threading.Thread(target=lambda: answers.append(first_token(stream, note)))
        thread.start()
        wait_until(
            lambda: stream.http.get(f"/v1/streams/{stream.id}").json()["status"] == "sealed",
            30,
            "sealed",
            0.005,
        )
        holder.kill()
        thread.join()
    stream.check(answers[0])


@pytest.mark.parametrize("again", REPEATS)
def test_a_decode_worker_killed_after_the_fifth_token(
    cluster: ClusterProcesses, again: int
) -> None:
    _continues_elsewhere(cluster, f"decode {again}", WorkerProcess.kill, KILLED_S)


@pytest.mark.long
def test_a_decode_worker_that_stops_after_the_fifth_token(cluster: ClusterProcesses) -> None:
    def stop(worker: WorkerProcess) -> None:
        worker.signal(signal.SIGSTOP)

    try:
        _continues_elsewhere(cluster, "decode stops", stop, STOPPED_S)
    finally:
        for worker in cluster.of_role("decode"):
            worker.signal(signal.SIGCONT)


def _continues_elsewhere(
    cluster: ClusterProcesses, name: str, fault: Callable[[WorkerProcess], None], most_s: float
) -> None:
    """Another decode worker goes on with the answer within `most_s` besides the replay."""
    stream = Stream(cluster, name, answer=200)
    stream.send(1, 4)
    answer = Answer()
    events = generating(stream.http, stream.id, stream.tail, 200, answer, last_seq=4)
    while len(answer.ids) < 5:
        next(events)

    def busy() -> list[WorkerProcess]:
        return [w for w in cluster.of_role("decode") if cluster.listed(w)["load"]["running"]]

    [decoder] = wait_until(busy, 5, "a report of who decodes")
    replays = "sglang_stream_router_replays_total"
    before = cluster.counted(replays, reason="continued")
    fault(decoder)
    # What had come before is read at once; the longest wait is the recovery.
    waits, last = [0.0], time.monotonic()
    for _ in events:
        waits.append(time.monotonic() - last)
        last = time.monotonic()
    assert cluster.counted(replays, reason="continued") == before + 1
    limit_s = most_s + stream.prefill_s
    print(f"{name}: next token after {max(waits):.1f} s (limit {limit_s:.1f} s)")
    assert max(waits) <= limit_s
    stream.check(answer)


@pytest.mark.parametrize("again", REPEATS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole-worker", "scheduler-alone"])
def test_a_prefill_worker_that_stops(cluster: ClusterProcesses, whole: bool, again: int) -> None:
    stream = Stream(cluster, f"stopped {whole} {again}")
    stream.send(1, 3)
    holder = stream.holder(cluster)
    scheduler = holder.scheduler()
    what = "worker stopped" if whole else "scheduler stopped"
    try:
        with recovery(what, STOPPED_S + stream.prefill_s) as note:
            if whole:
                holder.signal(signal.SIGSTOP)
            else:
                scheduler.suspend()
            stream.send(4, 4)
            answer = first_token(stream, note)
        stream.check(answer)
    finally:
        if whole:
            holder.signal(signal.SIGCONT)
        else:
            scheduler.resume()
    # It is used again, and what it held of the stream is gone.
    wait_until(lambda: cluster.listed(holder)["healthy"], 60, "the worker is used again")
    wait_until(lambda: cluster.listed(holder)["load"]["open_streams"] == 0, 60, "its copy is gone")
