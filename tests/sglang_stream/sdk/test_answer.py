from __future__ import annotations

from typing import Any

import pytest

from sglang_stream.errors import EngineFailure, WorkerUnavailable
from sglang_stream.sdk.answer import Answer


def chunk(choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"id": "c", "object": "chat.completion.chunk", "choices": choices, **more}


def test_everything_a_chat_answer_holds_is_put_together() -> None:
    answer = Answer()
    assert answer.add(chunk([])) == ""
    assert not answer.has_token
    first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    assert answer.add(chunk([first], prompt_token_ids=[1, 2])) == ""
    assert answer.has_token
    thought = {"index": 0, "delta": {"reasoning_content": "hm", "content": None}}
    assert answer.add(chunk([thought])) == ""
    for text, token in (("a", 5), ("b", 6)):
        part = {"index": 0, "delta": {"content": text}, "token_ids": [token]}
        part["logprobs"] = {"content": [{"token": text}]}
        assert answer.add(chunk([part])) == text
    assert answer.add(chunk([{"index": 1, "delta": {"content": "other"}}])) == ""
    answer.add(chunk([{"index": 0, "delta": {}, "finish_reason": "length"}]))
    assert answer.usage is None
    answer.add(chunk([], usage={"prompt_tokens": 2, "new_field": {}}))

    completion = answer.completion()
    assert completion["object"] == "chat.completion"
    assert completion["prompt_token_ids"] == [1, 2]
    assert completion["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "ab", "reasoning_content": "hm"},
        "token_ids": [5, 6],
        "logprobs": {"content": [{"token": "a"}, {"token": "b"}]},
        "finish_reason": "length",
    }
    assert completion["choices"][1]["message"]["content"] == "other"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2


def test_errors_are_raised_by_their_code() -> None:
    with pytest.raises(WorkerUnavailable, match="gone"):
        Answer().add({"error": {"code": "worker_unavailable", "message": "gone"}})
    with pytest.raises(EngineFailure, match="odd"):
        Answer().add({"error": {"message": "odd"}})
