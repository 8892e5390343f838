"""From a worker's events to pieces of an answer, over several attempts: pure.

An attempt that fails after tokens were delivered is followed by one that continues from them, on
another worker. It continues from a *clean point*: a number of tokens whose text is complete. A
worker keeps half a character to itself, so that only the tokens tell whether there is one.

    delivered text   |------------ shown ------------|
    clean points     ^        ^         ^       ^
    next attempt                                |-- said again, skipped --|-- new -->
                                       tokens kept

Saying tokens again is right only if they come out the same: for greedy sampling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from router.events import WorkerEvent
from sglang_stream.errors import EngineFailure

_decode_ids = msgspec.json.Decoder(list[int]).decode
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CLEAN_POINTS = 256

# State that a continued request would begin anew with: what was said so far is then prompt.
_COUNTED = ("frequency_penalty", "presence_penalty", "repetition_penalty")
_GRAMMARS = ("regex", "ebnf", "json_schema")


@dataclass(frozen=True)
class Piece:
    """What one event adds: new text (perhaps none yet) and the ids of new tokens, if wanted."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class _CleanPoint:
    tokens: int
    text: int


class Increments:
    """Cuts the worker's events, which may repeat all that was said, into pieces.

    `incremental`: whether the worker's events hold the new part only. A text that ends in
    replacement characters is held back: they may be a character whose other bytes are to come.
    `kept`: ids of earlier attempts that the present one continues.
    """

    def __init__(self, incremental: bool, with_ids: bool) -> None:
        self._incremental = incremental
        self._with_ids = with_ids
        self.kept: list[int] = []
        self._ids: list[int] = []  # of this attempt, where each event holds the new ones only
        self._last_ids = msgspec.Raw(b"[]")
        self._said = 0  # characters of this attempt's text that were taken
        self._held = ""
        self._text = 0  # characters of the whole answer up to here
        self._shown = 0  # of those, delivered
        self._delivered_ids = 0
        self._clean: deque[_CleanPoint] = deque([_CleanPoint(0, 0)], maxlen=_CLEAN_POINTS)

    def take(self, event: WorkerEvent) -> Piece:
        text = event.text or ""
        text = self._held + text if self._incremental else text[self._said :]
        piece = text if event.meta_info.finish_reason else text.rstrip(_REPLACEMENT)
        self._held = text[len(piece) :]
        self._said += len(piece)
        self._text += len(piece)
        new = piece[max(0, len(piece) - max(0, self._text - self._shown)) :]
        self._shown = max(self._shown, self._text)
        tokens = len(self.kept) + event.meta_info.completion_tokens
        if not self._held:
            self._clean.append(_CleanPoint(tokens, self._text))
        return Piece(new, self._new_ids(event))

    def resume(
        self, params: Mapping[str, Any], is_whole: Callable[[list[int]], bool]
    ) -> dict[str, Any]:
        """Goes back to a clean point; the sampling parameters of the attempt that continues there.

        `params`: those of the whole generation. `is_whole`: whether a text of these ids ends with
        a whole character. Raises EngineFailure where the sampling does not
        allow to go on as if nothing had happened.
        """
        ids = self._all_ids()
        point = self._point_for(params, lambda tokens: is_whole(ids[:tokens]))
        again = point.text < self._shown or (self._with_ids and point.tokens < self._delivered_ids)
        if again and not _greedy(params):
            raise EngineFailure(
                "the worker was lost during the answer, and with this sampling it cannot be "
                "continued elsewhere: ask again"
            )
        self.kept = ids[: point.tokens]
        self._ids, self._last_ids = [], msgspec.Raw(b"[]")
        self._said, self._held, self._text = 0, "", point.text
        self._clean = deque([point], maxlen=_CLEAN_POINTS)
        continued = dict(params)
        for name in ("max_new_tokens", "min_new_tokens"):
            if params.get(name) is not None:
                continued[name] = max(0, params[name] - len(self.kept))
        return continued

    def _point_for(self, params: Mapping[str, Any], is_whole: Callable[[int], bool]) -> _CleanPoint:
        if any(params.get(name) for name in _GRAMMARS) or any(
            params.get(name, neutral) != neutral
            for name, neutral in zip(_COUNTED, (0, 0, 1), strict=True)
        ):
            return _CleanPoint(0, 0)
        if params.get("stop_regex"):
            return _CleanPoint(0, 0)
        stops = params.get("stop") or ()
        longest = max(map(len, [stops] if isinstance(stops, str) else stops), default=0)
        limit = params.get("max_new_tokens")
        for point in reversed(self._clean):
            # A stop text may have begun before the clean point, and one token must be left.
            if point.text > self._shown - longest or (limit is not None and point.tokens >= limit):
                continue
            if is_whole(point.tokens):
                return point
        return _CleanPoint(0, 0)

    def _all_ids(self) -> list[int]:
        ids = self._ids if self._incremental else _decode_ids(self._last_ids)
        return self.kept + ids

    def _new_ids(self, event: WorkerEvent) -> list[int]:
        if self._incremental:
            self._ids += _decode_ids(event.output_ids)
        elif len(bytes(event.output_ids)) > 2:
            self._last_ids = event.output_ids
        if not self._with_ids:
            return []
        new = self._all_ids()[self._delivered_ids :]
        self._delivered_ids += len(new)
        return new


def _greedy(params: Mapping[str, Any]) -> bool:
    return params.get("temperature") == 0 or params.get("top_k") == 1
