from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

import pytest
from rich.console import Console

from experiments.bench import ttft
from experiments.bench.ttft import CHUNKS, Cell, Prompt, paced, random_prompt, schedule, table
from experiments.client import Answer, MeasuredClient
from experiments.rows import Row
from sglang_stream.errors import EngineFailure


class FakeClient:
    """Answers ordinary requests, `cached` tokens of which were cached.

    `groups`: chunks that arrive together, the next ones while a request is on its way.
    """

    def __init__(self, *, cached: int = 0, groups: Sequence[int] = ()) -> None:
        self.prompts: list[tuple[int, ...]] = []
        self.t0: list[float | None] = []
        self._cached = cached
        self._groups = groups
        self._arrived = 0
        self._changed = asyncio.Condition()

    async def arrivals(self, chunks: Sequence[list[int]], gap_s: float) -> AsyncIterator[list[int]]:
        left = iter(chunks)
        for number, size in enumerate(self._groups):
            await self._until(lambda number=number: len(self.prompts) >= number)
            for _ in range(size):
                yield next(left)
            self._arrived = number + 1
            await self._until(lambda: True)

    async def plain(
        self, prompt: Sequence[int], max_tokens: int, t0: float | None = None
    ) -> Answer:
        self.prompts.append(tuple(prompt))
        self.t0.append(t0)
        await self._until(lambda: self._arrived >= min(len(self.prompts) + 1, len(self._groups)))
        return Answer(0.1, tuple(prompt), (1,) * max_tokens, cached_tokens=self._cached)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Tells what has changed, then waits for the other side."""
        async with self._changed:
            self._changed.notify_all()
            await self._changed.wait_for(condition)


def ask(mode: ttft.Mode, client: FakeClient, prompt: Prompt) -> Answer:
    measured = ttft.MEASURES[mode](cast(MeasuredClient, client), prompt, 0.0)
    return asyncio.run(cast(Any, measured))


def lines_of(rows: Sequence[Row]) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=120).print(table(rows))
    return file.getvalue().splitlines()


def row(mode: str, pace: float | None, repeat: int, ttft_s: float, **more: Any) -> Row:
    common = {"bench": "ttft", "size": 2048, "prompt_tokens": 2064, "tokens": [1, 2, 3]}
    return {**common, "mode": mode, "pace": pace, "repeat": repeat, "ttft_s": ttft_s, **more}


def rows_of_a_run(streaming_s: Sequence[float] = (0.12, 0.11, 0.5)) -> list[Row]:
    rows: list[Row] = []
    for repeat, seconds in enumerate(streaming_s):
        rows.append(row("waiting", None, repeat, 1.0 + repeat, cached_tokens=0))
        rows.append(row("limit", None, repeat, 0.1, cached_tokens=1792))
        for pace in ttft.PACES:
            rows.append(row("streaming", pace, repeat, seconds / pace * 1.5, ready_tokens=1792))
            rows.append(row("re-sending", pace, repeat, 0.6))
    return rows


# --- prompts and arrivals -------------------------------------------------------------------------


def test_prompts_share_nothing_and_are_repeatable() -> None:
    prompt = random_prompt(2048, "0/1")
    assert prompt == random_prompt(2048, "0/1")
    assert [len(chunk) for chunk in prompt.chunks] == [256] * CHUNKS
    assert len(prompt.ids) == 2048 + ttft.QUESTION_TOKENS
    assert prompt.ids[: 7 * 256] == prompt.context(7)
    for other in (random_prompt(2048, "0/2"), random_prompt(8192, "0/1")):
        assert other.ids[:16] != prompt.ids[:16]


def test_schedule() -> None:
    cells = list(schedule([2048, 8192], 5))
    assert len(set(cells)) == len(cells) == 2 * (3 * 6 + 2 * 4)
    for size in (2048, 8192):
        for repeat in range(5):
            block = [cell for cell in cells if (cell.size, cell.repeat) == (size, repeat)]
            paces = ttft.PACES if repeat % 2 == 0 else (ttft.GOAL_PACE,)
            for mode in ("streaming", "re-sending"):
                assert [c.pace for c in block if c.mode == mode] in (
                    list(paces),
                    list(reversed(paces)),
                )
            for mode in ("waiting", "limit"):
                assert [c.pace for c in block if c.mode == mode] == [None]
    firsts = [c for before, c in zip([None, *cells], cells, strict=False) if _begins(before, c)]
    assert len({(c.mode, c.pace) for c in firsts if c.size == 2048}) >= 4


def _begins(before: Cell | None, cell: Cell) -> bool:
    return before is None or (before.size, before.repeat) != (cell.size, cell.repeat)


def test_chunks_keep_their_times_whatever_the_consumer_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def run() -> list[list[int]]:
        return [chunk async for chunk in paced([[1], [2], [3], [4]], gap_s=1000)]

    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert asyncio.run(run()) == [[1], [2], [3], [4]]
    # No time passes while it "sleeps": what is left to a chunk's time grows from chunk to chunk.
    assert slept == pytest.approx([1000, 2000, 3000, 4000], abs=100)


# --- the clients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "sent"),
    [
        pytest.param([1] * CHUNKS, [1, 2, 3, 4, 5, 6, 7], id="each chunk before the next one"),
        pytest.param([1, 3, 4], [1, 4], id="the newest content only"),
        pytest.param([CHUNKS], [], id="all at once"),
    ],
)
def test_resending(monkeypatch: pytest.MonkeyPatch, groups: list[int], sent: list[int]) -> None:
    prompt, client = random_prompt(64, "re-sending"), FakeClient(groups=groups)
    monkeypatch.setattr(ttft, "paced", client.arrivals)
    began = time.perf_counter()
    answer = ask("re-sending", client, prompt)
    assert client.prompts == [*(tuple(prompt.context(n)) for n in sent), tuple(prompt.ids)]
    *warming, last = client.t0
    assert warming == [None] * len(sent)
    assert last is not None
    assert began < last < time.perf_counter()
    assert len(answer.tokens) == ttft.ANSWER_TOKENS


def test_a_waiting_request_must_find_nothing_cached() -> None:
    prompt = random_prompt(64, 0)
    assert ask("waiting", FakeClient(), prompt).prompt == tuple(prompt.ids)
    with pytest.raises(EngineFailure, match="3 tokens were cached"):
        ask("waiting", FakeClient(cached=3), prompt)


@pytest.mark.parametrize(("cached", "fine"), [(896, True), (832, True), (768, False), (897, False)])
def test_the_limit_must_find_its_prefix_cached(cached: int, fine: bool) -> None:
    """Whole pages of it, that is."""
    prompt, client = random_prompt(1024, 0), FakeClient(cached=cached)
    if fine:
        ask("limit", client, prompt)
        assert client.prompts == [tuple(prompt.context(7)), tuple(prompt.ids)]
    else:
        with pytest.raises(EngineFailure, match=f"{cached} tokens of a prefix of 896"):
            ask("limit", client, prompt)


# --- the table ------------------------------------------------------------------------------------


def test_table_has_medians_worst_and_ratios() -> None:
    lines = lines_of(rows_of_a_run())
    text = "\n".join(lines)
    assert "2,048 tokens" in text
    assert sum("2,000 (3,000)" in line for line in lines) == 2  # waiting, under both paces
    assert "120 (500)" in text
    assert "360 (1,500)" in text
    assert any("waiting / streaming" in line and "16.7" in line for line in lines)
    assert any("re-sending / streaming" in line and "5.00" in line for line in lines)
    assert any("streaming / limit" in line and "1.20" in line for line in lines)
    assert sum("same tokens" in line and "yes" in line for line in lines) == 2


def test_the_goal_stands_at_the_slow_pace_only() -> None:
    goals = [line for line in lines_of(rows_of_a_run()) if "at most 1.3" in line]
    assert len(goals) == 1
    assert "met" in goals[0]
    missed = [line for line in lines_of(rows_of_a_run((0.14, 0.15))) if "at most 1.3" in line]
    assert len(missed) == 1
    assert "MISSED" in missed[0]


def test_repeats_that_are_not_complete_are_left_out() -> None:
    """The fast pace is measured in every second repeat, and a run may have been ended."""
    rows = [r for r in rows_of_a_run() if r["pace"] != 0.5 or r["repeat"] != 1][:-1]
    lines = lines_of(rows)
    assert sum("2,000 (3,000)" in line for line in lines) == 1
    assert sum("1,000 (1,000)" in line for line in lines) == 1
    assert [line.split("│")[2].strip() for line in lines if " repeats " in line] == ["3", "1"]
    assert any("chunks over 1.5" in line for line in lines_of(rows[:3]))


def test_other_tokens_are_shown() -> None:
    rows = rows_of_a_run()
    rows[-1] = {**rows[-1], "tokens": [9]}  # re-sending at the fast pace, third repeat
    same = [line for line in lines_of(rows) if "same tokens" in line]
    assert "yes" in same[0]
    assert "2 of 3" in same[1]
