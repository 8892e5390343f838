"""When will an open stream be sealed? Learned from its own gaps and from the streams before it.

The number of chunks still to come is the mean over the sealed streams that had at least as many as
this one has now; the gap is its own mean gap, drawn towards the workload's while it is young. A
stream is sealed when its last chunk comes, so nothing is to come after the last one predicted.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate

_REMEMBERED = 256  # sealed streams
_YOUNG = 2.0  # gaps of its own that count as much as the workload's mean
_UNKNOWN_GAP_S = 1.0
_UNKNOWN_CHUNKS = 4.0  # to come, while no stream has been sealed yet
_LONGEST = 1000  # chunks; streams of more count as having so many
_FORGETTING = 0.02


class SealPredictor:
    """What has been learned of a workload."""

    def __init__(self) -> None:
        self._gap_s = _UNKNOWN_GAP_S
        self._known = False
        self._lengths: deque[int] = deque()
        self._of_length: list[int] = []  # how many sealed streams had k chunks
        self._to_come: list[float] = []  # by k; empty if it has to be made anew

    def gap(self, seconds: float) -> None:
        """A chunk came `seconds` after the one before it."""
        if not self._known:
            self._gap_s, self._known = seconds, True
        self._gap_s += _FORGETTING * (seconds - self._gap_s)

    def sealed(self, chunks: int) -> None:
        """A stream was sealed after so many chunks."""
        length = min(chunks, _LONGEST)
        while len(self._of_length) <= length:
            self._of_length.append(0)
        self._of_length[length] += 1
        self._lengths.append(length)
        if len(self._lengths) > _REMEMBERED:
            self._of_length[self._lengths.popleft()] -= 1
        self._to_come = []

    def due_s(self, chunks: int, last_s: float, own_gaps_s: float) -> float:
        """When the seal is predicted of a stream with `chunks` so far, the last at `last_s`;
        `own_gaps_s`: the sum of the gaps between them."""
        gaps = chunks - 1 if chunks > 1 else 0
        gap_s = (own_gaps_s + _YOUNG * self._gap_s) / (gaps + _YOUNG)
        return last_s + self.to_come(chunks) * gap_s

    def to_come(self, chunks: int) -> float:
        """How many chunks are predicted to come for a stream with `chunks` so far."""
        to_come = self._to_come or self._counted()
        return to_come[chunks] if chunks < len(to_come) else to_come[-1]

    def _counted(self) -> list[float]:
        """The mean number of chunks to come, by the number so far; the last one for all beyond."""
        if self._lengths:
            # From the longest down: how many had k chunks or more, how many they had beyond k.
            reached = list(accumulate(reversed(self._of_length)))
            beyond = accumulate(reached[:-1], initial=0)
            means = [b / r if r else 0.0 for b, r in zip(beyond, reached, strict=True)]
            self._to_come = means[::-1]
        else:
            self._to_come = [_UNKNOWN_CHUNKS]
        return self._to_come
