"""When a failed call is tried again, without a clock: how long after, and whether at all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_SLICES = 10


@dataclass(frozen=True)
class RetryPolicy:
    """Delays that grow by `multiplier` from the initial to the maximal one, spread by jitter.

    `max_retries`: of one call, after its first attempt. `jitter_factor`: a delay is drawn evenly
    from (1 - factor) to (1 + factor) times its value, so that calls that failed together do not
    come back together, also where the maximum is reached.
    """

    max_retries: int = 3
    initial_backoff_ms: float = 50.0
    max_backoff_ms: float = 5000.0
    multiplier: float = 1.5
    jitter_factor: float = 0.2

    def __post_init__(self) -> None:
        if self.max_retries < 0:
            raise ValueError("max_retries must be at least 0")
        if not 0 <= self.initial_backoff_ms <= self.max_backoff_ms:
            raise ValueError("the initial backoff must be from 0 to the maximal one")
        if self.multiplier < 1 or not 0 <= self.jitter_factor <= 1:
            raise ValueError("the multiplier must be at least 1, the jitter factor from 0 to 1")

    def delay_s(self, attempt: int, random: Callable[[], float]) -> float:
        """Seconds to wait after attempt number `attempt` (from 1) failed.

        `random` draws evenly from [0, 1), as `random.random` does.
        """
        try:
            grown_ms = self.initial_backoff_ms * self.multiplier ** (attempt - 1)
        except OverflowError:
            grown_ms = self.max_backoff_ms
        spread = 1 + self.jitter_factor * (2 * random() - 1)
        return min(grown_ms, self.max_backoff_ms) * spread / 1000


@dataclass
class _Slice:
    """The calls and retries of one part of the window."""

    number: int
    calls: int = 0
    retries: int = 0


class RetryBudget:
    """Bounds the retries of all calls together, so that they do not bury a worker in trouble.

    Retries in the window are at most `minimum` plus `ratio` times the calls in it. The window
    moves on in tenths of `window_s`, so that it costs the same at any rate of calls: what it holds
    is between nine tenths of `window_s` and all of it old. Each `now` is in seconds on one
    monotonic clock, never earlier than the one before.
    """

    def __init__(self, ratio: float = 0.2, minimum: int = 10, window_s: float = 10.0) -> None:
        if ratio < 0 or minimum < 0 or window_s <= 0:
            raise ValueError("a retry budget needs ratio >= 0, minimum >= 0 and window_s > 0")
        self._ratio = ratio
        self._minimum = minimum
        self._slice_s = window_s / _SLICES
        self._slices: deque[_Slice] = deque()

    def request(self, now: float) -> None:
        """Counts a call, at its first attempt."""
        self._current(now).calls += 1

    def may_retry(self, now: float) -> bool:
        """Takes one retry if the budget has one left."""
        current = self._current(now)
        calls = sum(part.calls for part in self._slices)
        retries = sum(part.retries for part in self._slices)
        if retries + 1 > self._minimum + self._ratio * calls:
            return False
        current.retries += 1
        return True

    def _current(self, now: float) -> _Slice:
        """The slice of `now`; those that left the window are dropped."""
        number = int(now // self._slice_s)
        while self._slices and self._slices[0].number <= number - _SLICES:
            self._slices.popleft()
        if not self._slices or self._slices[-1].number != number:
            self._slices.append(_Slice(number))
        return self._slices[-1]
