"""A circuit breaker for one worker, without a clock: is it worth sending it a call?

    state      allows a call          event                                      next state
    closed     yes                    `failure_threshold` failures in `window_s`  open
    open       no                     `timeout_s` passed since it opened         half_open
    half_open  if no trial is on      `success_threshold` trials succeeded       closed
    half_open                         a trial failed                             open

Rules:
- A call counts for the state in which it started: one that was sent before the breaker opened
  says nothing about the worker's recovery, however it ends.
- Successes do not wipe out failures: a worker that fails every second call opens its breaker.
- What a failure is, the caller decides: an answer with a 4xx is a success of the worker.
- A call that ended without telling anything about the worker (its client left) is abandoned;
  that frees the trial for the next call.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]
_Event = Literal["tripped", "timed_out", "recovered"]

_NEXT_STATE: dict[tuple[BreakerState, _Event], BreakerState] = {
    ("closed", "tripped"): "open",
    ("open", "timed_out"): "half_open",
    ("half_open", "recovered"): "closed",
    ("half_open", "tripped"): "open",
}


@dataclass(frozen=True)
class BreakerSettings:
    """When a breaker opens and closes; the table in the module's text says how."""

    failure_threshold: int = 5
    success_threshold: int = 2
    timeout_s: float = 10.0
    window_s: float = 60.0

    def __post_init__(self) -> None:
        if self.failure_threshold < 1 or self.success_threshold < 1:
            raise ValueError("a circuit breaker's thresholds must be at least 1")
        if self.timeout_s <= 0 or self.window_s <= 0:
            raise ValueError("a circuit breaker's durations must be above 0 s")


@dataclass(frozen=True, eq=False)
class Call:
    """One call to the worker, from `started` until it is told how it ended."""

    period: int


class CircuitBreaker:
    """Each `now` is in seconds on one monotonic clock, never earlier than the one before."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._state: BreakerState = "closed"
        self._period = 0  # counts the changes of state
        self._opened_s = 0.0
        self._failures: deque[float] = deque(maxlen=settings.failure_threshold)
        self._successes = 0
        self._trial: Call | None = None

    def state(self, now: float) -> BreakerState:
        if self._state == "open" and now - self._opened_s >= self._settings.timeout_s:
            self._move("timed_out")
        return self._state

    def allows(self, now: float) -> bool:
        """Whether a call may start now."""
        state = self.state(now)
        return state == "closed" or (state == "half_open" and self._trial is None)

    def started(self, now: float) -> Call:
        """A call starts; in half_open it is the trial. Raises RuntimeError where none is allowed.

        One of `succeeded`, `failed` and `abandoned` must follow with what is returned.
        """
        if not self.allows(now):
            raise RuntimeError(f"a call started though the circuit breaker is {self._state}")
        call = Call(self._period)
        if self._state == "half_open":
            self._trial = call
        return call

    def succeeded(self, now: float, call: Call) -> None:
        if not self._ended(now, call) or self._state != "half_open":
            return
        self._successes += 1
        if self._successes >= self._settings.success_threshold:
            self._move("recovered")

    def failed(self, now: float, call: Call) -> None:
        if not self._ended(now, call):
            return
        self._failures.append(now)
        if self._state == "half_open" or self._too_many_failures(now):
            self._opened_s = now
            self._move("tripped")

    def abandoned(self, now: float, call: Call) -> None:
        self._ended(now, call)

    def _ended(self, now: float, call: Call) -> bool:
        """Whether the end of `call` counts; frees the trial if it was that."""
        self.state(now)
        if self._trial is call:
            self._trial = None
        return call.period == self._period

    def _too_many_failures(self, now: float) -> bool:
        """Whether the threshold's last failures are all inside (now - window_s, now]."""
        full = len(self._failures) == self._settings.failure_threshold
        return full and now - self._failures[0] < self._settings.window_s

    def _move(self, event: _Event) -> None:
        self._state = _NEXT_STATE[self._state, event]
        self._period += 1
        self._successes = 0
        self._failures.clear()
