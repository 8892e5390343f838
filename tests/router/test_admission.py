"""Slots and the queue for them, on a loop whose time the tests move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission import Admission
from sglang_stream.errors import LimitReached

TIMEOUT_S = 10.0


class MovedLoop(asyncio.SelectorEventLoop):
    """Its time stands still until `moved_s` is changed. The tests never leave it idle."""

    moved_s = 0.0

    def time(self) -> float:
        return self.moved_s


class Calls:
    """Calls by number; each holds its slot until it is told to end."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.tasks: list[asyncio.Task[None]] = []
        self.ends: list[asyncio.Event] = []
        self.entered: list[int] = []
        self.inside = 0

    def arrive(self) -> int:
        number = len(self.tasks)
        self.ends.append(asyncio.Event())
        self.tasks.append(asyncio.create_task(self._call(number)))
        return number

    async def _call(self, number: int) -> None:
        async with self.admission.slot():
            self.entered.append(number)
            self.inside += 1
            try:
                await self.ends[number].wait()
            finally:
                self.inside -= 1

    def refusal(self, number: int) -> LimitReached:
        error = self.tasks[number].exception()
        assert isinstance(error, LimitReached)
        assert (error.status, error.retry_after) == (429, 1)
        return error


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def move(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, MovedLoop)
    loop.moved_s += seconds


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop = MovedLoop()
    try:
        loop.run_until_complete(test())
    finally:
        loop.close()


def test_a_slot_is_free_again_after_an_error() -> None:
    async def main() -> None:
        admission = Admission(1, 0, TIMEOUT_S)

        async def fail() -> None:
            async with admission.slot():
                assert admission.running == 1
                raise KeyError

        for _ in range(2):
            with pytest.raises(KeyError):
                await fail()
        assert admission.running == 0

    run(main)


def test_a_full_queue_refuses_at_once() -> None:
    async def main() -> None:
        calls = Calls(Admission(2, 1, TIMEOUT_S))
        for _ in range(4):
            calls.arrive()
        await settle()
        assert (calls.admission.running, calls.admission.waiting) == (2, 1)
        assert "2 calls run and 1 wait" in calls.refusal(3).message
        for task in calls.tasks:
            task.cancel()
        await settle()

    run(main)


def test_without_a_queue_the_slots_are_all_there_is() -> None:
    async def main() -> None:
        calls = Calls(Admission(1, 0, TIMEOUT_S))
        calls.arrive()
        calls.arrive()
        await settle()
        calls.refusal(1)
        calls.ends[0].set()
        await settle()
        calls.arrive()
        await settle()
        assert calls.entered == [0, 2]
        calls.ends[2].set()
        await settle()

    run(main)


def test_a_wait_ends_at_the_time_out() -> None:
    async def main() -> None:
        calls = Calls(Admission(1, 5, TIMEOUT_S))
        for _ in range(2):
            calls.arrive()
        await settle()
        move(TIMEOUT_S - 1)
        calls.arrive()
        await settle()
        assert calls.admission.waiting == 2
        move(1)
        await settle()
        assert "in 10 s of waiting" in calls.refusal(1).message
        assert calls.admission.waiting == 1
        calls.ends[0].set()
        await settle()
        assert calls.entered == [0, 2]
        move(10 * TIMEOUT_S)  # a call that got its slot is not ended
        await settle()
        assert calls.inside == calls.admission.running == 1
        calls.ends[2].set()
        await settle()

    run(main)


def test_a_slot_handed_to_a_call_that_is_cancelled_goes_on() -> None:
    async def main() -> None:
        calls = Calls(Admission(1, 5, TIMEOUT_S))
        for _ in range(3):
            calls.arrive()
        await settle()
        calls.tasks[0].cancel()
        await asyncio.sleep(0)
        assert (calls.admission.waiting, calls.entered) == (1, [0])
        calls.tasks[1].cancel()  # has the slot, and has not run since
        await settle()
        assert calls.entered == [0, 2]
        assert (calls.admission.running, calls.admission.waiting) == (1, 0)
        calls.ends[2].set()
        await settle()
        assert calls.admission.running == 0

    run(main)


