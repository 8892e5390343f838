"""The policies: each is one function from a request to its sort key, least first.

A key holds no current time, so it changes only when the request does, and an order can be kept
instead of made anew (`order.Order`). `fcfs`, `lcas`, `mcps`: Stream2LLM, section 4; `default` is
the order of an engine that knows nothing of streams. `srpf` and `slack` are our own.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_stream.policy.types import PolicyName, View

Key = tuple[float, ...]
Policy = Callable[[View], Key]

AGEING = 0.05
"""Seconds of predicted prefill that a second of waiting is worth, in `srpf`.

Keys age alike, so their order does not change with time. The bound: a request with `work_s` left
that waits since `since_s` is overtaken only by work that came before `since_s + work_s / AGEING`.
"""

SHARE = 20
"""How many times as long as alone an open stream's prefill takes beside all the others, in `slack`.

With 1 its work hardly counts against the seconds to its seal, and streams with much to compute are
begun late. The factor comes from a simulation; no other one was measured on an engine.
"""


def _group(view: View) -> int:
    """Full requests, then open streams that have something to compute, then the others."""
    if view.full:
        return 0
    return 1 if view.missing else 2


def default(view: View) -> Key:
    """By arrival, full or not: the place of a stream's opening counts."""
    return (view.arrival,)


def fcfs(view: View) -> Key:
    """Full requests first, then open streams that have something to compute; each by arrival."""
    return (_group(view), view.arrival)


def lcas(view: View) -> Key:
    """As `fcfs`, each group by the arrival of the last chunk."""
    return (_group(view), view.latest, view.arrival)


def mcps(view: View) -> Key:
    """Full or not, the most computed tokens first, then by arrival."""
    return (_group(view) == 2, -view.ready, view.arrival)


def srpf(view: View) -> Key:
    """Full requests first, then open streams that have something to compute; in each group the
    shortest remaining prefill first, with ageing so that nobody starves."""
    return (_group(view), view.work_s + AGEING * view.since_s, view.arrival)


def slack(view: View) -> Key:
    """Full requests as `srpf`; open streams by the latest time at which their prefill must begin
    to be done at the predicted seal, beside others (`SHARE`)."""
    if view.full:
        return srpf(view)
    return (_group(view), view.due_s - SHARE * view.work_s, view.arrival)


POLICIES: dict[PolicyName, Policy] = {
    "default": default,
    "fcfs": fcfs,
    "lcas": lcas,
    "mcps": mcps,
    "srpf": srpf,
    "slack": slack,
}
