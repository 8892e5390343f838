"""Do idle streams keep others out? Ordinary requests beside them, and without them, in turn.

    idle   200 streams hold 95 % of the KV pool and get nothing more; then come ordinary requests
           that need half of the pool
    none   the same requests, the pool empty

The streams of a pair are opened and computed before it and dropped after it; which side is first
changes from pair to pair, and each side begins with an empty cache.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Literal

from rich.table import Table

from experiments.bench.calls import LoadClient
from experiments.direct import DirectWorker
from experiments.rows import Row
from experiments.stats import ratio_of_medians, verdict
from sglang_stream.errors import EngineFailure

Side = Literal["idle", "none"]
Kind = Literal["stream", "request"]

STREAMS = 200
POOL_TOKENS = 8000
HELD = 0.95
NEEDED = 0.5
REQUESTS = 4
ANSWER_TOKENS = 16
GOAL = 1.10
_IDLE_TIMEOUT_S = 600
_COMPUTED_S = 120.0
_POLL_S = 0.1
_TOKEN_IDS = range(300, 8000)
_FIRSTS: dict[Kind, range] = {"stream": range(300, 4000), "request": range(4000, 8000)}


@dataclass(frozen=True)
class Sizes:
    """Tokens of each idle stream and of each ordinary request, with its answer, for a pool."""

    stream: int
    request: int

    @classmethod
    def for_pool(cls, tokens: int, streams: int) -> Sizes:
        """Streams that hold at least `HELD` of the pool, and requests that need `NEEDED` of it."""
        return cls(-int(-tokens * HELD // streams), int(tokens * NEEDED) // REQUESTS)


async def measure(
    url: str,
    worker_url: str,
    pool_tokens: int,
    streams: int,
    pairs: int,
    seed: int,
    add: Callable[[Row], None],
    advance: Callable[[], None],
) -> None:
    """Gives one row for each side of each pair to `add`; `advance` hears of each pair.

    Raises EngineFailure if the streams do not come to hold the pool, if a cache cannot be emptied
    or if something of a request was cached.
    """
    sizes = Sizes.for_pool(pool_tokens, streams)
    rng = random.Random(f"pinning/{seed}")
    async with LoadClient(url) as client:
        with closing(DirectWorker(worker_url)) as worker:
            sides: list[Side] = ["none", "idle"]
            for pair in range(-1, pairs):
                for side in sides:
                    await client.flush()
                    held = _fill(worker, sizes, streams, rng) if side == "idle" else {}
                    row = {"bench": "pinning", "pair": pair, "side": side, "pool": pool_tokens}
                    row |= {"streams": len(held), "held_tokens": sum(held.values())}
                    row |= await _ask(client, _prompts("request", sizes, rng, REQUESTS))
                    row["left_tokens"] = sum(worker.status(stream).held for stream in held)
                    for stream in held:
                        worker.abort(stream)
                    if pair >= 0:  # the first one warms up
                        add(row)
                sides.reverse()
                advance()
            await client.flush()


def _fill(worker: DirectWorker, sizes: Sizes, streams: int, rng: random.Random) -> dict[str, int]:
    """Opens idle streams and waits until all of them are computed; the tokens that each holds."""
    contents = _prompts("stream", sizes, rng, streams)
    ids = [f"st-{uuid.uuid4().hex}" for _ in contents]
    for stream, content in zip(ids, contents, strict=True):
        worker.open(stream, _IDLE_TIMEOUT_S)
        worker.append(stream, 1, content)
    deadline = time.monotonic() + _COMPUTED_S
    whole = sizes.stream - sizes.stream % worker.page_size
    waiting = set(ids)
    while waiting:
        waiting = {stream for stream in waiting if worker.status(stream).held < whole}
        if waiting and time.monotonic() > deadline:
            raise EngineFailure(
                f"{len(waiting)} of {streams} idle streams do not hold their {whole} tokens"
            )
        if waiting:
            time.sleep(_POLL_S)
    return {stream: worker.status(stream).held for stream in ids}


async def _ask(client: LoadClient, prompts: Sequence[list[int]]) -> Row:
    """Sends ordinary requests at once; seconds to each first token and to the last answer's end."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(client.plain(prompt, ANSWER_TOKENS) for prompt in prompts))
    if any(answer.cached_tokens for answer in answers):
        raise EngineFailure("tokens of an ordinary request were cached")
    return {
        "ttft_s": [answer.first_token_s - began for answer in answers],
        "total_s": max(answer.end_s for answer in answers) - began,
    }


def _prompts(kind: Kind, sizes: Sizes, rng: random.Random, count: int) -> list[list[int]]:
    """Random token ids; no two prompts of one side of a pair share their first token."""
    size = sizes.stream if kind == "stream" else sizes.request - ANSWER_TOKENS
    firsts = rng.sample(_FIRSTS[kind], count)
    return [[first, *rng.choices(_TOKEN_IDS, k=size - 1)] for first in firsts]


def table(rows: Sequence[Row]) -> Table:
    """The medians of both sides over the pairs that are complete, and their ratio."""
    shown = Table(title="Ordinary requests that need half of the KV pool, beside idle streams")
    for heading in (
        "",
        "pairs",
        "idle streams",
        "without",
        "ratio of medians (95 % interval)",
        f"at most {GOAL:g}",
    ):
        shown.add_column(heading, justify="right" if heading else "left")
    by_side = {side: {r["pair"]: r for r in rows if r["side"] == side} for side in ("idle", "none")}
    pairs = sorted(set(by_side["idle"]) & set(by_side["none"]))
    if not pairs:
        return shown
    for name, seconds in (
        ("first token (mean of a pair's), ms", _first_token_s),
        ("last answer's end, ms", _total_s),
    ):
        idle, none = ([seconds(by_side[side][pair]) for pair in pairs] for side in by_side)
        ratio = ratio_of_medians(idle, none)
        shown.add_row(
            name,
            str(len(pairs)),
            f"{median(idle) * 1e3:,.0f}",
            f"{median(none) * 1e3:,.0f}",
            f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
            verdict(ratio.value <= GOAL),
        )
    held = median(row["held_tokens"] / row["pool"] for row in by_side["idle"].values())
    streams = median(row["streams"] for row in by_side["idle"].values())
    shown.caption = f"{streams:.0f} idle streams held {held:.0%} of the pool before each pair."
    return shown


def _first_token_s(row: Row) -> float:
    return sum(row["ttft_s"]) / len(row["ttft_s"])


def _total_s(row: Row) -> float:
    return float(row["total_s"])
