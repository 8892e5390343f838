"""What forwards and swaps take on this machine, learned while it works (rank 0 only).

Without a profile the costs that the planner uses are fitted to these; with one they are only told,
so that a profile can be made from them (`sglang-stream calibrate`).
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

from sglang_stream.policy import Copying, CostModel
from sglang_stream.policy.fit import fit_copying, fit_prefill

logger = logging.getLogger(__name__)

_TOLD = 256
_FITTED = 16  # forwards of each size
_EVERY = 16  # forwards between two fits
_GUESSED_BYTES_PER_S = 2e9  # of a swap, until some were seen
_GUESSED_S = 0.001


@dataclass
class Forwards:
    """Prefill iterations: new tokens, cached tokens before them, seconds. Of several requests the
    cached tokens are those that one request of all the new tokens would attend to as often."""

    alone: deque[tuple[int, int, float]] = field(default_factory=lambda: deque(maxlen=_TOLD))
    _of_size: dict[int, deque[tuple[int, int, float]]] = field(default_factory=dict)

    def add(self, new: int, cached: int, seconds: float, *, alone: bool) -> None:
        """Keeps one more; `alone`: it had one request."""
        forward = new, cached, seconds
        self._of_size.setdefault(new.bit_length(), deque(maxlen=_FITTED)).append(forward)
        if alone:
            self.alone.append(forward)

    def of_all_sizes(self) -> list[tuple[int, int, float]]:
        """The last ones of each size, in powers of two: a base shows only beside other sizes, and
        forwards may be of one size for long."""
        return [forward for kept in self._of_size.values() for forward in kept]


class CostLearner:
    """Measures, and fits a `CostModel` now and then. `kv_bytes_per_token`: of this rank."""

    def __init__(self, kv_bytes_per_token: float) -> None:
        self.kv_bytes_per_token = kv_bytes_per_token
        guess = Copying(_GUESSED_S, kv_bytes_per_token / _GUESSED_BYTES_PER_S)
        self._swap_out = self._swap_in = guess
        self._seen = 0
        self._said = False
        self.forwards = Forwards()
        self.swap_outs: deque[tuple[int, float]] = deque(maxlen=_TOLD)
        self.swap_ins: deque[tuple[int, float]] = deque(maxlen=_TOLD)

    def forward(self, new: int, cached: int, seconds: float, *, alone: bool) -> None:
        """A prefill iteration is over; `alone`: it had one request."""
        self._seen += 1
        self.forwards.add(new, cached, seconds, alone=alone)

    def fitted(self) -> CostModel | None:
        """New costs, if enough was seen since the last ones."""
        if self._seen < _EVERY:
            return None
        self._seen = 0
        try:
            prefill, error = fit_prefill(self.forwards.of_all_sizes())
        except ValueError:
            return None  # all of one size, say: later ones will tell more
        if not self._said:
            self._said = True
            logger.info(
                "sglang-stream: no profile was given; the cost of prefill is learned from the "
                "forwards (%.1f ms + %.4f ms a token at first, typically wrong by %.0f %%). "
                "`sglang-stream calibrate` makes a profile.",
                prefill.base_s * 1e3,
                prefill.per_token_s * 1e3,
                error * 100,
            )
        self._swap_out = _copying(self.swap_outs, self._swap_out)
        self._swap_in = _copying(self.swap_ins, self._swap_in)
        return CostModel(prefill, self._swap_out, self._swap_in)


def _copying(seen: deque[tuple[int, float]], before: Copying) -> Copying:
    try:
        return fit_copying(seen)[0]
    except ValueError:
        return before
