"""What the planner sees and what it decides, as frozen values.

All sizes are KV tokens, all times seconds. A *full* request has its whole prompt (a sealed stream
or an ordinary request); an open stream is *partial*. `held` KV is locked by its stream; `available`
KV is free or can be evicted at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

PolicyName = Literal["default", "fcfs", "lcas", "mcps", "srpf", "slack"]
"""In which order requests are served (see `policies`)."""

Preemption = Literal["auto", "recompute", "swap", "off"]
"""How a stream gives up its KV: computed again, copied to host memory and back, or the cheaper of
both (`auto`); `off`: open streams never take each other's, full requests still do."""

Invalidation = Literal["soft", "hard"]
"""What becomes of KV beyond the common prefix of an update: the first to be evicted, or freed."""


class View(NamedTuple):
    """A request as policies and the planner see it.

        tokens  |---- held ----|---- in host memory ----|---- missing ----|
                0            held                     saved             tokens

    `arrival`: the place of its opening (or of the whole request) in the order of arrival;
    `latest`: the place of its last chunk among all chunks and requests. `tokens`: prompt tokens
    that fill whole pages, of a full request all that are to be computed or cached. `held`: the
    prefix whose KV is on the device; `saved`: the prefix that a copy in host memory ends, 0
    without one. `reserve`: tokens that it may decode. `busy`: one of its passes runs now.
    `parked`: it has lost its KV and nothing has arrived for it since. `since_s`: since when it has
    had something to compute; `work_s`: the predicted time to compute it; `due_s`: when its seal is
    predicted. `unsure`: tokens at the end that updates are likely to replace before it.
    """

    id: str
    arrival: int
    tokens: int
    held: int = 0
    full: bool = False
    latest: int = 0
    saved: int = 0
    reserve: int = 0
    busy: bool = False
    parked: bool = False
    since_s: float = 0.0
    work_s: float = 0.0
    due_s: float = 0.0
    unsure: int = 0

    @property
    def ready(self) -> int:
        """The prefix that need not be computed."""
        return self.held if self.held > self.saved else self.saved

    @property
    def missing(self) -> int:
        """Tokens to compute."""
        # Asked for at every change of every stream: `max` would double its time.
        ready = self.held if self.held > self.saved else self.saved
        return self.tokens - ready if self.tokens > ready else 0

    @property
    def restore(self) -> int:
        """Tokens that a copy in host memory would bring back."""
        return max(0, self.saved - self.held)

    @property
    def need(self) -> int:
        """KV tokens that a full request wants beyond what it holds."""
        return max(0, self.tokens - self.held) + self.reserve


@dataclass(frozen=True)
class PoolView:
    """The KV pool. `available`: after what the running requests are likely to decode;
    `spare`: after all that they may decode, which is what open streams may take. `page`: tokens
    of a page; `host`: tokens of one copy that host memory could take, older copies dropped."""

    available: int
    spare: int
    page: int = 1
    host: int = 0


@dataclass(frozen=True)
class Budget:
    """What open streams may compute in one iteration: `tokens` at most, and no more than is
    predicted to end within `seconds`, all requests of the iteration together. `decoding`: requests
    that decode wait for it."""

    tokens: int
    seconds: float
    decoding: bool = False


class Pass(NamedTuple):
    """A slice of an open stream to compute: at most `tokens` beyond what it holds."""

    id: str
    tokens: int


class Victim(NamedTuple):
    """A stream whose KV is given up: copied to host memory first (`swap`), or computed again."""

    id: str
    swap: bool


class Decision(NamedTuple):
    """One iteration's plan: whose KV is given up, whose copy comes back from host memory, and
    which passes run, each in this order. `spare`: KV that is then left to open streams."""

    victims: tuple[Victim, ...] = ()
    restores: tuple[str, ...] = ()
    passes: tuple[Pass, ...] = ()
    spare: int = 0
