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
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import median
from typing import Literal

from rich.table import Table

from experiments.client import Answer, MeasuredClient
from experiments.rows import Row
from experiments.stats import ratio_of_medians, verdict
from sglang_stream.errors import EngineFailure

Mode = Literal["waiting", "streaming", "re-sending", "limit"]

CHUNKS = 8
QUESTION_TOKENS = 16
ANSWER_TOKENS = 4
PACES = (1.5, 0.5)
GOAL = 1.3
GOAL_PACE = 1.5
_PREFILLS = 2
_LARGEST_PAGE = 128
_TOKEN_IDS = range(300, 4000)


@dataclass(frozen=True)
class Prompt:
    """A prompt of token ids: equal chunks and a question; `answer_tokens` are asked for."""

    chunks: list[list[int]]
    question: list[int]
    answer_tokens: int = ANSWER_TOKENS

    def context(self, count: int) -> list[int]:
        """The tokens of the first `count` chunks."""
        return list(chain.from_iterable(self.chunks[:count]))

    @property
    def ids(self) -> list[int]:
        return [*self.context(CHUNKS), *self.question]


def random_prompt(size: int, seed: object, answer_tokens: int = ANSWER_TOKENS) -> Prompt:
    """A prompt with `size` tokens in its chunks; nothing of it is in that of another seed."""
    rng = random.Random(f"{size}/{seed}")
    chunks = [rng.choices(_TOKEN_IDS, k=size // CHUNKS) for _ in range(CHUNKS)]
    return Prompt(chunks, rng.choices(_TOKEN_IDS, k=QUESTION_TOKENS), answer_tokens)


@dataclass(frozen=True)
class Cell:
    """One measurement. `pace`: None where chunks are not waited for one by one."""

    size: int
    repeat: int
    mode: Mode
    pace: float | None = None

    def expected_s(self, prefill_s: float) -> float:
        """Roughly how long it takes where a prefill takes `prefill_s`."""
        return prefill_s * (1.1 if self.pace is None else max(self.pace, 1) + 0.25)


def schedule(sizes: Sequence[int], repeats: int) -> Iterator[Cell]:
    """All measurements, in their order.

    Modes take turns, each beginning in another repeat. The paces without a goal are measured in
    every second repeat. Waiting and the limit are the same for all paces.
    """
    for repeat in range(repeats):
        paces = [pace for pace in PACES if pace == GOAL_PACE or repeat % 2 == 0]
        for size in sizes:
            cells = [Cell(size, repeat, "waiting"), Cell(size, repeat, "limit")]
            for pace in paces:
                cells.append(Cell(size, repeat, "streaming", pace))
                cells.append(Cell(size, repeat, "re-sending", pace))
            first = repeat % len(cells)
            yield from cells[first:] + cells[:first]


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
    cells = list(schedule(sizes, repeats))
    async with MeasuredClient(url) as client:
        await client.plain(random_prompt(min(sizes), f"{seed}/warm-up").ids, ANSWER_TOKENS)
        prefills = {size: await prefill_s(client, size, 1, seed) for size in sizes}
        plan(sum(cell.expected_s(prefills[cell.size]) for cell in cells))
        for cell in cells:
            prompt = random_prompt(cell.size, f"{seed}/{cell.repeat}")
            gap_s = (cell.pace or 0) * prefills[cell.size] / CHUNKS
            await client.flush()
            answer = await MEASURES[cell.mode](client, prompt, gap_s)
            add({"bench": "ttft", **asdict(cell), "gap_s": gap_s, **fields_of(answer)})
            advance(cell.expected_s(prefills[cell.size]))


async def prefill_s(client: MeasuredClient, size: int, streams: int, seed: int) -> float:
    """Seconds from `streams` waiting requests, sent at once, to the first token of the last one.

    The least of some: the pace must not become easier because the machine was busy.
    """
    times: list[float] = []
    for i in range(_PREFILLS):
        await client.flush()
        prompts = [random_prompt(size, f"{seed}/prefill/{i}/{n}").ids for n in range(streams)]
        answers = await asyncio.gather(*(client.plain(prompt, 1) for prompt in prompts))
        times.append(max(answer.ttft_s for answer in answers))
    return min(times)


def fields_of(answer: Answer) -> Row:
    """What a row tells of an answer."""
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
    answer = await client.plain(prompt.ids, prompt.answer_tokens)
    if answer.cached_tokens != 0:
        raise EngineFailure(f"{answer.cached_tokens} tokens were cached after a flush")
    return answer


async def _limit(client: MeasuredClient, prompt: Prompt, gap_s: float) -> Answer:
    prefix = prompt.context(CHUNKS - 1)
    await client.plain(prefix, 1)
    answer = await client.plain(prompt.ids, prompt.answer_tokens)
    missing = len(prefix) - (answer.cached_tokens or 0)
    if not 0 <= missing < _LARGEST_PAGE:
        raise EngineFailure(
            f"{answer.cached_tokens} tokens of a prefix of {len(prefix)} were cached"
        )
    return answer


async def _streaming(client: MeasuredClient, prompt: Prompt, gap_s: float) -> Answer:
    answer = await client.streamed(
        paced(prompt.chunks, gap_s),
        prompt.answer_tokens,
        input_ids=[],
        question_ids=prompt.question,
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
        return await client.plain(prompt.ids, prompt.answer_tokens, t0=arrivals.last_at)
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
    shown = Table(title="Time to first token (TTFT) after the last of 8 chunks, median (worst)")
    shown.add_column("")
    sizes = sorted({row["size"] for row in rows})
    for size in sizes:
        shown.add_column(f"{size:,} tokens", justify="right")
    for pace in PACES:
        shown.add_row(f"[bold]chunks over {pace:g} x the prefill time[/]")
        columns = [_column([row for row in rows if row["size"] == size], pace) for size in sizes]
        for name in dict.fromkeys(chain.from_iterable(columns)):
            shown.add_row(f"  {name}", *(column.get(name, "") for column in columns))
        shown.add_section()
    shown.caption = (
        "Limit: an ordinary request whose prefix is cached up to the last chunk. "
        "Ratios of medians, with 95 % intervals."
    )
    return shown


def _column(rows: Sequence[Row], pace: float) -> dict[str, str]:
    """The cells of one size and pace, from the repeats in which all modes were measured; none
    without such a repeat."""
    by_mode = {
        mode: {r["repeat"]: r for r in rows if r["mode"] == mode and r["pace"] in (None, pace)}
        for mode in MEASURES
    }
    repeats = sorted(set[int].intersection(*(set(of) for of in by_mode.values())))
    if not repeats:
        return {}
    times = {mode: [float(of[i]["ttft_s"]) for i in repeats] for mode, of in by_mode.items()}
    to_limit = ratio_of_medians(times["streaming"], times["limit"])
    ready = median(by_mode["streaming"][i]["ready_tokens"] for i in repeats)
    same = sum(len({tuple(of[i]["tokens"]) for of in by_mode.values()}) == 1 for i in repeats)
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
    cells["same tokens in all four"] = (
        "yes" if same == len(repeats) else f"{same} of {len(repeats)}"
    )
    cells["repeats"] = str(len(repeats))
    return cells
