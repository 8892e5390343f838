"""Time to first token on workers apart, of one prompt alone and of many at once.

Waiting, streaming and re-sending take turns; what they do is told in `experiments.bench.ttft`. All
prompts of a measurement begin together and get their chunks at the same times, over so many times
the seconds in which the same workers answer as many waiting requests that are sent at once: what
arrives can be computed before the next chunk, however many streams there are.

    one at a time    gap = 1.5 x (one prompt's prefill) / 8
    n at once        gap = 1.5 x (from sending n prompts to the last one's first token) / 8
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import median

from rich.table import Table

from experiments.bench.ttft import (
    CHUNKS,
    GOAL_PACE,
    MEASURES,
    Mode,
    fields_of,
    prefill_s,
    random_prompt,
)
from experiments.client import MeasuredClient
from experiments.rows import Row
from experiments.stats import percentile, ratio_of_percentiles, verdict

ANSWER_TOKENS = 1
"""The first one: where workers share cores, decoding an answer takes those of others' prefill."""

MODES: tuple[Mode, ...] = ("waiting", "streaming", "re-sending")
AT_LEAST = 5.0
"""How many times sooner than waiting streaming must be, at the median."""
_P95 = 95.0


@dataclass(frozen=True)
class Load:
    """One measurement: `streams` prompts of `size` tokens at once."""

    size: int
    streams: int
    repeat: int
    mode: Mode

    def expected_s(self, prefill_s: float) -> float:
        """Roughly how long it takes where all prompts are prefilled in `prefill_s`."""
        return prefill_s * (1.1 if self.mode == "waiting" else GOAL_PACE + 0.25)


def schedule(sizes: Sequence[int], streams: Sequence[int], repeats: int) -> Iterator[Load]:
    """All measurements, in their order: modes take turns, each beginning in another repeat."""
    for repeat in range(repeats):
        first = repeat % len(MODES)
        for size in sizes:
            for count in streams:
                for mode in MODES[first:] + MODES[:first]:
                    yield Load(size, count, repeat, mode)


async def measure(
    url: str,
    sizes: Sequence[int],
    streams: Sequence[int],
    repeats: int,
    seed: int,
    add: Callable[[Row], None],
    plan: Callable[[float], None],
    advance: Callable[[float], None],
) -> None:
    """Measures against the server at `url` and gives a row for each answer to `add`.

    `plan`, `advance`: see `ttft.measure`, as for what is raised.
    """
    loads = list(schedule(sizes, streams, repeats))
    async with MeasuredClient(url) as client:
        await client.plain(random_prompt(min(sizes), f"{seed}/warm-up").ids, ANSWER_TOKENS)
        prefills = {
            (size, count): await prefill_s(client, size, count, seed)
            for size in sizes
            for count in streams
        }
        plan(sum(load.expected_s(prefills[load.size, load.streams]) for load in loads))
        for load in loads:
            seconds = prefills[load.size, load.streams]
            gap_s = GOAL_PACE * seconds / CHUNKS
            prompts = [
                random_prompt(load.size, f"{seed}/{load.repeat}/{number}", ANSWER_TOKENS)
                for number in range(load.streams)
            ]
            await client.flush()
            answers = await asyncio.gather(
                *(MEASURES[load.mode](client, prompt, gap_s) for prompt in prompts)
            )
            for number, answer in enumerate(answers):
                row = {"bench": "apart", **asdict(load), "stream": number}
                add(row | {"gap_s": gap_s, **fields_of(answer)})
            advance(load.expected_s(seconds))


def table(rows: Sequence[Row]) -> Table:
    """A column for each prompt size and a block for each number of streams."""
    shown = Table(title="Workers apart: time to first token (TTFT), median (P95)")
    shown.add_column("")
    sizes = sorted({row["size"] for row in rows})
    for size in sizes:
        shown.add_column(f"{size:,} tokens", justify="right")
    for count in sorted({row["streams"] for row in rows}):
        shown.add_row(f"[bold]{count} at once[/]")
        columns = [
            _column([row for row in rows if (row["size"], row["streams"]) == (size, count)])
            for size in sizes
        ]
        for name in dict.fromkeys(chain.from_iterable(columns)):
            shown.add_row(f"  {name}", *(column.get(name, "") for column in columns))
        shown.add_section()
    shown.caption = (
        f"Chunks over {GOAL_PACE:g} x the time to prefill as many prompts at once, "
        "answers of one token. "
        "Ratios with 95 % intervals."
    )
    return shown


def _column(rows: Sequence[Row]) -> dict[str, str]:
    """The cells of one size and number of streams, from the prompts that were asked in all modes;
    none without such a prompt."""
    by_mode = {
        mode: {(r["repeat"], r["stream"]): r for r in rows if r["mode"] == mode} for mode in MODES
    }
    prompts = sorted(set[tuple[int, int]].intersection(*(set(of) for of in by_mode.values())))
    if not prompts:
        return {}
    times = {mode: [float(of[p]["ttft_s"]) for p in prompts] for mode, of in by_mode.items()}
    gain = ratio_of_percentiles(times["waiting"], times["streaming"], 50)
    cells = {
        f"{mode}, ms": f"{median(of) * 1e3:,.0f} ({percentile(of, _P95) * 1e3:,.0f})"
        for mode, of in times.items()
    }
    cells["waiting / streaming"] = str(gain)
    cells[f"  at least {AT_LEAST:g}"] = verdict(gain.value >= AT_LEAST)
    for percent in (50.0, _P95):
        cost = ratio_of_percentiles(times["streaming"], times["re-sending"], percent)
        cells[f"streaming / re-sending, P{percent:g}"] = str(cost)
        cells[f"  at most 1, P{percent:g}"] = verdict(cost.value <= 1)
    cached = {mode: [by_mode[mode][p]["cached_tokens"] for p in prompts] for mode in MODES[::2]}
    cells["ready at the seal"] = (
        f"{median(by_mode['streaming'][p]['ready_tokens'] for p in prompts):,.0f}"
    )
    for mode, tokens in cached.items():
        cells[f"cached, {mode}"] = f"{median(tokens):,.0f}"
    same = sum(len({tuple(of[p]["tokens"]) for of in by_mode.values()}) == 1 for p in prompts)
    cells["same tokens in all three"] = (
        "yes" if same == len(prompts) else f"{same} of {len(prompts)}"
    )
    cells["streams measured"] = str(len(prompts))
    return cells
