from __future__ import annotations

import io
import random
from collections.abc import Sequence

from rich.console import Console

from experiments.bench.planning import CASES, COUNTS, World, measure, table
from experiments.rows import Row
from sglang_stream.policy import POLICIES, Decision, Pass, Victim


def text_of(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    Console(file=file, width=140).print(table(rows))
    return file.getvalue()


def row(case: str, order_s: float, plan_s: float, count: int = 500) -> Row:
    times = {"order_s": [order_s] * 3, "plan_s": [plan_s] * 3, "apply_s": [1e-6] * 3}
    decided = {"victims": [2, 2, 2], "passes": [1, 1, 1]}
    named = {"bench": "planning", "streams": count, "policy": "fcfs", "case": case}
    return named | times | decided


def test_every_policy_is_measured_with_victims_in_both_cases() -> None:
    rows: list[Row] = []
    measure((10, 100), 0, rows.append, lambda: None, iterations=20)
    assert len(rows) == 2 * len(POLICIES) * len(CASES)
    for measured in rows:
        assert len(measured["order_s"]) == len(measured["plan_s"]) == 20
        assert sum(measured["victims"]) >= 20
        assert (sum(measured["passes"]) > 0) == (measured["case"] == "passes")


def test_the_number_of_streams_stays() -> None:
    for count in COUNTS[:2]:
        world = World("srpf", count, random.Random(0))
        grown, sealed = world.choose()
        assert len(sealed) == 4
        assert not set(map(id, grown)) & set(map(id, sealed))
        opened = [world.opened() for _ in sealed]
        world.rank((), [world.grown(s) for s in grown], [world.sealed(s) for s in sealed], opened)
        assert len(world.order.views) == count + 4
        assert sum(view.full for view in world.order.views) == 4
        world.rank(sealed, (), (), ())
        world.forget(sealed)
        assert len(world.order.views) == len(world.streams) == count


def test_what_was_decided_is_done() -> None:
    world = World("fcfs", 2, random.Random(0))
    victim, chosen = (view.id for view in world.order.views)
    world.streams[chosen].tokens += 300
    held = world.streams[chosen].held
    world.apply(Decision((Victim(victim, False),), (), (Pass(chosen, 100),)))
    views = {view.id: view for view in world.order.views}
    assert views[victim].held == 0
    assert views[victim].parked
    assert views[chosen].held == held + 100
    assert not views[chosen].busy


def test_goals_are_of_500_streams() -> None:
    met = text_of([row(case, 29e-6, 190e-6) for case in CASES])
    assert met.count("met") == 2
    assert "29.0 (29.0)" in met
    missed = text_of([row(case, 31e-6, 210e-6) for case in CASES])
    assert missed.count("MISSED") == 2
    assert "met" not in text_of([row(case, 9e-6, 9e-6, count=100) for case in CASES])
