"""Many streams, little memory: the policies under one load, each on a server of its own.

A cell is a load under a policy, or waiting: all chunks awaited by the client, then one ordinary
request, on the same engine. All cells of a load get the same requests at the same times, whether
earlier ones are answered or not (an open loop), and a KV pool several times too small for the
streams that are open at the peak. Times count from when the last chunk was due to arrive, so the
client's own delays are in them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from experiments.bench.calls import LoadClient, Timed
from experiments.bench.counters import counted_since, read_counters
from experiments.bench.loads import LOADS, LoadName, Request
from experiments.pacing import until
from experiments.rows import Row
from sglang_stream.errors import EngineFailure, InvalidRequest, StreamError
from sglang_stream.policy import Invalidation, PolicyName

Mode = Literal["waiting", "streaming"]

POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)
ANSWER_TOKENS = 8
REQUESTS = 200
POLICIES = "waiting,default,fcfs,lcas,mcps,srpf,slack,slack:hard"
_WARMING = (64, 256, 512)  # tokens of the prompts that the engine sees first


@dataclass(frozen=True)
class Cell:
    """`stream_policy`, `invalidation`: None for waiting."""

    workload: LoadName
    mode: Mode
    stream_policy: PolicyName | None = None
    invalidation: Invalidation | None = None

    @property
    def name(self) -> str:
        if self.stream_policy is None:
            return self.mode
        return self.stream_policy + (":hard" if self.invalidation == "hard" else "")

    @property
    def flags(self) -> list[str]:
        """What `sglang-stream serve` is told for it."""
        if self.stream_policy is None or self.invalidation is None:
            return []
        return ["--stream-policy", self.stream_policy, "--invalidation", self.invalidation]


def cells_of(loads: str, policies: str) -> list[Cell]:
    """The cells of some loads and policies, names with commas between; a policy with `:hard`
    after it is measured with hard invalidation, where there are updates. Raises InvalidRequest."""
    cells: list[Cell] = []
    for workload in loads.split(","):
        if workload not in LOADS:
            known = ", ".join(LOADS)
            raise InvalidRequest(f"--loads {workload}: there are {known}", param="--loads")
        load = LOADS[workload]
        for name in policies.split(","):
            wanted, _, kind = name.partition(":")
            policy = next((p for p in POLICY_NAMES if p == wanted), None)
            if name == "waiting":
                cells.append(Cell(load.name, "waiting"))
            elif policy is None or kind not in ("", "hard"):
                known = ", ".join(("waiting", *POLICY_NAMES))
                raise InvalidRequest(
                    f"--policies {name}: there are {known}, each with :hard after it or not",
                    param="--policies",
                )
            elif kind != "hard" or load.mode == "update":
                invalidation: Invalidation = "hard" if kind else "soft"
                cells.append(Cell(load.name, "streaming", policy, invalidation))
    return cells


def pool_flags(pool_tokens: int) -> list[str]:
    """What a server is told to have so small a pool, and to tell what it does."""
    return ["--max-total-tokens", str(pool_tokens), "--enable-cache-report", "--enable-metrics"]


async def measure(
    url: str,
    worker_url: str,
    cell: Cell,
    requests: Sequence[Request],
    described: Row,
    add: Callable[[Row], None],
    advance: Callable[[], None],
) -> None:
    """Gives one row for each request to `add`, then one for the cell; `advance` hears of each.

    `described` is in all rows. A request that was refused has `failed` in its row. Raises
    EngineFailure for tokens that were cached where nothing may be.
    """
    async with LoadClient(url) as client:
        await _warm_up(client, cell.mode)
        await client.flush()
        before = read_counters(worker_url)
        began = time.perf_counter()
        row = {"bench": "pressure", **asdict(cell), **described}

        async def one(request: Request) -> Row:
            told = await _one(client, cell.mode, request, began)
            add(row | {"what": "request", **told})
            advance()
            return told

        answers = await asyncio.gather(*(one(request) for request in requests))
        counted = counted_since(before, read_counters(worker_url))
        ends = [answer["end_s"] for answer in answers if "failed" not in answer]
        output = ANSWER_TOKENS * len(ends)
        cell_row = {"what": "cell", "makespan_s": max(ends, default=0.0), "output_tokens": output}
        add(row | cell_row | {"requests": len(requests), **counted})
        await client.flush()


async def _one(client: LoadClient, mode: Mode, request: Request, began: float) -> Row:
    """What a row tells of one request."""
    row: Row = {
        "number": request.number,
        "arrival_s": request.arrival_s,
        "last_chunk_s": request.last_chunk_s,
        "chunks": len(request.chunks),
    }
    try:
        serve = _wait if mode == "waiting" else _stream
        timed = await serve(client, request, began)
    except StreamError as e:
        return row | {"failed": str(e)}
    if mode == "waiting" and timed.cached_tokens:
        raise EngineFailure(f"{timed.cached_tokens} tokens of an own prompt were cached")
    return row | {
        "seal_s": timed.called_s - began,
        "first_token_s": timed.first_token_s - began,
        "end_s": timed.end_s - began,
        "ttft_s": timed.first_token_s - began - request.last_chunk_s,
        "prompt_tokens": timed.usage["prompt_tokens"],
        "cached_tokens": timed.cached_tokens,
        "usage": timed.usage.get("stream"),
    }


async def _wait(client: LoadClient, request: Request, began: float) -> Timed:
    await until(began + request.last_chunk_s)
    return await client.plain(request.prompt, ANSWER_TOKENS)


async def _stream(client: LoadClient, request: Request, began: float) -> Timed:
    """Sends each chunk when it is due, one call at a time, and the last one with the call that
    generates; an update that is late by then gives way to the next one. All as in the SDK."""
    await until(began + request.arrival_s)
    stream_id = await client.open(request.mode, request.opening)
    send = client.append if request.mode == "append" else client.update
    *chunks, last = request.chunks
    for seq, chunk in enumerate(chunks, start=1):
        await until(began + chunk.at_s)
        late = began + request.chunks[seq].at_s <= time.perf_counter()
        if not (late and request.mode == "update"):
            await send(stream_id, seq, chunk.ids)
    await until(began + last.at_s)
    seq = len(request.chunks)
    return await client.generate(stream_id, seq, request.question, ANSWER_TOKENS, last.ids)


async def _warm_up(client: LoadClient, mode: Mode) -> None:
    """Has the engine compute prompts of several lengths, by the calls of the cell."""
    rng = random.Random("pressure/warm-up")
    for size in _WARMING * 2:
        ids = rng.choices(range(300, 8000), k=size)
        if mode == "waiting":
            await client.plain(ids, ANSWER_TOKENS)
            continue
        stream_id = await client.open("append", [])
        await client.append(stream_id, 1, ids[: size // 2])
        await client.append(stream_id, 2, ids[size // 2 :])
        await client.generate(stream_id, 2, [], ANSWER_TOKENS)
