"""Which prefix of an update-mode prompt will still be there when its stream is sealed?

    prompt   |---- more likely than not to stay ----|---- likely to be replaced ----|

Learned from the updates of a worker's streams: the part of the prompt that each of them kept. What
outlives `n` more like them with some chance outlives each with the n-th root of that.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

_REMEMBERED = 256  # updates
_CHANCE = 0.5


class Survival:
    """What has been learned of a workload."""

    def __init__(self) -> None:
        self._kept: deque[float] = deque()
        self._sorted: list[float] = []

    def updated(self, lcp: int, tokens: int) -> None:
        """An update kept the first `lcp` of a prompt's `tokens`."""
        kept = lcp / tokens if tokens else 1.0
        self._kept.append(kept)
        insort(self._sorted, kept)
        if len(self._kept) > _REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._kept.popleft())]

    def part(self, to_come: float) -> float:
        """The part of a prompt, from its beginning, that is more likely than not to outlive
        `to_come` updates."""
        if not self._sorted or to_come <= 0:
            return 1.0
        replaced = 1 - _CHANCE ** (1 / to_come)  # share of updates that may reach into the part
        return self._sorted[int(replaced * len(self._sorted))]
