"""Time to first token of one prompt in 8 chunks, by four clients that take turns.

    waiting     all chunks awaited, then one ordinary request
    streaming   each chunk sent as it arrives
    re-sending  plain SGLang: a request for one token of the prompt so far, the newest content only
                and one at a time, so that its prefix cache is warm for the last request
    limit       an ordinary request whose prefix is cached up to the last chunk already

Each measurement begins with an empty cache. `t0` is the arrival of the last chunk; the question is
known from the start. Chunks arrive at a pace: over so many times the prompt's prefill time, which
is measured first.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Literal

from rich.table import Table

from experiments.bench.rows import Row
from experiments.bench.stats import ratio_of_medians, verdict
from experiments.client import Answer, MeasuredClient
from sglang_stream.errors import EngineFailure

Mode = Literal["waiting", "streaming", "re-sending", "limit"]

CHUNKS = 8
QUESTION_TOKENS = 16
ANSWER_TOKENS = 16
PACES = (1.5, 0.5)
GOAL = 1.3
GOAL_PACE = 1.5
# What needs no chunks over time is measured once for both paces.
CELLS: tuple[tuple[Mode, float | None], ...] = (
    ("waiting", None),
    ("limit", None),
    *(("streaming", pace) for pace in PACES),
    *(("re-sending", pace) for pace in PACES),
)
_PREFILLS = 3
_LARGEST_PAGE = 128
_TOKEN_IDS = range(300, 4000)


@dataclass(frozen=True)
class Prompt:
    """A prompt of token ids: equal chunks and a question."""

    chunks: list[list[int]]
    question: list[int]

    def context(self, count: int) -> list[int]:
        """The tokens of the first `count` chunks."""
        return list(chain.from_iterable(self.chunks[:count]))

    @property
    def ids(self) -> list[int]:
        return [*self.context(CHUNKS), *self.question]


def random_prompt(size: int, seed: object) -> Prompt:
    """A prompt with `size` tokens in its chunks; nothing of it is in that of another seed."""
    rng = random.Random(f"{size}/{seed}")
    chunks = [rng.choices(_TOKEN_IDS, k=size // CHUNKS) for _ in range(CHUNKS)]
    return Prompt(chunks, rng.choices(_TOKEN_IDS, k=QUESTION_TOKENS))


async def measure(
    url: str,
    sizes: Sequence[int],
    repeats: int,
    seed: int,
    add: Callable[[Row], None],
    plan: Callable[[float], None],
    advance: Callable[[float], None],
) -> None:
    """Measures against the server at `url` and gives each row to `add`.

    `plan` is told the seconds that the work will take, once that is known, and `advance` those of
    each part that is done. Raises EngineFailure where a measurement is not what it should be:
    something cached that must not be, or not cached that must be, or another prompt.
    """
    async with MeasuredClient(url) as client:
        prefill_s = {size: await _prefill_s(client, size, seed) for size in sizes}
        plan(repeats * sum(_expected_s(prefill_s[s], pace) for s in sizes for _, pace in CELLS))
        for size in sizes:
            for repeat in range(repeats):
                prompt = random_prompt(size, f"{seed}/{repeat}")
                for mode, pace in rotated(CELLS, repeat):
                    gap_s = (pace or 0) * prefill_s[size] / CHUNKS
                    await client.flush()
                    answer = await MEASURES[mode](client, prompt, gap_s)
                    add(
                        {
                            "bench": "ttft",
                            "size": size,
                            "repeat": repeat,
                            "mode": mode,
                            "pace": pace,
                            "gap_s": gap_s,
                            **_fields(answer),
                        }
                    )
                    advance(_expected_s(prefill_s[size], pace))


def rotated(
    cells: Sequence[tuple[Mode, float | None]], by: int
) -> Iterator[tuple[Mode, float | None]]:
    """The cells from another one on each time, so that no mode always follows the same one."""
    yield from (cells[(i + by) % len(cells)] for i in range(len(cells)))


async def _prefill_s(client: MeasuredClient, size: int, seed: int) -> float:
    """Median seconds from a waiting request to its first token. The first ones warm up, too."""
    times: list[float] = []
    for i in range(_PREFILLS):
        await client.flush()
        times.append((await client.plain(random_prompt(size, f"{seed}/prefill/{i}").ids, 1)).ttft_s)
    return median(times)


def _expected_s(prefill_s: float, pace: float | None) -> float:
    return prefill_s * (1.2 if pace is None else max(pace, 1) + 0.5)


def _fields(answer: Answer) -> Row:
    row: Row = {
        "ttft_s": answer.ttft_s,
        "prompt_tokens": len(answer.prompt),
        "tokens": list(answer.tokens),
    }
    if answer.usage is None:
        return row | {"cached_tokens": answer.cached_tokens}
    return row | {
        "ready_tokens": answer.usage.ready_tokens,
        "computed_tokens": answer.usage.computed_tokens,
    }


# --- the clients ----------------------------------------------------------------------------------


async def paced(chunks: Sequence[list[int]], gap_s: float) -> AsyncIterator[list[int]]:
    """The chunks, one every `gap_s` seconds from now, however long the consumer takes."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    for i, chunk in enumerate(chunks, start=1):
        await asyncio.sleep(start + i * gap_s - loop.time())
        yield chunk


