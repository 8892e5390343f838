"""How much of a worker's time open streams get while complete requests come and decode.

    iteration of T seconds with passes   a request that comes meanwhile waits T / 2 in the mean
    of them base_s seconds               are the forward's own, whatever it computes

With a request every `gap_s` seconds, a second of passes costs T / (2 gap_s) seconds of waiting and
base_s / T seconds of work: least together at T = sqrt(2 base_s gap_s).
"""

from __future__ import annotations

import math

_LEAST_S = 0.05
_MOST = 10  # times the fixed cost; beyond that little of it is left to save
_DECODING = 3  # times as long as an iteration of passes alone
_FORGETTING = 0.1


class Pace:
    """Learns how often complete requests come."""

    def __init__(self) -> None:
        self._gap_s = math.inf
        self._last_s: float | None = None

    def arrived(self, now_s: float) -> None:
        """A complete request came: an ordinary one or a seal."""
        if self._last_s is not None:
            gap_s = now_s - self._last_s
            if math.isinf(self._gap_s):
                self._gap_s = gap_s
            self._gap_s += _FORGETTING * (gap_s - self._gap_s)
        self._last_s = now_s

    def iteration_s(self, base_s: float) -> float:
        """How long an iteration with passes may take; `base_s`: a forward's fixed cost."""
        if base_s == 0:
            return _LEAST_S
        best_s = math.sqrt(2 * base_s * self._gap_s)
        return max(_LEAST_S, min(best_s, _MOST * base_s))


def decoding_s(passes_s: float) -> float:
    """How long requests decode after an iteration of passes alone, before the next one."""
    return _DECODING * passes_s
