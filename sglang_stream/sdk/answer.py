"""A generation's events put together: its text, its usage and the whole completion."""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_stream.errors import from_fields


class StreamUsage(msgspec.Struct, frozen=True):
    """What streaming did for one request: `usage.stream` of the answer, in tokens.

    `ready_tokens`: computed when the stream was sealed. `preemptions`: how often its KV was given
    up for others; `recomputed_tokens`: computed once more for that. `router_ttft_ms`: from the seal
    to the first token, seen by the router.
    """

    chunks: int = 0
    updates: int = 0
    lcp_tokens: int = 0
    invalidated_tokens: int = 0
    computed_tokens: int = 0
    ready_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    router_ttft_ms: float | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request; `stream` is None if the server has no streams."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    stream: StreamUsage | None = None


class Answer:
    """Gathers the events of one generation."""

    def __init__(self) -> None:
        self.has_token = False
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, event: dict[str, Any]) -> str:
        """The new text of the first choice, often "". Raises the error that an event reports."""
        if isinstance(event.get("error"), dict):
            raise from_fields(event["error"])
        _merge(self._top, {k: v for k, v in event.items() if k != "choices"})
        text = ""
        for part in event.get("choices") or ():
            # Also without text (half of a character, say): neither our router nor SGLang sends
            # anything of a choice before its first token.
            self.has_token = True
            index = part.get("index", 0)
            delta = part.pop("delta", None) or {}
            _merge(self._choices.setdefault(index, {"index": index}), part)
            if "text" not in part:
                _merge(self._choices[index].setdefault("message", {"role": "assistant"}), delta)
            if index == 0:
                text += part.get("text") or delta.get("content") or ""
        return text

    @property
    def usage(self) -> Usage | None:
        """The final usage, None before it came."""
        fields = self._top.get("usage")
        return None if fields is None else msgspec.convert(fields, Usage, strict=False)

    def completion(self) -> dict[str, Any]:
        """A `chat.completion` or `text_completion` as one ordinary answer would hold it."""
        kind = str(self._top.get("object", "")).removesuffix(".chunk")
        choices = [self._choices[index] for index in sorted(self._choices)]
        return {**self._top, "object": kind, "choices": choices}


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Adds an event's fields: texts and lists grow, objects merge, the rest is replaced."""
    for key, value in new.items():
        old = into.get(key)
        if value is None:
            into.setdefault(key, None)
        elif isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            old.extend(value)
        elif isinstance(old, str) and key in ("text", "content", "reasoning_content"):
            into[key] = old + value
        else:
            into[key] = value
