from __future__ import annotations

from typing import Any

import pytest

from router.sampling import sampling_params
from router.schemas import GenerateBody


def params(defaults: dict[str, float] | None = None, **body: Any) -> dict[str, Any]:
    return sampling_params(GenerateBody.model_validate(body), defaults or {})


def test_nothing_said_nothing_sent() -> None:
    assert params() == {"max_new_tokens": None}
    assert params(temperature=None, stop=None) == {"max_new_tokens": None}


def test_the_model_speaks_below_the_caller() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9}
    assert params(defaults, temperature=0) == {
        "max_new_tokens": None,
        "temperature": 0,
        "top_p": 0.9,
    }


def test_both_names_of_the_limit() -> None:
    assert params(max_tokens=3) == params(max_completion_tokens=3) == {"max_new_tokens": 3}


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        ({"type": "text"}, {}),
        ({"type": "json_object"}, {"json_schema": '{"type": "object"}'}),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string"}}},
            {"json_schema": '{"type":"string"}'},
        ),
    ],
)
def test_response_formats(response_format: Any, expected: dict[str, str]) -> None:
    assert params(response_format=response_format) == {"max_new_tokens": None, **expected}


def test_sglang_takes_the_parameters() -> None:
    sampling = pytest.importorskip("sglang.srt.sampling.sampling_params")
    sent = params(max_tokens=4, stop=["a"], stop_token_ids=[1], seed=3, logit_bias={"1": 0.5})
    taken = sampling.SamplingParams(**sent)
    taken.verify(vocab_size=100)
    assert (taken.max_new_tokens, taken.stop_strs, taken.sampling_seed) == (4, ["a"], 3)
