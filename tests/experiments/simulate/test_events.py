from __future__ import annotations

import pytest

from experiments.simulate.events import Clock


def test_what_is_due_happens_in_the_order_of_time_and_then_of_asking() -> None:
    clock = Clock()
    seen: list[tuple[str, float]] = []
    for name, at_s in (("c", 2.0), ("a", 1.0), ("b", 1.0)):
        clock.at(at_s, lambda name=name: seen.append((name, clock.now)))
    clock.run()
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0)]


def test_an_action_may_ask_for_another_at_the_same_time() -> None:
    clock = Clock()
    seen: list[str] = []
    clock.at(1.0, lambda: clock.at(1.0, lambda: seen.append("second")))
    clock.at(1.0, lambda: seen.append("first"))
    clock.run()
    assert seen == ["first", "second"]


def test_the_past_is_refused() -> None:
    clock = Clock()
    clock.at(1.0, lambda: None)
    clock.run()
    with pytest.raises(ValueError, match="is before"):
        clock.at(0.5, lambda: None)
