"""Forty streams on a KV pool that is four times too small for them."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import httpx

from sglang_stream import messages as m
from tests.harness import Worker

POOL = 2400
STREAMS = 40
PROMPT = 240
ANSWER = 8
TAIL = [5, 9, 3]


def tokens(seed: object, length: int) -> list[int]:
    rng = random.Random(str(seed))
    return [rng.randrange(100, 4000) for _ in range(length)]


class Load:
    """Half of the streams append chunks; the lists of the others change, with a flip back.

    `expected`: for each, the greedy tokens of a cold request. Some streams share a prefix.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.contexts = [self._contexts(i) for i in range(STREAMS)]
        self.expected = [worker.cold([*c[-1], *TAIL], ANSWER).tokens for c in self.contexts]

    def run(self) -> list[str]:
        """Plays all streams at once; returns what is wrong with their tokens."""
        worker = self._worker
        ids = [worker.open(self._mode(i)) for i in range(STREAMS)]
        rounds = len(self.contexts[0])
        for seq in range(1, rounds + 1):
            for i, stream in enumerate(ids):
                context = self.contexts[i]
                if self._mode(i) == "append":
                    before = len(context[seq - 2]) if seq > 1 else 0
                    worker.append(stream, seq, context[seq - 1][before:])
                else:
                    worker.update(stream, seq, context[seq - 1])
        order = random.Random(1).sample(range(STREAMS), STREAMS)
        with ThreadPoolExecutor(STREAMS) as pool:
            answers = dict(
                zip(order, pool.map(lambda i: self._seal(ids[i], rounds), order), strict=True)
            )
        worker.opened.clear()
        return [
            f"stream {i}: {answers[i]}, not {self.expected[i]}"
            for i in range(STREAMS)
            if answers[i] != self.expected[i]
        ]

    @staticmethod
    def _mode(i: int) -> m.Mode:
        return "append" if i % 2 else "update"

    def _contexts(self, i: int) -> list[list[int]]:
        """The context after each round."""
        if self._mode(i) == "append":
            whole = tokens(("shared", i % 8), PROMPT // 2) + tokens(i, PROMPT // 2)
            return [whole[: PROMPT // 4 * n] for n in range(1, 5)]
        docs = {d: tokens((d, i // 8), PROMPT // 4) for d in "abcd"} | {"x": tokens(i, 30)}
        return [[t for d in names for t in docs[d]] for names in ("abcd", "acbd", "abcd", "abxcd")]

    def _seal(self, stream: str, last_seq: int) -> list[int]:
        with httpx.Client(base_url=self._worker.url, timeout=300) as client:
            body = self._worker.body(stream, TAIL, ANSWER, last_seq)
            return list(client.post("/generate", json=body).json()["output_ids"])
