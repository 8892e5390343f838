"""When will an open stream be sealed? Learned from its own gaps and from the streams before it.

The number of chunks still to come is the mean over the sealed streams that had at least as many as
this one has now; the gap is its own mean gap, drawn towards the workload's while it is young. A
stream is sealed when its last chunk comes, so nothing is to come after the last one predicted.
"""

from __future__ import annotations

from collections import deque

_REMEMBERED = 256  # sealed streams
_YOUNG = 2.0  # gaps of its own that count as much as the workload's mean
_UNKNOWN_GAP_S = 1.0
_UNKNOWN_CHUNKS = 4.0  # to come, while no stream has been sealed yet
_FORGETTING = 0.02


class SealPredictor:
    """What has been learned of a workload."""

    def __init__(self) -> None:
        self._gap_s = _UNKNOWN_GAP_S
        self._known = False
        self._lengths: deque[int] = deque()
        # By k: how many sealed streams had k chunks or more, and how many they had beyond k.
        self._reached: list[int] = []
        self._beyond: list[int] = []

    def gap(self, seconds: float) -> None:
        """A chunk came `seconds` after the one before it."""
        if not self._known:
            self._gap_s, self._known = seconds, True
        self._gap_s += _FORGETTING * (seconds - self._gap_s)

    def sealed(self, chunks: int) -> None:
        """A stream was sealed after so many chunks."""
        self._count(min(chunks, 1000), 1)
        self._lengths.append(min(chunks, 1000))
        if len(self._lengths) > _REMEMBERED:
            self._count(self._lengths.popleft(), -1)

    def due_s(self, chunks: int, last_s: float, own_gaps_s: float) -> float:
        """When the seal is predicted of a stream with `chunks` so far, the last at `last_s`;
        `own_gaps_s`: the sum of the gaps between them."""
        gaps = max(0, chunks - 1)
        gap_s = (own_gaps_s + _YOUNG * self._gap_s) / (gaps + _YOUNG)
        return last_s + self._to_come(chunks) * gap_s

    def _to_come(self, chunks: int) -> float:
        if not self._lengths:
            return _UNKNOWN_CHUNKS
        if chunks >= len(self._reached) or not self._reached[chunks]:
            return 0.0
        return self._beyond[chunks] / self._reached[chunks]

    def _count(self, length: int, sign: int) -> None:
        while len(self._reached) <= length:
            self._reached.append(0)
            self._beyond.append(0)
        for k in range(length + 1):
            self._reached[k] += sign
            self._beyond[k] += sign * (length - k)
