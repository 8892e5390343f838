"""Ordinary requests to SGLang with stream support and without: two servers that take turns.

A round has several waves, each of a few requests at once. Both servers get the same waves, one
server after the other, and which one is first changes from wave to wave: both are done before
the machine has become much faster or slower. The other server sleeps meanwhile. Nothing is cached.

A server keeps the luck of its start: two that were started alike differ by some per cent for as
long as they run. So there are several pairs, with either kind started first.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import islice
from statistics import median
from typing import Any, Literal, get_args

import httpx
from rich.table import Table

from experiments.rows import Row
from experiments.stats import median_ratio, verdict
from sglang_stream.errors import EngineFailure

Server = Literal["plain", "streams"]

GOAL = 0.98
PAIRS = 4  # of servers
WAVES = 4  # of a round
AT_ONCE = 4
PROMPT_TOKENS = (200, 800)
ANSWER_TOKENS = 32
_TOKEN_IDS = range(300, 4000)
_TIMEOUT_S = 600.0


async def measure(
    urls: Mapping[Server, str],
    pair: int,
    rounds: int,
    seed: int,
    add: Callable[[Row], None],
    advance: Callable[[], None],
) -> None:
    """Gives one row for each wave and server to `add`; `advance` hears of each, warm-ups too.

    `pair`: the number of these two servers.

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
        for number in range(rounds + 1):
            for client in clients.values():
                await _flush(client)
            for wave, prompts in enumerate(random_prompts(f"{seed}/{pair}/{number}")):
                for server in order:
                    row = await _wave(clients[server], prompts)
                    if number > 0:  # the first round warms up
                        where = {"pair": pair, "round": number, "wave": wave, "server": server}
                        add({"bench": "traffic", **where, **row})
                    advance()
                order.reverse()


def waves_of(rounds: int) -> int:
    """How often `measure` calls `advance`."""
    return len(get_args(Server)) * WAVES * (rounds + 1)


def random_prompts(seed: object) -> list[list[list[int]]]:
    """The prompts of each wave of a round, of different lengths; no two of the round share their
    first token."""
    rng = random.Random(f"traffic/{seed}")
    firsts = iter(rng.sample(_TOKEN_IDS, WAVES * AT_ONCE))
    return [
        [
            [first, *rng.choices(_TOKEN_IDS, k=rng.randint(*PROMPT_TOKENS) - 1)]
            for first in islice(firsts, AT_ONCE)
        ]
        for _ in range(WAVES)
    ]


async def _wave(client: httpx.AsyncClient, prompts: Sequence[list[int]]) -> Row:
    """Sends all prompts at once; tokens a second are those of both directions."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(_generate(client, prompt) for prompt in prompts))
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
    """Throughput of both, and how much of it remains with stream support: of each pair of servers
    and of all, which the goal is for."""
    shown = Table(title="Ordinary traffic, no stream open: tokens a second, median (lowest)")
    for heading in (
        "servers",
        "waves",
        "plain SGLang",
        "with stream support",
        "median ratio (95 % interval)",
        f"at least {GOAL:g}",
        "same tokens",
    ):
        shown.add_column(heading, justify="right")
    for pair in sorted({row["pair"] for row in rows}):
        cells, _ = _compared([row for row in rows if row["pair"] == pair])
        shown.add_row(str(pair + 1), *cells[:-1], "", cells[-1])
    cells, ratio = _compared(rows)
    shown.add_section()
    shown.add_row("all", *cells[:-1], verdict(ratio >= GOAL), cells[-1])
    return shown


def _compared(rows: Sequence[Row]) -> tuple[list[str], float]:
    """The cells of some waves, and the ratio."""
    plain, streams = ([r for r in rows if r["server"] == server] for server in get_args(Server))
    speeds = [[row["tokens_per_s"] for row in of] for of in (plain, streams)]
    ratio = median_ratio(speeds[1], speeds[0])
    same = sum(a["tokens"] == b["tokens"] for a, b in zip(streams, plain, strict=True))
    cells = [
        str(len(plain)),
        *(f"{median(of):,.0f} ({min(of):,.0f})" for of in speeds),
        f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        "yes" if same == len(plain) else f"in {same} of {len(plain)} waves",
    ]
    return cells, ratio.value