def test_a_call_cancelled_just_before_its_turn_is_passed_over() -> None:
    async def main() -> None:
        calls = Calls(Admission(1, 5, TIMEOUT_S))
        for _ in range(3):
            calls.arrive()
        await settle()
        calls.ends[0].set()
        calls.tasks[1].cancel()  # has not run when the slot becomes free
        await settle()
        assert calls.entered == [0, 2]
        assert (calls.admission.running, calls.admission.waiting) == (1, 0)
        assert calls.tasks[0].exception() is None
        calls.ends[2].set()
        await settle()
        assert calls.admission.running == 0

    run(main)


def test_without_a_limit_nobody_waits() -> None:
    async def main() -> None:
        calls = Calls(Admission(None, 0, TIMEOUT_S))
        for _ in range(100):
            calls.arrive()
        await settle()
        assert (calls.admission.running, calls.admission.waiting) == (100, 0)
        for end in calls.ends:
            end.set()
        await settle()
        assert calls.admission.running == 0

    run(main)


@pytest.mark.parametrize("limits", [(0, 1, 1.0), (1, -1, 1.0), (1, 1, 0.0)])
def test_limits_that_admit_nothing_are_refused(limits: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Admission(*limits)


OPERATIONS = st.lists(
    st.one_of(
        st.just(("arrive", 0)),
        st.tuples(st.sampled_from(["end", "cancel"]), st.integers(0, 30)),
        st.tuples(st.just("move"), st.integers(1, 12)),
    ),
    max_size=40,
)


@given(OPERATIONS, st.integers(1, 3), st.integers(0, 4))
def test_first_come_first_served(
    operations: list[tuple[str, int]], slots: int, places: int
) -> None:
    """Against a model, when each operation has its full effect before the next."""

    async def main() -> None:
        calls = Calls(Admission(slots, places, TIMEOUT_S))
        now = 0.0
        running: list[int] = []
        queue: list[tuple[int, float]] = []  # a call, and when it came
        for name, value in operations:
            if name == "arrive":
                number = calls.arrive()
                if len(running) < slots:
                    running.append(number)
                elif len(queue) < places:
                    queue.append((number, now))
            elif name == "move":
                now += value
                move(value)
                queue = [(number, came) for number, came in queue if now - came < TIMEOUT_S]
            elif calls.tasks:
                value %= len(calls.tasks)
                if name == "cancel":
                    calls.tasks[value].cancel()
                    queue = [waiting for waiting in queue if waiting[0] != value]
                calls.ends[value].set()
                if value in running:
                    running.remove(value)
            while queue and len(running) < slots:
                number, _ = queue.pop(0)
                running.append(number)
                if calls.ends[number].is_set():
                    running.remove(number)
            await settle()
            assert (calls.admission.running, calls.admission.waiting) == (len(running), len(queue))
            assert calls.entered == sorted(calls.entered)
        await leave_nothing(calls)

    run(main)


@given(OPERATIONS, st.lists(st.integers(0, 2), min_size=40, max_size=40), st.integers(1, 3))
def test_nothing_leaks_whenever_calls_are_cancelled(
    operations: list[tuple[str, int]], steps: list[int], slots: int
) -> None:
    """Operations fall between any two steps of the loop."""

    async def main() -> None:
        places = 2
        calls = Calls(Admission(slots, places, TIMEOUT_S))
        for (name, value), between in zip(operations, steps, strict=False):
            if name == "arrive":
                calls.arrive()
            elif name == "move":
                move(value)
            elif alive := [n for n, task in enumerate(calls.tasks) if not task.done()]:
                number = alive[value % len(alive)]
                if name == "cancel":
                    calls.tasks[number].cancel()
                else:
                    calls.ends[number].set()
            for _ in range(between):
                await asyncio.sleep(0)
                assert calls.inside <= calls.admission.running <= slots
                assert calls.admission.waiting <= places
        await leave_nothing(calls)

    run(main)


async def leave_nothing(calls: Calls) -> None:
    """Ends every call; then all slots must be free and usable."""
    for end in calls.ends:
        end.set()
    for _ in calls.tasks:
        await settle()
    assert all(task.done() for task in calls.tasks)
    ended = await asyncio.gather(*calls.tasks, return_exceptions=True)
    assert {type(end) for end in ended} <= {type(None), asyncio.CancelledError, LimitReached}
    assert (calls.inside, calls.admission.running, calls.admission.waiting) == (0, 0, 0)
    async with calls.admission.slot():
        assert calls.admission.running == 1
