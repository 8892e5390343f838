"""Requests whose context arrives over time, as the published workloads are shaped, scaled down.

    crawler  append: pages of very different lengths, some seconds apart
    ann      update: lists of documents, of which one changes at a time, in bursts

Lengths, chunks a request and gaps follow the percentiles of Stream2LLM's two workloads (a
log-normal through the median and an upper percentile meets the others). Tokens are so many times
fewer that a prefill takes about as long on a CPU core as the published one on two H200, some 0.2 s
in the mean. Arrivals are Poisson. No two requests share a token of their beginning.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sglang_stream.messages import Mode

LoadName = Literal["crawler", "ann"]

OPENING_TOKENS = 16
QUESTION_TOKENS = 16
DOCUMENTS = 8
_TOKEN_IDS = range(300, 8000)
_OVERCOMMITTED = 3.5  # how many times the open streams at their peak are too large for the pool
_LEAST_DOCUMENT = 4  # tokens
_LONGEST_GAP_S = 10.0  # a rare longer one would only make the run longer


@dataclass(frozen=True)
class LogNormal:
    """By its median and the deviation of its logarithm."""

    median: float
    deviation: float

    def draw(self, rng: random.Random) -> float:
        return rng.lognormvariate(math.log(self.median), self.deviation)


@dataclass(frozen=True)
class Load:
    """A kind of load. `tokens`: of a whole context, at most `most_tokens`; `gap_s`: between two
    chunks, the first one's after the opening; `rate`: requests a second, for which two CPU cores
    are busy three quarters of the time when all of them wait for their context."""

    name: LoadName
    mode: Mode
    rate: float
    tokens: LogNormal
    most_tokens: int
    gap_s: LogNormal


# Published: tokens P50 5,749, P95 28,372; gaps P50 0.701 s, P75 1.340 s.
CRAWLER = Load("crawler", "append", 3.0, LogNormal(5749 / 30, 0.95), 1200, LogNormal(0.701, 0.92))
# Published: tokens P50 10,126, P95 30,618; gaps P50 37 ms, P75 124 ms, here ten times as long: the
# paper slows retrieval down, too, to have many streams open.
ANN = Load("ann", "update", 2.8, LogNormal(10126 / 43, 0.67), 1200, LogNormal(0.37, 1.8))
LOADS: dict[LoadName, Load] = {load.name: load for load in (CRAWLER, ANN)}


@dataclass(frozen=True)
class Chunk:
    """Token ids that arrive `at_s` seconds after the load began: a page to append or, in update
    mode, the whole list of documents."""

    at_s: float
    ids: list[int]


@dataclass(frozen=True)
class Request:
    """One request; times are seconds after the load began."""

    number: int
    arrival_s: float
    opening: list[int]
    chunks: list[Chunk]
    question: list[int]
    mode: Mode

    @property
    def last_chunk_s(self) -> float:
        return self.chunks[-1].at_s

    @property
    def prompt(self) -> list[int]:
        """All tokens, as the engine has them in the end."""
        return [*self.opening, *self._context(len(self.chunks)), *self.question]

    def open_tokens(self, now_s: float) -> int:
        """The length of the prompt at a time at which the stream is open, else 0."""
        if not self.arrival_s <= now_s < self.last_chunk_s:
            return 0
        come = sum(chunk.at_s <= now_s for chunk in self.chunks)
        return len(self.opening) + len(self._context(come))

    def _context(self, count: int) -> list[int]:
        if self.mode == "update":
            return self.chunks[count - 1].ids if count else []
        return [i for chunk in self.chunks[:count] for i in chunk.ids]


def requests_of(load: Load, count: int, seed: int, rate: float | None = None) -> list[Request]:
    """`count` requests in the order of arrival, `rate` a second (by default the load's own)."""
    rng = random.Random(f"load/{load.name}/{seed}")
    firsts = rng.sample(_TOKEN_IDS, count)
    requests: list[Request] = []
    arrival_s = 0.0
    for number, first in enumerate(firsts):
        arrival_s += rng.expovariate(rate or load.rate)
        contents = _pages(load, rng) if load.mode == "append" else _lists(load, rng)
        at_s = arrival_s
        chunks: list[Chunk] = []
        for ids in contents:
            at_s += min(load.gap_s.draw(rng), _LONGEST_GAP_S)
            chunks.append(Chunk(at_s, ids))
        opening = [first, *_ids(rng, OPENING_TOKENS - 1)]
        question = _ids(rng, QUESTION_TOKENS)
        requests.append(Request(number, arrival_s, opening, chunks, question, load.mode))
    return requests


def pool_tokens(requests: Sequence[Request]) -> int:
    """A KV pool so small that the open streams at their peak are several times too large for it;
    the largest request fits with room to spare."""
    times = [chunk.at_s for request in requests for chunk in request.chunks]
    peak = max(sum(request.open_tokens(at_s) for request in requests) for at_s in times)
    largest = max(len(request.prompt) for request in requests)
    return max(int(peak / _OVERCOMMITTED), largest * 5 // 4)


def _pages(load: Load, rng: random.Random) -> list[list[int]]:
    """The pages of one crawl: published are 1 to 17 of them, 8 at the median."""
    count = min(max(round(rng.gauss(8, 2.5)), 1), 17)
    tokens = min(load.tokens.draw(rng), load.most_tokens)
    weights = [rng.expovariate(1) for _ in range(count)]
    unit = tokens / sum(weights)
    return [_ids(rng, max(round(weight * unit), 1)) for weight in weights]


def _lists(load: Load, rng: random.Random) -> list[list[int]]:
    """The top lists of one search: published are 1 to 26 of them, 4 at the median.

    From one to the next a document comes in and the last one drops out, two neighbours change
    places, or the list flips back to the one before; more often far down than at the top.
    """
    count = min(max(round(LogNormal(4, 0.5).draw(rng)), 1), 26)
    mean = min(load.tokens.draw(rng), load.most_tokens * 2 / 3) / DOCUMENTS

    def document() -> list[int]:
        return _ids(rng, max(round(mean * rng.uniform(0.5, 1.5)), _LEAST_DOCUMENT))

    current = [document() for _ in range(DOCUMENTS)]
    lists = [current]
    while len(lists) < count:
        kind = rng.random()
        at = max(rng.randrange(DOCUMENTS), rng.randrange(DOCUMENTS))
        if kind < 0.25 and len(lists) > 1:
            current = lists[-2]
        elif kind < 0.5 and at > 0:
            current = [*current]
            current[at - 1], current[at] = current[at], current[at - 1]
        else:
            current = [*current[:at], document(), *current[at:-1]]
        lists.append(current)
    return [[i for document in documents for i in document] for documents in lists]


def _ids(rng: random.Random, count: int) -> list[int]:
    return rng.choices(_TOKEN_IDS, k=count)
