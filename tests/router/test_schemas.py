"""Bodies that are refused because a worker would not survive them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from router.schemas import GenerateBody, parse
from sglang_stream.errors import Malformed
from tests.router.conftest import error_of, opened


@pytest.mark.parametrize(
    "body",
    [
        {"top_k": 2**31},
        {"min_tokens": 2**31},
        {"seed": 2**63},
        {"repetition_penalty": 1e-300},
        {"logit_bias": {"5": 1e308}},
        {"logit_bias": {"five": 1}},
        {"temperature": 1e39},
        {"stop_regex": "["},
        {"stop_regex": ["a", "(" * 300]},
        {"stop_regex": "(" * 5000 + ")" * 5000},
    ],
    ids=str,
)
def test_sampling_that_would_end_a_worker(body: dict[str, Any]) -> None:
    with pytest.raises(Malformed) as refused:
        parse(GenerateBody, json.dumps(body).encode())
    assert str(refused.value.param).startswith(next(iter(body)))


@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": "yes|no"},
        {"ebnf": 'root ::= "yes"'},
        {"json_schema": '{"const": 1}'},
        {"response_format": {"type": "json_object"}},
    ],
    ids=str,
)
def test_a_grammar_that_may_end_before_min_tokens(grammar: dict[str, Any]) -> None:
    """All that it allows would be forbidden: no token would have a probability."""
    with pytest.raises(Malformed, match="'min_tokens'"):
        parse(GenerateBody, json.dumps(grammar | {"min_tokens": 5}).encode())
    assert parse(GenerateBody, json.dumps(grammar | {"min_tokens": 0}).encode())
    text = {"response_format": {"type": "text"}, "min_tokens": 5}
    assert parse(GenerateBody, json.dumps(text).encode())


def test_sampling_at_the_bounds() -> None:
    body = {
        "top_k": 2**31 - 1,
        "seed": -(2**63),
        "temperature": 1e6,
        "repetition_penalty": 1e-6,
        "logit_bias": {"5": -100},
        "stop_regex": ["a+", "b{2}"],
    }
    assert parse(GenerateBody, json.dumps(body).encode()).model_dump(exclude_unset=True) == body


@pytest.mark.parametrize("token", [-1, 300, 2**40])
def test_a_stop_token_that_the_model_does_not_have(client: httpx.Client, token: int) -> None:
    path = f"/v1/streams/{opened(client)}"
    refused = client.post(f"{path}/generate", json={"stop_token_ids": [token]})
    assert error_of(refused, 422)["param"] == "stop_token_ids"
    assert client.get(path).json()["status"] == "open"
