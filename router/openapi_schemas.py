"""JSON Schemas of what the router answers, and of bodies that a worker reads: components of the
OpenAPI document, by name. Answers may get more fields; those named are always there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from router.breaker import BreakerState
from sglang_stream.messages import Mode, Role, State, Usage


def ref(name: str) -> dict[str, Any]:
    """A reference to the component of that name."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(optional: tuple[str, ...] = (), /, **properties: Any) -> dict[str, Any]:
    """An object with these properties, all but the optional ones required."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _enum(values: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def _or_null(kind: str) -> dict[str, Any]:
    return {"type": [kind, "null"]}


_TEXT = {"type": "string"}
_YES_OR_NO = {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}
_IDS = _list(_COUNT)

_SAMPLING: Mapping[str, Any] = {
    "model": _TEXT,
    "max_tokens": {"type": "integer", "minimum": 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "stop": {"anyOf": [_TEXT, _list(_TEXT)]},
    "stream": _YES_OR_NO,
}
"""The commonest fields of an ordinary request; the worker knows more."""

_CHOICE = _object(
    ("text", "message", "token_ids", "matched_stop"),
    index=_COUNT,
    text=_TEXT,
    message=_object(role={"const": "assistant"}, content=_TEXT),
    logprobs={"type": "null"},
    finish_reason=_TEXT,
    token_ids=_IDS,
)

COMPONENTS: Mapping[str, Any] = {
    "Error": _object(
        error=_object(
            ("expected_seq", "retry_after"),
            message={"type": "string", "minLength": 1},
            type=_TEXT,
            code=_or_null("string"),
            param=_or_null("string"),
            expected_seq={"type": "integer", "minimum": 1},
            retry_after={"type": "integer", "minimum": 1},
        )
    ),
    # A worker of SGLang's repeats the status as the code.
    "WorkerError": _object(
        error=_object(
            message=_TEXT, type=_TEXT, code={"type": ["string", "integer", "null"]}, param={}
        )
    ),
    "Stream": _object(
        ("prefill_worker",),
        prefill_worker=_or_null("string"),
        id=_TEXT,
        object={"const": "stream"},
        mode=_enum(get_args(Mode)),
        model=_TEXT,
        status=_enum(get_args(State)),
        created=_COUNT,
        seq=_COUNT,
        usage=_object(prompt_tokens=_COUNT, stream=ref("Usage")),
    ),
    "Usage": _object(**dict.fromkeys(Usage.__struct_fields__, _COUNT)),
    "StreamList": _object(object={"const": "list"}, data=_list(ref("Stream"))),
    "Deleted": _object(id=_TEXT, object={"const": "stream"}, deleted={"const": True}),
    "Appended": _object(seq=_COUNT, tokens=_COUNT),
    "Updated": _object(seq=_COUNT, tokens=_COUNT, lcp=_COUNT),
    "Completion": _object(
        ("prompt_token_ids",),
        id=_TEXT,
        object=_enum(("chat.completion", "text_completion")),
        created=_COUNT,
        model=_TEXT,
        choices=_list(_CHOICE),
        usage=ref("CompletionUsage"),
        prompt_token_ids={"anyOf": [_IDS, {"type": "null"}]},
    ),
    "CompletionUsage": _object(
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(cached_tokens=_COUNT),
        stream=_object(router_ttft_ms={"type": "number", "minimum": 0}),
    ),
    "ChatCompletionRequest": _object(
        tuple(_SAMPLING),
        messages={
            "type": "array",
            "minItems": 1,
            "items": _object(role=_enum(("system", "user", "assistant")), content=_TEXT),
        },
        **_SAMPLING,
    ),
    "CompletionRequest": _object(
        tuple(_SAMPLING),
        prompt={"anyOf": [{"type": "string", "minLength": 1}, {**_IDS, "minItems": 1}]},
        **_SAMPLING,
    ),
    "Model": _object(id=_TEXT, object={"const": "model"}),
    "ModelList": _object(object={"const": "list"}, data=_list(ref("Model"))),
    "Readiness": _object(status={"const": "ready"}),
    "Workers": _object(
        workers=_list(
            ref("Worker"),
        ),
        total=_COUNT,
    ),
    "Worker": _object(
        ("model", "reason", "pid", "load"),
        id=_TEXT,
        url=_TEXT,
        role=_enum(get_args(Role)),
        healthy=_YES_OR_NO,
        draining=_YES_OR_NO,
        circuit=_enum(get_args(BreakerState)),
        model=_TEXT,
        reason=_TEXT,
        pid=_or_null("integer"),
        load={"type": "object"},
    ),
    "Flushed": _object(
        workers=_list(_object(url=_TEXT, flushed=_YES_OR_NO, reason=_or_null("string")))
    ),
    "NotFlushed": {"allOf": [ref("Error"), ref("Flushed")]},
}
