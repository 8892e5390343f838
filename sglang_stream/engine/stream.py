"""One stream as its scheduler keeps it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from sglang_stream import messages as m
from sglang_stream.engine.cache import Hold
from sglang_stream.policy import Prefill, View
from sglang_stream.session import Session


@dataclass
class Usage:
    """The counters of `messages.Usage` while they still move."""

    chunks: int = 0
    updates: int = 0
    lcp_tokens: int = 0
    invalidated_tokens: int = 0
    computed_tokens: int = 0
    ready_tokens: int = 0
    early_kv_bytes: int = 0
    late_kv_bytes: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0

    def freeze(self) -> m.Usage:
        return m.Usage(**self.__dict__)


@dataclass(eq=False)
class Stream:
    """One stream. `epoch`, `owner`, `namespace`, `memo`: see `messages.Open`; `ends`: the prompt's
    length after each chunk of an append stream, after the latest update of another. `in_flight`: a
    pass of it is in the forward now; `closing`: its seal is on the way; `preempted`: its KV was
    taken and no chunk came since; `saved`: the prefix that a copy in host memory ends; `reach`: the
    prefix that has been computed once. `latest`, `since_s`, `due_s`: see `policy.View`; `stays`:
    the part of the prompt that is not `unsure` there; `last_chunk_s`, `gaps_s`: when the last chunk
    came, and the time between all of them. `rid`, `request`: SGLang's request once it is sealed;
    `aborted`: it was told to end."""

    session: Session
    arrival: int
    opening: array[int]
    tokens: array[int]
    idle_timeout_s: float
    last_event_s: float
    epoch: int = 0
    owner: bytes = b""
    namespace: str | None = None
    memo: bytes = b""
    ends: dict[int, int] = field(default_factory=dict)
    hold: Hold | None = None
    in_flight: bool = False
    closing: bool = False
    preempted: bool = False
    saved: int = 0
    reach: int = 0
    latest: int = 0
    since_s: float = 0.0
    due_s: float = 0.0
    stays: float = 1.0
    last_chunk_s: float = 0.0
    gaps_s: float = 0.0
    rid: str | None = None
    request: Any = None
    aborted: bool = False
    usage: Usage = field(default_factory=Usage)

    @property
    def held(self) -> int:
        return self.hold.length if self.hold is not None else 0

    def cacheable(self, page_size: int) -> int:
        """Tokens that fill whole pages, the only ones that the tree keeps."""
        return len(self.tokens) - len(self.tokens) % page_size

    def view(self, page_size: int, prefill: Prefill) -> View:
        """How the planner sees it."""
        full = self.session.state == "sealed"
        tokens = len(self.tokens) if full else self.cacheable(page_size)
        held, saved = self.held, self.saved
        ready = held if held > saved else saved
        # Made at every change: by place, in the order of `View`, takes half the time of names.
        return View(
            self.session.stream_id,
            self.arrival,
            tokens,
            held,
            full,
            self.latest,
            saved,
            0,  # what it may decode is known of requests only
            self.in_flight or self.closing,
            self.preempted,
            self.since_s,
            prefill.work_s(tokens - ready, ready) if tokens > ready else 0.0,
            self.due_s,
            tokens - int(self.stays * tokens),
        )