async def _waiting(client: MeasuredClient, prompt: Prompt, gap_s: float) -> Answer:
    answer = await client.plain(prompt.ids, ANSWER_TOKENS)
    if answer.cached_tokens != 0:
        raise EngineFailure(f"{answer.cached_tokens} tokens were cached after a flush")
    return answer


async def _limit(client: MeasuredClient, prompt: Prompt, gap_s: float) -> Answer:
    prefix = prompt.context(CHUNKS - 1)
    await client.plain(prefix, 1)
    answer = await client.plain(prompt.ids, ANSWER_TOKENS)
    missing = len(prefix) - (answer.cached_tokens or 0)
    if not 0 <= missing < _LARGEST_PAGE:
        raise EngineFailure(
            f"{answer.cached_tokens} tokens of a prefix of {len(prefix)} were cached"
        )
    return answer


async def _streaming(client: MeasuredClient, prompt: Prompt, gap_s: float) -> Answer:
    answer = await client.streamed(
        paced(prompt.chunks, gap_s), ANSWER_TOKENS, input_ids=[], question_ids=prompt.question
    )
    if answer.prompt != tuple(prompt.ids):
        raise EngineFailure("the stream's prompt is not what was sent")
    return answer


async def _resending(client: MeasuredClient, prompt: Prompt, gap_s: float) -> Answer:
    arrivals = _Arrivals(prompt.chunks, gap_s)
    arriving = asyncio.create_task(arrivals.run())
    try:
        while arrivals.count < CHUNKS:
            await arrivals.next()
            if arrivals.count < CHUNKS:
                await client.plain(prompt.context(arrivals.count), 1)
        return await client.plain(prompt.ids, ANSWER_TOKENS, t0=arrivals.last_at)
    finally:
        arriving.cancel()


class _Arrivals:
    """Chunks that arrive while the client is busy: how many, and when the last one did."""

    def __init__(self, chunks: Sequence[list[int]], gap_s: float) -> None:
        self.count = 0
        self.last_at = 0.0
        self._paced = paced(chunks, gap_s)
        self._news = asyncio.Event()

    async def run(self) -> None:
        async for _ in self._paced:
            self.last_at = time.perf_counter()
            self.count += 1
            self._news.set()

    async def next(self) -> None:
        """Waits until there is a chunk that came after the last call."""
        await self._news.wait()
        self._news.clear()


MEASURES: dict[Mode, Callable[[MeasuredClient, Prompt, float], Awaitable[Answer]]] = {
    "waiting": _waiting,
    "re-sending": _resending,
    "streaming": _streaming,
    "limit": _limit,
}


# --- the table ------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    """A column for each prompt size and a block for each pace, from the rows of one run."""
    sizes = sorted({row["size"] for row in rows})
    shown = Table(title="Time to first token (TTFT) after the last of 8 chunks, median (worst)")
    shown.add_column("")
    for size in sizes:
        shown.add_column(f"{size:,} tokens", justify="right")
    for pace in PACES:
        shown.add_row(f"[bold]chunks over {pace:g} x the prefill time[/]")
        columns = [_column([row for row in rows if row["size"] == size], pace) for size in sizes]
        for name in columns[0]:
            shown.add_row(f"  {name}", *(column[name] for column in columns))
        shown.add_section()
    shown.caption = (
        "Limit: an ordinary request whose prefix is cached up to the last chunk. "
        "Ratios of medians, with 95 % intervals."
    )
    return shown


def _column(rows: Sequence[Row], pace: float) -> dict[str, str]:
    """The cells of one size and pace. Modes are paired by the repeat, in which they took turns."""
    by_mode = {
        mode: sorted(
            (row for row in rows if row["mode"] == mode and row["pace"] in (None, pace)),
            key=lambda row: int(row["repeat"]),
        )
        for mode in MEASURES
    }
    times = {mode: [float(row["ttft_s"]) for row in of] for mode, of in by_mode.items()}
    ready = median(row["ready_tokens"] for row in by_mode["streaming"])
    to_limit = ratio_of_medians(times["streaming"], times["limit"])
    answers = [[row["tokens"] for row in of] for of in by_mode.values()]
    same = sum(all(a == four[0] for a in four) for four in zip(*answers, strict=True))
    cells = {
        f"{mode}, ms": f"{median(of) * 1e3:,.0f} ({max(of) * 1e3:,.0f})"
        for mode, of in times.items()
    }
    cells |= {
        "tokens ready at the seal": f"{ready:,.0f}",
        "waiting / streaming": str(ratio_of_medians(times["waiting"], times["streaming"])),
        "re-sending / streaming": str(ratio_of_medians(times["re-sending"], times["streaming"])),
        "streaming / limit": str(to_limit),
    }
    if pace == GOAL_PACE:
        cells[f"  at most {GOAL:g}"] = verdict(to_limit.value <= GOAL)
    repeats = len(times["waiting"])
    cells["same tokens in all four"] = "yes" if same == repeats else f"{same} of {repeats}"
    return cells
