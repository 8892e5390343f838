"""What the planner sees and what it decides, as frozen values.

All sizes are KV tokens. A *full* request has its whole prompt (a sealed stream or an ordinary
request); an open stream is *partial*. `held` KV is locked by a stream; `available` KV is free or
can be evicted at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FullView:
    """A full request that waits. `extend`: tokens to compute; `reserve`: tokens it may decode."""

    extend: int
    reserve: int

    @property
    def need(self) -> int:
        return self.extend + self.reserve


@dataclass(frozen=True)
class StreamView:
    """A stream that holds KV or wants some.

    `arrival` orders streams by their opening. `cacheable`: prompt tokens that fill whole pages;
    `held`: those whose KV it holds. `sealed`: it waits as a full request and wants no pass.
    `preempted`: its KV was taken and nothing has arrived for it since.
    """

    stream_id: str
    arrival: int
    cacheable: int
    held: int
    sealed: bool = False
    preempted: bool = False

    @property
    def missing(self) -> int:
        return 0 if self.sealed else max(0, self.cacheable - self.held)

    @property
    def works(self) -> bool:
        """It has tokens to compute that are worth taking another stream's KV for."""
        return self.missing > 0 and not self.preempted


@dataclass(frozen=True)
class PoolView:
    """The KV pool. `available`: after what the running requests are likely to decode;
    `spare`: after all that they may decode, which is what open streams may take."""

    available: int
    spare: int


@dataclass(frozen=True)
class Pass:
    """A slice of an open stream to compute: at most `tokens` beyond what it holds."""

    stream_id: str
    tokens: int


@dataclass(frozen=True)
class Decision:
    """One iteration's plan: whose KV is given up, in this order, and which passes run."""

    victims: tuple[str, ...] = ()
    passes: tuple[Pass, ...] = ()
