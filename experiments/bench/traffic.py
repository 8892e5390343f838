"""Ordinary requests to SGLang with stream support and without: two servers that take turns.

Each round sends the same requests to both, one server after the other, each with an empty cache;
which one is first changes from round to round. The other server sleeps meanwhile. Of two servers
that are started alike one is often a little faster than the other, for as long as they run:
several pairs are started, with either kind first.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from statistics import median
from typing import Any, Literal

import httpx
from rich.table import Table

from experiments.rows import Row
from experiments.stats import median_ratio, verdict
from sglang_stream.errors import EngineFailure

Server = Literal["plain", "streams"]

GOAL = 0.98
REQUESTS = 16
CONCURRENCY = 4
PROMPT_TOKENS = (200, 800)
ANSWER_TOKENS = 32
_WARM_UP = 0  # a round before the others
_TOKEN_IDS = range(300, 4000)
_TIMEOUT_S = 600.0


async def measure(
    urls: Mapping[Server, str],
    rounds: Iterable[int],
    seed: int,
    add: Callable[[Row], None],
    advance: Callable[[], None],
) -> None:
    """Gives one row for each round and server to `add`; `advance` hears of each, warm-ups too.

    `rounds`: the numbers of those that these two servers have.

    Raises EngineFailure for a request that was refused or a cache that cannot be emptied.
    """
    async with AsyncExitStack() as stack:
        clients = {
            server: await stack.enter_async_context(
                httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False)
            )
            for server, url in urls.items()
        }
        order = list(clients)
        for number in (_WARM_UP, *rounds):
            prompts = random_prompts(f"{seed}/{number}")
            for server in order:
                row = {"bench": "traffic", "round": number, "server": server}
                row |= await _round(clients[server], prompts)
                if number != _WARM_UP:
                    add(row)
                advance()
            order.reverse()


def random_prompts(seed: object) -> list[list[int]]:
    """The prompts of one round, of different lengths; no two share their first token."""
    rng = random.Random(f"traffic/{seed}")
    firsts = rng.sample(_TOKEN_IDS, REQUESTS)
    return [[t, *rng.choices(_TOKEN_IDS, k=rng.randint(*PROMPT_TOKENS) - 1)] for t in firsts]


async def _round(client: httpx.AsyncClient, prompts: Sequence[list[int]]) -> Row:
    """Sends all prompts, `CONCURRENCY` at a time; tokens a second are those of both directions."""
    await _flush(client)
    queue = iter(enumerate(prompts))
    answers: list[list[int]] = [[] for _ in prompts]

    async def work() -> None:
        for i, prompt in queue:
            answers[i] = await _generate(client, prompt)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    seconds = time.perf_counter() - began
    tokens = sum(map(len, prompts)) + sum(map(len, answers))
    return {"seconds": seconds, "tokens_per_s": tokens / seconds, "tokens": answers}


async def _generate(client: httpx.AsyncClient, prompt: Sequence[int]) -> list[int]:
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling}
    response = await client.post("/generate", json=body)
    if response.status_code != 200:
        raise EngineFailure(f"an ordinary request was refused: {response.text}")
    answer: dict[str, Any] = response.json()
    if answer["meta_info"]["cached_tokens"]:
        raise EngineFailure("tokens were cached after a flush")
    return list(answer["output_ids"])


async def _flush(client: httpx.AsyncClient) -> None:
    response = await client.post("/flush_cache", params={"timeout": 60})
    if response.status_code != 200:
        raise EngineFailure(f"the cache was not emptied: {response.text}")


def table(rows: Sequence[Row]) -> Table:
    """Throughput of both, and how much of it remains with stream support."""
    by_server = {
        server: [row for row in rows if row["server"] == server] for server in ("plain", "streams")
    }
    speeds = {server: [row["tokens_per_s"] for row in of] for server, of in by_server.items()}
    ratio = median_ratio(speeds["streams"], speeds["plain"])
    pairs = zip(by_server["streams"], by_server["plain"], strict=True)
    same = sum(a["tokens"] == b["tokens"] for a, b in pairs)
    shown = Table(title="Ordinary traffic, no stream open: tokens a second, median (lowest)")
    for heading in (
        "rounds",
        "plain SGLang",
        "with stream support",
        "median ratio (95 % interval)",
        f"at least {GOAL:g}",
        "same tokens",
    ):
        shown.add_column(heading, justify="right")
    rounds = len(by_server["plain"])
    shown.add_row(
        str(rounds),
        *(f"{median(of):,.0f} ({min(of):,.0f})" for of in speeds.values()),
        f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        verdict(ratio.value >= GOAL),
        "yes" if same == rounds else f"in {same} of {rounds} rounds",
    )
    return shown
