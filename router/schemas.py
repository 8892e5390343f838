"""The bodies of the router's own calls: pydantic models, strict and closed to unknown fields."""

from __future__ import annotations

import re
from array import array
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.config import JsonDict

from router.errors_http import malformed
from sglang_stream.errors import Malformed
from sglang_stream.messages import Mode, Role

Seq = Annotated[int, Field(ge=1, le=2**53)]
Order = Literal["relevance", "sticky"]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
_INT32_MAX = 2**31 - 1


def _one_of(*names: str) -> JsonDict:
    """What a model's JSON Schema says of fields of which `_exactly_one` must be given."""
    return {
        "oneOf": [
            {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in names
        ]
    }


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message as the chat template takes it; fields besides these two go to the template."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: str
    content: str | list[TextPart] | None = None


class DocumentBody(Body):
    id: str | None = None
    text: str


def text_of(document: str | DocumentBody) -> str:
    return document if isinstance(document, str) else document.text


class OpenBody(Body):
    """POST /v1/streams."""

    model_config = ConfigDict(json_schema_extra=_one_of("messages", "prompt", "input_ids"))

    model: str | None = None
    mode: Mode = "append"
    messages: list[ChatMessage] | None = None
    preamble: str | None = None
    prompt: str | None = None
    input_ids: list[int] | None = None
    order: Order | None = None
    idle_timeout_s: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> OpenBody:
        _exactly_one(messages=self.messages, prompt=self.prompt, input_ids=self.input_ids)
        if self.preamble is not None and self.messages is None:
            raise ValueError("'preamble' needs 'messages'")
        if self.order is not None and self.mode != "update":
            raise ValueError("'order' needs the mode 'update'")
        return self


class ChunksBody(Body):
    """POST /v1/streams/{id}/chunks."""

    model_config = ConfigDict(json_schema_extra=_one_of("chunks", "input_ids"))

    seq: Seq
    chunks: Annotated[list[str | DocumentBody], Field(min_length=1)] | None = None
    input_ids: list[int] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChunksBody:
        _exactly_one(chunks=self.chunks, input_ids=self.input_ids)
        return self


class ContextBody(Body):
    """PUT /v1/streams/{id}/context."""

    model_config = ConfigDict(json_schema_extra=_one_of("documents", "input_ids"))

    seq: Seq
    documents: list[str | DocumentBody] | None = None
    input_ids: list[int] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ContextBody:
        _exactly_one(documents=self.documents, input_ids=self.input_ids)
        return self


class LastBody(Body):
    """The last chunk, or the whole context, in the call that generates."""

    model_config = ConfigDict(json_schema_extra=_one_of("chunks", "documents", "input_ids"))

    seq: Seq
    chunks: Annotated[list[str | DocumentBody], Field(min_length=1)] | None = None
    documents: list[str | DocumentBody] | None = None
    input_ids: list[int] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> LastBody:
        _exactly_one(chunks=self.chunks, documents=self.documents, input_ids=self.input_ids)
        return self

    def call(self, mode: Mode) -> ChunksBody | ContextBody:
        """The same as a call of its own, to a stream of this mode."""
        if self.documents is not None or (self.chunks is None and mode == "update"):
            return ContextBody(seq=self.seq, documents=self.documents, input_ids=self.input_ids)
        return ChunksBody(seq=self.seq, chunks=self.chunks, input_ids=self.input_ids)


class StreamOptions(Body):
    include_usage: bool | None = None


class JsonSchema(Body):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' belongs to the type 'json_schema' and only to it")
        return self


class GenerateBody(Body):
    """POST /v1/streams/{id}/generate; the sampling fields are those of SGLang's OpenAI server.

    A field of OpenAI's that is not here is refused rather than ignored. So is a number that
    SGLang's tensors cannot hold, or that makes its logits infinite, and what may leave no token to
    choose: it would end the worker.
    """

    question: str | None = None
    input_ids: list[int] | None = None
    last: LastBody | None = None
    last_seq: Annotated[int, Field(ge=0, le=2**53)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    n: Literal[1] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT32_MAX)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=2)] | None = None
    logit_bias: dict[TokenKey, Bias] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> GenerateBody:
        if self.question is not None and self.input_ids is not None:
            raise ValueError("give 'question' or 'input_ids', not both")
        if self.last is not None and self.last_seq not in (None, self.last.seq):
            raise ValueError("'last_seq' is the 'seq' of 'last', if both are given")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give 'max_tokens' or 'max_completion_tokens', not both")
        if self.top_k == 0:
            raise ValueError("'top_k' is -1 (off) or at least 1")
        if self.limit is not None and (self.min_tokens or 0) > self.limit:
            raise ValueError("'min_tokens' is above 'max_tokens'")
        grammars = (self.regex, self.ebnf, self.json_schema, self.response_format)
        if sum(g is not None for g in grammars) > 1:
            raise ValueError("give one of 'regex', 'ebnf', 'json_schema' and 'response_format'")
        is_text = self.response_format is not None and self.response_format.type == "text"
        if self.min_tokens and any(grammars) and not is_text:
            raise ValueError("'min_tokens' does not go with a grammar, which may end before it")
        return self

    @field_validator("stop_regex")
    @classmethod
    def _compiles(cls, stop_regex: str | list[str] | None) -> str | list[str] | None:
        for pattern in [stop_regex] if isinstance(stop_regex, str) else stop_regex or ():
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as e:
                raise ValueError(f"no regular expression: {e}") from None
        return stop_regex

    @property
    def sealed_at(self) -> int | None:
        """The number of the last call that the answer is to be about, if it is told."""
        return self.last_seq if self.last is None else self.last.seq

    @property
    def limit(self) -> int | None:
        """The most tokens to generate; None: as many as the context takes."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens


class WorkerBody(Body):
    """POST /workers."""

    url: Annotated[str, Field(pattern=r"^https?://[^/?#\s]+/?$")]
    role: Role | None = None
    bootstrap_port: Annotated[int, Field(ge=1, le=65535)] | None = None


B = TypeVar("B", bound=Body)


def parse(model: type[B], body: bytes) -> B:
    """The body as `model`. Raises Malformed, which names the first field at fault."""
    try:
        return model.model_validate_json(body)
    except ValidationError as e:
        raise malformed(e) from None


def token_array(ids: list[int], vocab_size: int, param: str = "input_ids") -> array[int]:
    """The ids, of the field `param`, as an int32 array.

    Raises Malformed for one that the model does not have.
    """
    try:
        tokens = array("i", ids)
    except OverflowError:
        raise Malformed(f"{param}: a token id is no 32-bit number", param=param) from None
    if tokens:
        view = np.frombuffer(tokens, dtype=np.int32)
        for extreme in (int(view.min()), int(view.max())):
            if not 0 <= extreme < vocab_size:
                raise Malformed(
                    f"{param}: token id {extreme} is outside [0, {vocab_size})", param=param
                )
    return tokens


def _exactly_one(**fields: object) -> None:
    given = [name for name, value in fields.items() if value is not None]
    if len(given) != 1:
        names = ", ".join(repr(name) for name in fields)
        raise ValueError(f"give exactly one of {names} ({len(given)} given)")
