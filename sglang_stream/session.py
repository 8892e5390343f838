"""The life of one stream, without I/O, tokens or a clock.

    open --append|update--> open --seal--> sealed --finish--> finished
      ^-----------------------reopen---------|
      \\----------abort---------+------------abort-----------> aborted

Rules of sequence numbers, which start at 1:
- append: without gaps. The next number is applied; an earlier one is a repeat if its content is
  the same, else a conflict; a later one is a gap, and the answer names the number expected.
- update: the highest number wins and gaps are allowed. The latest number again is a repeat if its
  content is the same, else a conflict; an earlier one is superseded and has no effect.

An illegal event raises and leaves the session as it was.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal

from sglang_stream.errors import (
    SequenceConflict,
    SequenceGap,
    StreamNotFound,
    StreamSealed,
    WrongMode,
)
from sglang_stream.messages import Mode, State

EventName = Literal["append", "update", "seal", "reopen", "finish", "abort"]

_NEXT_STATE: dict[tuple[State, EventName], State] = {
    ("open", "append"): "open",
    ("open", "update"): "open",
    ("open", "seal"): "sealed",
    ("open", "abort"): "aborted",
    ("sealed", "reopen"): "open",
    ("sealed", "finish"): "finished",
    ("sealed", "abort"): "aborted",
}


class Verdict(Enum):
    """What to do with a chunk or an update that is legal."""

    APPLY = auto()
    REPEAT = auto()
    SUPERSEDED = auto()


class Session:
    """State and sequence of one stream. `seq` is the last number applied, 0 before the first."""

    def __init__(self, stream_id: str, mode: Mode) -> None:
        self.stream_id = stream_id
        self.mode: Mode = mode
        self.state: State = "open"
        self.seq = 0
        self._digests: dict[int, bytes] = {}

    def check(self, event: Literal["append", "update"], seq: int, digest: bytes) -> Verdict:
        """Whether the content `digest` under number `seq` is new, a repeat or superseded.

        Changes nothing; `record` follows when the event has been applied. A repeat is recognised
        after the seal too, since its first answer may have been lost.

        Raises WrongMode, SequenceConflict, SequenceGap, StreamSealed, StreamNotFound.
        """
        if event != self.mode:
            right = "POST .../chunks" if self.mode == "append" else "PUT .../context"
            raise WrongMode(f"this stream is in {self.mode} mode: use {right}")
        known = self._digests.get(seq)
        if known is not None:
            if known != digest:
                raise SequenceConflict(
                    f"seq {seq} was already used with other content: send the next one",
                    param="seq",
                    expected_seq=self.seq + 1,
                )
            return Verdict.REPEAT
        self._require(event)
        if self.mode == "append" and seq != self.seq + 1:
            raise SequenceGap(
                f"seq {seq} came, {self.seq + 1} is expected: send from there on",
                param="seq",
                expected_seq=self.seq + 1,
            )
        return Verdict.APPLY if seq > self.seq else Verdict.SUPERSEDED

    def record(self, seq: int, digest: bytes) -> None:
        """Notes that the event that `check` allowed was applied under `seq`."""
        self._digests[seq] = digest
        self.seq = seq

    def check_seal(self, last_seq: int | None) -> None:
        """Whether the stream may be sealed with `last_seq` as its last number (None: any).

        Raises SequenceGap if less has arrived, SequenceConflict if more has, StreamSealed,
        StreamNotFound.
        """
        self._require("seal")
        if last_seq is None or last_seq == self.seq:
            return
        if last_seq > self.seq:
            raise SequenceGap(
                f"last_seq is {last_seq} but only {self.seq} arrived: send the rest and try again",
                param="last_seq",
                expected_seq=self.seq + 1,
            )
        raise SequenceConflict(
            f"last_seq is {last_seq} but {self.seq} arrived already: seal with that number",
            param="last_seq",
            expected_seq=self.seq + 1,
        )

    def seal(self) -> None:
        self.state = self._require("seal")

    def reopen(self) -> None:
        """Takes back a seal whose generation was refused before it began."""
        self.state = self._require("reopen")

    def finish(self) -> None:
        self.state = self._require("finish")

    def abort(self) -> None:
        self.state = self._require("abort")

    def _require(self, event: EventName) -> State:
        after = _NEXT_STATE.get((self.state, event))
        if after is not None:
            return after
        if self.state == "aborted":
            raise StreamNotFound(f"stream {self.stream_id} was aborted or expired: open a new one")
        raise StreamSealed(f"stream {self.stream_id} is sealed: open a new one for more context")
