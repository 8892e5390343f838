"""How much of a worker's time open streams get while complete requests come and decode.

    iteration of T seconds with passes   a request that comes meanwhile waits T / 2 in the mean,
                                         and one that waits behind it as long again
    of them base_s seconds               are the forward's own, whatever it computes

With a request every `gap_s` seconds, a second of passes costs T / gap_s seconds of waiting and
base_s / T seconds of work: least together at T = sqrt(base_s gap_s).
"""

from __future__ import annotations

import math
from collections import deque

_LEAST_S = 0.05
_MOST = 10  # times the fixed cost; beyond that little of it is left to save
_DECODING = 3  # times as long as an iteration of passes alone
_REMEMBERED = 32  # complete requests: some bursts of them


class Pace:
    """Learns how often complete requests come."""

    def __init__(self) -> None:
        self._arrivals_s: deque[float] = deque(maxlen=_REMEMBERED)

    def arrived(self, now_s: float) -> None:
        """A complete request came: an ordinary one or a seal."""
        self._arrivals_s.append(now_s)

    def iteration_s(self, base_s: float, now_s: float) -> float:
        """How long an iteration with passes may take; `base_s`: a forward's fixed cost."""
        best_s = math.sqrt(base_s * self._gap_s(now_s)) if base_s else 0.0
        return max(_LEAST_S, min(best_s, _MOST * base_s))

    def _gap_s(self, now_s: float) -> float:
        """The mean gap; that since the last request counts as far as it goes (a censored one), or
        streams that are sealed together would leave a gap of nothing until the next ones are."""
        if len(self._arrivals_s) < 2:
            return math.inf
        return (now_s - self._arrivals_s[0]) / (len(self._arrivals_s) - 1)


class Turns:
    """Whose turn it is where open streams are computed while requests decode: after an iteration
    of passes alone those decode three times as long, and one step at least."""

    def __init__(self) -> None:
        self._passed = False
        self._owed_s = 0.0
        self._began_s = 0.0
        self._counts = False

    @property
    def decodes(self) -> bool:
        """Whether requests that decode come before passes now."""
        return self._passed or self._owed_s > 0

    def began(self, now_s: float, decodes: bool, passes_s: float | None = None) -> None:
        """An iteration begins: a decode step, or one of passes alone that will take `passes_s`
        (0 where that is not known), or another one."""
        if self._counts:
            self._owed_s -= now_s - self._began_s
        self._began_s = now_s
        # With the overlap schedule passes still run when the step after them has begun: the time
        # until the next one is not that of a step.
        self._counts = decodes and not self._passed
        self._passed = passes_s is not None
        if passes_s is not None:
            self._owed_s = _DECODING * passes_s
