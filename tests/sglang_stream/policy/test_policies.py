from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_stream.policy import POLICIES, Order, PolicyName, View
from sglang_stream.policy.policies import AGEING

# What each stands for: its arrival, tokens, held; the last chunks came in another order.
REQUESTS = [
    View("open-1", 1, 900, 100, latest=9, since_s=1.0, work_s=0.8, due_s=5.0),
    View("full-2", 2, 500, 0, full=True, latest=8, since_s=8.0, work_s=0.5),
    View("idle-3", 3, 300, 300, latest=3, due_s=2.0),
    View("open-4", 4, 800, 700, latest=7, since_s=7.0, work_s=0.1, due_s=6.0),
    View("full-5", 5, 600, 550, full=True, latest=5, since_s=5.0, work_s=0.05),
    View("open-6", 6, 400, 0, latest=6, since_s=6.0, work_s=0.4, due_s=3.0),
]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("default", ["open-1", "full-2", "idle-3", "open-4", "full-5", "open-6"]),
        ("fcfs", ["full-2", "full-5", "open-1", "open-4", "open-6", "idle-3"]),
        ("lcas", ["full-5", "full-2", "open-6", "open-4", "open-1", "idle-3"]),
        ("mcps", ["open-4", "full-5", "open-1", "full-2", "open-6", "idle-3"]),
        ("srpf", ["full-5", "full-2", "open-4", "open-6", "open-1", "idle-3"]),
        ("slack", ["full-5", "full-2", "open-1", "open-6", "open-4", "idle-3"]),
    ],
)
def test_order_of_each_policy(policy: PolicyName, expected: list[str]) -> None:
    order = Order(POLICIES[policy])
    for view in REQUESTS:
        order.put(view)
    assert [view.id for view in order.views] == expected


def served(seconds: float, ageing: bool) -> bool:
    """Whether a long request is served within `seconds` when a short one comes at each step, which
    takes as long as the short one's prefill."""
    order = Order(POLICIES["srpf"])
    order.put(View("long", 0, 4000, since_s=0.0, work_s=2.0))
    step_s = 0.1
    for i in range(1, round(seconds / step_s)):
        since_s = i * step_s if ageing else 0.0
        order.put(View(f"short-{i}", i, 200, since_s=since_s, work_s=step_s))
        first = order.views[0].id
        if first == "long":
            return True
        order.drop(first)
    return False


def test_ageing_keeps_a_long_prefill_from_starving_under_a_flood_of_short_ones() -> None:
    bound_s = 2.0 / AGEING
    assert served(bound_s, ageing=True)
    assert not served(bound_s, ageing=False)


@given(st.floats(0, 100), st.floats(0.001, 5), st.floats(0.001, 100), st.floats(0, 5))
def test_the_bound_of_ageing(since: float, work: float, later: float, other_work: float) -> None:
    """No work that came more than `work / AGEING` later is served before."""
    waits = View("waits", 0, 10, since_s=since, work_s=work)
    newcomer = View("new", 1, 10, since_s=since + work / AGEING + later, work_s=other_work)
    srpf = POLICIES["srpf"]
    assert srpf(waits) < srpf(newcomer)


def test_keys_tell_all_requests_apart() -> None:
    twins = [View(str(i), i, 100) for i in range(5)]
    for policy in POLICIES.values():
        assert len({policy(view) for view in twins}) == len(twins)
