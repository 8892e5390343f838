"""How long ordering and planning take with many streams; no engine.

Each iteration 8 chunks come, 4 streams are sealed, the 4 sealed before are admitted, and 4 are
opened. What is learned of gaps and seals, the changed views and their places count as ordering.
Then an iteration is planned on a pool that is full:

    full    an ordinary request does not fit: streams from the end of the rank give their KV up
    passes  open streams are to be computed, and take their KV from those behind them

and what was decided is done, as in the engine: victims lose their KV, passes run and end.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from rich.table import Table

from experiments.rows import Row
from experiments.stats import percentile, verdict
from sglang_stream.policy import (
    POLICIES,
    Budget,
    Copying,
    CostModel,
    Decision,
    Order,
    Planner,
    PolicyName,
    PoolView,
    Prefill,
    SealPredictor,
    View,
)

Case = Literal["full", "passes"]

COUNTS = (10, 100, 500, 5000)
CASES: tuple[Case, ...] = ("full", "passes")
GOAL_COUNT = 500
GOALS_S = {"order": 30e-6, "plan": 200e-6}
CHUNKS, SEALS, OPENS = 8, 4, 4  # of an iteration
ITERATIONS = 300
_WARMING = 50  # iterations
_STEP_S = 0.05
_COST = CostModel(Prefill(4e-3, 2e-4, 2e-8), Copying(1e-3, 1e-5), Copying(1e-3, 1e-5))
_BUDGET = Budget(512, 0.05)
_HOST_TOKENS = 100_000
_CHUNK_TOKENS = 300
_ORDINARY = View("ordinary", 0, 3000, full=True, reserve=200)


@dataclass(slots=True)
class _Stream:
    """What the engine knows of a stream and its view needs."""

    id: str
    arrival: int
    tokens: int
    held: int
    latest: int
    since_s: float
    last_chunk_s: float
    due_s: float = 0.0
    chunks: int = 1
    gap_s: float = 0.0
    gaps_s: float = 0.0
    full: bool = False
    busy: bool = False
    parked: bool = False

    def view(self) -> View:
        tokens, held = self.tokens, self.held
        work_s = _COST.prefill.work_s(tokens - held, held) if tokens > held else 0.0
        # By place, in the order of `View`: half the time of names.
        return View(
            self.id,
            self.arrival,
            tokens,
            held,
            self.full,
            self.latest,
            0,
            0,
            self.busy,
            self.parked,
            self.since_s,
            work_s,
            self.due_s,
        )


class World:
    """Streams that come, change and go, and the order of them that is kept. `now` moves by
    `_STEP_S` with each iteration."""

    def __init__(self, policy: PolicyName, count: int, rng: random.Random) -> None:
        self._rng = rng
        self._predictor = SealPredictor()
        self._places = 0
        self.now = 0.0
        self.order = Order(POLICIES[policy])
        self.streams: dict[str, _Stream] = {}
        self.rank((), (), (), [self.opened() for _ in range(count)])

    def opened(self) -> _Stream:
        """A new stream; most have nothing to compute."""
        tokens = self._rng.randint(500, 4000)
        held = self._rng.choice((tokens, tokens, self._rng.randint(0, tokens)))
        place = self._next_place()
        stream = _Stream(f"st-{place:032x}", place, tokens, held, place, self.now, self.now)
        self.streams[stream.id] = stream
        return stream

    def grown(self, stream: _Stream) -> _Stream:
        """The stream with a chunk that has just come."""
        if stream.held >= stream.tokens:
            stream.since_s = self.now
        stream.tokens += _CHUNK_TOKENS
        stream.chunks += 1
        stream.gap_s = self.now - stream.last_chunk_s
        stream.gaps_s += stream.gap_s
        stream.last_chunk_s = self.now
        stream.latest = self._next_place()
        stream.parked = False
        return stream

    def sealed(self, stream: _Stream) -> _Stream:
        stream.full = True
        stream.since_s = self.now
        return stream

    def choose(self) -> tuple[list[_Stream], list[_Stream]]:
        """Who gets a chunk and who is sealed in the next iteration; no one does both."""
        still_open = [stream for stream in self.streams.values() if not stream.full]
        chosen = self._rng.sample(still_open, min(CHUNKS + SEALS, len(still_open)))
        return chosen[SEALS:], chosen[:SEALS]

    def rank(
        self,
        admitted: Sequence[_Stream],
        grown: Sequence[_Stream],
        sealed: Sequence[_Stream],
        opened: Sequence[_Stream],
    ) -> None:
        """What keeping the order takes of an iteration."""
        order, predictor = self.order, self._predictor
        for stream in admitted:
            order.drop(stream.id)
        for stream in grown:
            predictor.gap(stream.gap_s)
        for stream in sealed:
            predictor.sealed(stream.chunks)
            order.put(stream.view())
        for stream in (*grown, *opened):
            stream.due_s = predictor.due_s(stream.chunks, stream.last_chunk_s, stream.gaps_s)
            order.put(stream.view())

    def forget(self, streams: Sequence[_Stream]) -> None:
        for stream in streams:
            del self.streams[stream.id]

    def apply(self, decision: Decision) -> None:
        """Victims lose their KV; passes run, and end."""
        for victim in decision.victims:
            stream = self.streams[victim.id]
            stream.held, stream.parked = 0, True
            self.order.put(stream.view())
        for chosen in decision.passes:
            stream = self.streams[chosen.id]
            stream.busy = True
            self.order.put(stream.view())
            stream.busy = False
            stream.held += chosen.tokens
            self.order.put(stream.view())

    def _next_place(self) -> int:
        self._places += 1
        return self._places


def measure(
    counts: Sequence[int],
    seed: int,
    add: Callable[[Row], None],
    advance: Callable[[], None],
    iterations: int = ITERATIONS,
) -> None:
    """Gives one row for each number of streams, policy and case to `add`; `advance` hears of it."""
    for count in counts:
        for policy in POLICIES:
            for case in CASES:
                rng = random.Random(f"planning/{seed}/{count}/{case}")
                times = list(_iterations(World(policy, count, rng), policy, case, iterations))
                row = {"bench": "planning", "streams": count, "policy": policy, "case": case}
                for name, values in zip(
                    ("order_s", "plan_s", "apply_s", "victims", "passes"),
                    zip(*times, strict=True),
                    strict=True,
                ):
                    row[name] = [round(value, 8) for value in values]
                add(row)
                advance()


def _iterations(
    world: World, policy: PolicyName, case: Case, count: int
) -> Iterator[tuple[float, float, float, int, int]]:
    """Seconds to order, to plan and to apply, and how many victims and passes were planned, of
    each iteration after some that warm up."""
    planner = Planner(POLICIES[policy], "auto", _COST)
    full = [_ORDINARY] if case == "full" else []
    pool = PoolView(available=0, spare=0, host=_HOST_TOKENS)
    admitted: list[_Stream] = []
    for number in range(-_WARMING, count):
        world.now += _STEP_S
        chosen, last = world.choose()
        grown, sealed = [world.grown(s) for s in chosen], [world.sealed(s) for s in last]
        opened = [world.opened() for _ in sealed]
        began = time.perf_counter()
        world.rank(admitted, grown, sealed, opened)
        ordered = time.perf_counter()
        decision = planner.plan(full, world.order.views, pool, _BUDGET)
        planned = time.perf_counter()
        world.apply(decision)
        applied = time.perf_counter()
        world.forget(admitted)
        admitted = sealed
        if number >= 0:
            victims, passes = len(decision.victims), len(decision.passes)
            yield ordered - began, planned - ordered, applied - planned, victims, passes


def table(rows: Sequence[Row]) -> Table:
    """A block for each number of streams, a line for each policy."""
    shown = Table(title="Ordering and planning of an iteration, microseconds: median (P95)")
    for heading in ("streams", "policy", "ordered", "planned: full", "victims"):
        shown.add_column(heading, justify="left" if heading == "policy" else "right")
    for heading in ("planned: passes", "victims, passes", "applied"):
        shown.add_column(heading, justify="right")
    for count in sorted({row["streams"] for row in rows}):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            by_case: dict[str, Row] = {
                row["case"]: row
                for row in rows
                if (row["streams"], row["policy"]) == (count, policy)
            }
            if set(by_case) == set(CASES):
                full, passes = by_case["full"], by_case["passes"]
                shown.add_row(
                    f"{count:,}",
                    policy,
                    _times(full["order_s"] + passes["order_s"]),
                    _times(full["plan_s"]),
                    f"{_mean(full['victims']):.1f}",
                    _times(passes["plan_s"]),
                    f"{_mean(passes['victims']):.1f}, {_mean(passes['passes']):.1f}",
                    _times(full["apply_s"] + passes["apply_s"]),
                )
        shown.add_section()
    for what, goal_s in GOALS_S.items():
        medians = [median(row[f"{what}_s"]) for row in rows if row["streams"] == GOAL_COUNT]
        if medians:
            shown.add_row(
                f"{GOAL_COUNT}",
                f"{what}: at most {goal_s * 1e6:g}",
                verdict(max(medians) <= goal_s),
            )
    shown.caption = (
        f"Ordered: {CHUNKS} chunks, {SEALS} seals and {OPENS} openings. Victims and passes: mean "
        "of an iteration."
    )
    return shown


def _times(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1e6:.1f} ({percentile(seconds, 95) * 1e6:.1f})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
