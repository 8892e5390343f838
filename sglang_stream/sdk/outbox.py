"""What of a stream's context is still to be sent, and under which sequence number. No I/O.

    add(piece) -> pending --take()--> numbered calls, kept for a replay --rewind(seq)--> taken again

A number belongs to one content for ever: a call that is taken again is the same call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sglang_stream.messages import Mode
from sglang_stream.sdk.items import Ids, Piece, Texts

GATHERED_CHARACTERS = 1 << 18
"""Pending chunks are put into one call up to this many characters (token ids count as 4)."""


TEXTS_FIELDS: dict[Mode, str] = {"append": "chunks", "update": "documents"}
"""The API's names for texts."""


@dataclass(frozen=True)
class Call:
    """One numbered call. `piece`: the chunks it adds, or the whole context it sets."""

    seq: int
    piece: Piece

    def body(self, texts_field: str) -> dict[str, Any]:
        """The call's JSON; `texts_field` is the API's name for texts in this mode."""
        match self.piece:
            case Texts(items):
                return {"seq": self.seq, texts_field: items}
            case Ids(ids):
                return {"seq": self.seq, "input_ids": ids}


class Outbox(Protocol):
    """The part that both modes share."""

    @property
    def last_seq(self) -> int:
        """The highest number given out, 0 before the first."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send."""

    def add(self, piece: Piece) -> None:
        """Takes an item of the caller's."""

    def take(self) -> Call | None:
        """The next call to send, None if there is nothing to send."""

    def rewind(self, seq: int) -> None:
        """Makes the calls from `seq` on, those that still matter, be taken again."""

    def pieces(self) -> list[Piece]:
        """The whole context so far, in order."""


class AppendOutbox:
    """Every chunk is sent, in order and without gaps; those that wait go in one call."""

    def __init__(self) -> None:
        self._pending: list[Piece] = []
        self._calls: list[Call] = []
        self._next = 0

    @property
    def last_seq(self) -> int:
        return len(self._calls)

    @property
    def is_empty(self) -> bool:
        return self._next == len(self._calls) and not self._pending

    def add(self, piece: Piece) -> None:
        self._pending.append(piece)

    def take(self) -> Call | None:
        if self._next == len(self._calls):
            if not self._pending:
                return None
            pieces = list(_leading_run(self._pending))
            del self._pending[: len(pieces)]
            self._calls.append(Call(len(self._calls) + 1, _joined(pieces)))
        call = self._calls[self._next]
        self._next += 1
        return call

    def rewind(self, seq: int) -> None:
        self._next = min(self._next, seq - 1)

    def pieces(self) -> list[Piece]:
        return [call.piece for call in self._calls] + self._pending


class UpdateOutbox:
    """Only the newest list matters: one that was never taken leaves no trace."""

    def __init__(self) -> None:
        self._pending: Piece | None = None
        self._latest: Call | None = None
        self._again = False

    @property
    def last_seq(self) -> int:
        return self._latest.seq if self._latest else 0

    @property
    def is_empty(self) -> bool:
        return self._pending is None and not self._again

    def add(self, piece: Piece) -> None:
        self._pending = piece

    def take(self) -> Call | None:
        if self._pending is not None:
            self._latest = Call(self.last_seq + 1, self._pending)
            self._pending = None
        elif not self._again:
            return None
        self._again = False
        return self._latest

    def rewind(self, seq: int) -> None:
        self._again = self._latest is not None

    def pieces(self) -> list[Piece]:
        if self._pending is not None:
            return [self._pending]
        return [self._latest.piece] if self._latest else []


def _leading_run(pieces: list[Piece]) -> Iterator[Piece]:
    """The first piece and those after it of the same kind, up to the size of one call."""
    size = 0
    for i, piece in enumerate(pieces):
        size += _size(piece)
        if i and (type(piece) is not type(pieces[0]) or size > GATHERED_CHARACTERS):
            return
        yield piece


def _size(piece: Piece) -> int:
    match piece:
        case Texts(items):
            return sum(len(item if isinstance(item, str) else item["text"]) for item in items)
        case Ids(ids):
            return 4 * len(ids)


def _joined(pieces: list[Piece]) -> Piece:
    """Pieces of one kind as one."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], Texts):
        return Texts([item for piece in pieces if isinstance(piece, Texts) for item in piece.items])
    return Ids([i for piece in pieces if isinstance(piece, Ids) for i in piece.ids])
