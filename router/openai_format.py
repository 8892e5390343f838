"""OpenAI's answer objects for a generation: pure.

`chat.completion(.chunk)` for streams opened with messages, `text_completion` for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from router.generation import Outcome
from router.increments import Piece


@dataclass(frozen=True)
class AnswerFormat:
    """What all objects of one answer share. `prompt_ids`: given back where ids were asked for."""

    id: str
    created: int
    model: str
    chat: bool
    with_ids: bool
    prompt_ids: list[int] | None = None

    def completion(self, text: str, ids: list[int], outcome: Outcome) -> dict[str, Any]:
        """The whole answer at once."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": text}}
        choice = self._choice(content, ids, outcome.reason)
        kind = "chat.completion" if self.chat else "text_completion"
        answer = {**self._head(kind), "choices": [choice], "usage": usage(outcome)}
        return answer | self._prompt()

    def chunk(self, piece: Piece, first: bool) -> dict[str, Any]:
        """One event of the answer. The first names the role and shows the prompt's ids."""
        content: dict[str, Any] = {"text": piece.text}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            content = {"delta": {**role, "content": piece.text}}
        answer = self._event([self._choice(content, piece.ids, None)])
        return answer | (self._prompt() if first else {})

    def last_chunk(self, outcome: Outcome) -> dict[str, Any]:
        """The event with the reason why the answer ends, and its usage."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        answer = self._event([self._choice(content, [], outcome.reason)])
        return {**answer, "usage": usage(outcome)}

    def usage_chunk(self, outcome: Outcome) -> dict[str, Any]:
        """The event that `stream_options.include_usage` asks for."""
        return {**self._event([]), "usage": usage(outcome)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices}

    def _prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompt_ids} if self.with_ids else {}

    def _choice(
        self, content: dict[str, Any], ids: list[int], reason: dict[str, Any] | None
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            **content,
            "logprobs": None,
            "finish_reason": reason["type"] if reason else None,
        }
        if reason and reason.get("matched") is not None:
            choice["matched_stop"] = reason["matched"]
        if self.with_ids:
            choice["token_ids"] = ids
        return choice


def usage(outcome: Outcome) -> dict[str, Any]:
    """OpenAI's `usage` with the counters of the stream, absent if the worker did not tell them."""
    counters = {} if outcome.stream is None else msgspec.structs.asdict(outcome.stream)
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": outcome.cached_tokens},
        "stream": {**counters, "router_ttft_ms": round(outcome.ttft_ms, 3)},
    }
