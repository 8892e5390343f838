"""Simulated time: what is due when, in a heap."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

Action = Callable[[], None]


class Clock:
    """`now`: seconds. Of actions due at the same time the one that was asked for first is first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._asked = 0
        self._due: list[tuple[float, int, Action]] = []

    def at(self, time_s: float, action: Action) -> None:
        """Runs `action` at that time. Raises ValueError if it is past."""
        if time_s < self.now:
            raise ValueError(f"{time_s} is before {self.now}")
        self._asked += 1
        heappush(self._due, (time_s, self._asked, action))

    def run(self) -> None:
        """Until nothing is due any more."""
        while self._due:
            self.now, _, action = heappop(self._due)
            action()
