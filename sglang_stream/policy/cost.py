"""What a machine's prefill and swaps take, as curves that were measured or derived.

    prefill  base + per_token * new + per_pair * new * (cached + new / 2)
    swap     base + per_token * tokens, each way
    decode   base + per_request * requests + per_context_token * their tokens, one step
    rest     so much longer takes what comes after a rest

`per_pair` is attention: each of the new tokens attends to all tokens before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

_UNLIMITED = 1 << 30  # tokens


@dataclass(frozen=True)
class Prefill:
    """Seconds to compute `new` prompt tokens on top of `cached` ones, in one forward."""

    base_s: float
    per_token_s: float
    per_pair_s: float

    def seconds(self, new: int, cached: int = 0) -> float:
        return self.base_s + self.work_s(new, cached)

    def work_s(self, new: int, cached: int = 0) -> float:
        """Without the cost of the forward itself, which several slices share."""
        return self.per_token_s * new + self.per_pair_s * new * (cached + new / 2)

    def tokens_within(self, seconds: float, cached: int = 0) -> int:
        """The most new tokens whose `work_s` is within `seconds`."""
        if seconds <= 0:
            return 0
        linear = self.per_token_s + self.per_pair_s * cached
        root = math.sqrt(linear * linear + 2 * self.per_pair_s * seconds)
        # The root's textbook form loses all digits where attention costs next to nothing.
        return int(min(2 * seconds / (linear + root), _UNLIMITED)) if root > 0 else _UNLIMITED


@dataclass(frozen=True)
class Copying:
    """Seconds to copy the KV of `tokens` between the device and host memory, one way."""

    base_s: float
    per_token_s: float

    def seconds(self, tokens: int) -> float:
        return self.base_s + self.per_token_s * tokens


@dataclass(frozen=True)
class Decode:
    """Seconds of one decode step of `requests` that have `context` tokens together."""

    base_s: float
    per_request_s: float
    per_context_token_s: float

    def seconds(self, requests: int, context: int) -> float:
        return self.base_s + self.per_request_s * requests + self.per_context_token_s * context


@dataclass(frozen=True)
class Rest:
    """Seconds that something takes more after a rest.

    `points`: seconds of rest, ascending from 0, each with what comes on top; in between it is
    linear, and a longer rest counts as the longest.
    """

    points: tuple[tuple[float, float], ...]

    def seconds(self, rested_s: float) -> float:
        for (begin, before), (end, after) in pairwise(self.points):
            if rested_s < end:
                return before + (after - before) * (rested_s - begin) / (end - begin)
        return self.points[-1][1]


@dataclass(frozen=True)
class CostModel:
    """A machine with a model on it."""

    prefill: Prefill
    swap_out: Copying
    swap_in: Copying

    def swap_is_cheaper(self, held: int) -> bool:
        """Whether a stream's `held` tokens are copied out and back sooner than computed again.

        The victim's own size counts (the paper takes the newcomer's).
        """
        copied = self.swap_out.seconds(held) + self.swap_in.seconds(held)
        return copied < self.prefill.seconds(held)
