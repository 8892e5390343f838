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

    @property
    def prefix(self) -> list[int]:
        """All but the last chunk and the question."""
        return sum(self.chunks[:-1], [])

    @property
    def ids(self) -> list[int]:
        return [*sum(self.chunks, []), *self.question]


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
                    answer = await _MEASURES[mode](client, prompt, gap_s)
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


def rotated(cells: Sequence[tuple[Mode, float | None]], by: int) -> Iterator[tuple[Mode, float | None]]:
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
    await client.plain(prompt.prefix, 1)
    answer = await client.plain(prompt.ids, ANSWER_TOKENS)
    missing = len(prompt.prefix) - (answer.cached_tokens or 0)
    if not 0 <= missing < _LARGEST_PAGE:
        raise EngineFailure(
            f"{answer.cached_tokens} tokens of a prefix of {len(prompt.prefix)} were cached"
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
        while not arrivals.complete:
            await arrivals.next()
            if not arrivals.complete:
                await client.plain(arrivals.ids, 1)
        return await client.plain(
            [*arrivals.ids, *prompt.question], ANSWER_TOKENS, t0=arrivals.last_at
        )
    finally:
        arriving.cancel()


class _Arrivals:
    """Chunks that arrive while the client is busy. `last_at`: of the last one, as `t0` is taken."""

    def __init__(self, chunks: Sequence[list[int]], gap_s: float) -> None:
        self._chunks = chunks
        self._gap_s = gap_s
        self._news = asyncio.Event()
        self._count = 0
        self.last_at = 0.0

    async def run(self) -> None:
        async for _ in paced(self._chunks, self._gap_s):
            self.last_at = time.perf_counter()
            self._count += 1
            self._news.set()

    async def next(self) -> None:
        """Waits for a chunk that came after the last call."""
        await self._news.wait()
        self._news.clear()

    @property
    def complete(self) -> bool:
        return self._count == len(self._chunks)

    @property
    def ids(self) -> list[int]:
        return sum(self._chunks[: self._count], [])


_MEASURES: dict[Mode, Callable[[MeasuredClient, Prompt, float], Awaitable[Answer]]] = {
    "waiting": _waiting,
    "limit": _limit,
    "streaming": _streaming,
    "re-sending": _resending,
}


# --- the table ------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    """One line for each prompt size and pace, from the rows of one run."""
    shown = Table(title="Time to first token after the last chunk, ms: median (worst)")
    for heading in HEADINGS:
        shown.add_column(heading, justify="right")
    for size in sorted({row["size"] for row in rows}):
        for pace in PACES:
            shown.add_row(*_cells([row for row in rows if row["size"] == size], pace))
    shown.caption = (
        "Ratios of medians with 95 % intervals. Limit: an ordinary request whose prefix is cached "
        "up to the last chunk. Ready: tokens with KV at the seal of the stream."
    )
    return shown


HEADINGS = (
    "prompt",
    "chunks over",
    "waiting",
    "re-sending",
    "streaming",
    "limit",
    "ready",
    "waiting / streaming",
    "re-sending / streaming",
    "streaming / limit",
    f"at most {GOAL:g}",
    "same tokens",
)


def _cells(rows: Sequence[Row], pace: float) -> Iterator[str]:
    """Of one size and pace. Modes are paired by the repeat, in which they took turns."""
    by_mode = {
        mode: sorted(
            (row for row in rows if row["mode"] == mode and row["pace"] in (None, pace)),
            key=lambda row: int(row["repeat"]),
        )
        for mode in _MEASURES
    }
    times = {mode: [float(row["ttft_s"]) for row in of] for mode, of in by_mode.items()}
    to_limit = ratio_of_medians(times["streaming"], times["limit"])
    yield f"{rows[0]['size']:,}"
    yield f"{pace:g} x prefill"
    for mode in ("waiting", "re-sending", "streaming", "limit"):
        yield f"{median(times[mode]) * 1e3:,.0f} ({max(times[mode]) * 1e3:,.0f})"
    yield f"{median(row['ready_tokens'] for row in by_mode['streaming']):,.0f}"
    yield str(ratio_of_medians(times["waiting"], times["streaming"]))
    yield str(ratio_of_medians(times["re-sending"], times["streaming"]))
    yield str(to_limit)
    yield verdict(to_limit.value <= GOAL) if pace == GOAL_PACE else ""
    answers = [[row["tokens"] for row in of] for of in by_mode.values()]
    same = sum(all(a == same[0] for a in same) for same in zip(*answers, strict=True))
    yield "yes" if same == len(times["waiting"]) else f"{same} of {len(times['waiting'])}"
