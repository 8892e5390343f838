"""What a caller asked for, as the bodies of the calls that do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sglang_stream.errors import InvalidRequest
from sglang_stream.messages import Mode
from sglang_stream.sdk.items import Ids, Piece, Texts, int_list
from sglang_stream.sdk.outbox import TEXTS_FIELDS, Call

Order = Literal["relevance", "sticky"]


@dataclass(frozen=True)
class Plan:
    """One request over a context that arrives later.

    At most one of `messages`, `prompt` and `input_ids` opens it, and at most one of `question`
    and `question_ids` ends it; `sampling` holds the further fields of the generation. Raises
    ValueError for combinations without a meaning.
    """

    mode: Mode = "append"
    question: str | None = None
    question_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | None = None
    input_ids: Sequence[int] | None = None
    preamble: str | None = None
    order: Order = "relevance"
    model: str | None = None
    idle_timeout_s: float | None = None
    sampling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("append", "update"):
            raise ValueError(f"mode is 'append' or 'update', not {self.mode!r}")
        if self.order not in ("relevance", "sticky"):
            raise ValueError(f"order is 'relevance' or 'sticky', not {self.order!r}")
        if self.mode == "append" and self.order == "sticky":
            raise ValueError("order='sticky' arranges whole lists: use it with mode='update'")
        if sum(x is not None for x in (self.messages, self.prompt, self.input_ids)) > 1:
            raise ValueError("give at most one of messages, prompt and input_ids")
        if self.question is not None and self.question_ids is not None:
            raise ValueError("give at most one of question and question_ids")
        if self.preamble is not None and not self.is_chat:
            raise ValueError("preamble stands in a user message: use it with messages")

    @property
    def is_chat(self) -> bool:
        return self.prompt is None and self.input_ids is None

    def opening(self) -> dict[str, Any]:
        """The body that opens the stream."""
        body: dict[str, Any] = {"mode": self.mode}
        if self.mode == "update":
            body["order"] = self.order
        if self.prompt is not None:
            body["prompt"] = self.prompt
        elif self.input_ids is not None:
            body["input_ids"] = int_list(self.input_ids)
        else:
            body["messages"] = list(self.messages or ())
        optional = {
            "model": self.model,
            "preamble": self.preamble,
            "idle_timeout_s": self.idle_timeout_s,
        }
        return body | {k: v for k, v in optional.items() if v is not None}

    def generation(self, last_seq: int, request_id: str, last: Call | None) -> dict[str, Any]:
        """The body that seals the stream and generates; `last`: the call that goes along."""
        body: dict[str, Any] = {"last_seq": last_seq, "request_id": request_id, "stream": True}
        if last is not None:
            body["last"] = last.body(TEXTS_FIELDS[self.mode])
        if self.question is not None:
            body["question"] = self.question
        if self.question_ids is not None:
            body["input_ids"] = int_list(self.question_ids)
        return dict(self.sampling or {}) | body

    def plain(self, pieces: Sequence[Piece], model: str) -> tuple[str, dict[str, Any]]:
        """Path and body of one ordinary request with the whole context, for a plain server.

        Raises InvalidRequest if texts and token ids would have to be mixed.
        """
        body = dict(self.sampling or {}) | {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.input_ids is not None:
            ids = int_list([*self.input_ids, *_all_ids(pieces), *(self.question_ids or ())])
            if self.question:
                raise _mixed()
            return "/v1/completions", body | {"prompt": ids}
        if self.question_ids is not None:
            raise _mixed()
        text = "".join(_plain_text(piece, self.mode) for piece in pieces) + (self.question or "")
        if self.prompt is not None:
            return "/v1/completions", body | {"prompt": self.prompt + text}
        last = {"role": "user", "content": (self.preamble or "") + text}
        return "/v1/chat/completions", body | {"messages": [*(self.messages or ()), last]}


def _all_ids(pieces: Sequence[Piece]) -> list[int]:
    if any(isinstance(piece, Texts) and piece.items for piece in pieces):
        raise _mixed()
    return [i for piece in pieces if isinstance(piece, Ids) for i in piece.ids]


def _plain_text(piece: Piece, mode: Mode) -> str:
    """The text that the router would put in the prompt: a blank line follows each document."""
    if isinstance(piece, Ids):
        raise _mixed()
    return "".join(
        item if isinstance(item, str) and mode == "append" else f"{_text_of(item)}\n\n"
        for item in piece.items
    )


def _text_of(item: str | dict[str, str]) -> str:
    return item if isinstance(item, str) else item["text"]


def _mixed() -> InvalidRequest:
    return InvalidRequest(
        "this server has no /v1/streams, and an ordinary request cannot mix texts and token ids: "
        "open with input_ids and give token ids throughout, or texts throughout"
    )
