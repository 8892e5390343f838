"""From the sampling fields of a call to SGLang's sampling parameters: pure.

The names follow `to_sampling_params` in sglang/srt/entrypoints/openai/protocol.py. What a caller
leaves out is left out here too, so that the worker's own defaults hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from router.schemas import GenerateBody, ResponseFormat

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "no_stop_trim",
    "ignore_eos",
    "skip_special_tokens",
    "regex",
    "ebnf",
    "json_schema",
)


def sampling_params(body: GenerateBody, defaults: Mapping[str, float]) -> dict[str, Any]:
    """SGLang's sampling parameters for `body`.

    `defaults`: the model's own, below what the caller says (SGLang applies them to chats only).
    Without a limit of the caller's, `max_new_tokens` is None: what the context has room for.
    """
    params: dict[str, Any] = {**defaults, "max_new_tokens": body.limit}
    for name in _SAME_NAME:
        value = getattr(body, name)
        if value is not None:
            params[name] = value
    if body.min_tokens is not None:
        params["min_new_tokens"] = body.min_tokens
    if body.seed is not None:
        params["sampling_seed"] = body.seed
    if body.response_format is not None:
        params.update(_grammar(body.response_format))
    return params


def _grammar(response_format: ResponseFormat) -> dict[str, str]:
    if response_format.json_schema is not None:
        return {"json_schema": msgspec.json.encode(response_format.json_schema.schema_).decode()}
    if response_format.type == "json_object":
        return {"json_schema": '{"type": "object"}'}
    return {}
