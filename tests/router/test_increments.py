"""Answers cut at any event and continued, against the same answers uncut.

The worker of these tests says one byte per token and decodes as SGLang does: it keeps the bytes of
a character that is not complete to itself, and what a new request's prompt ends with is no part of
its answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.events import MetaInfo, WorkerEvent
from router.increments import Increments
from sglang_stream.errors import EngineFailure

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 999}
_LOOK_BACK = 5


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def is_whole(ids: list[int]) -> bool:
    return not decode(ids[-8:]).endswith("\ufffd")


@dataclass(frozen=True)
class Speaker:
    """Says `whole`, from a given token on. `stride`: tokens of one event; `stop`: a text that ends
    the answer and is cut off."""

    whole: list[int]
    incremental: bool = False
    stride: int = 1
    stop: str | None = None

    def events(self, kept: int, limit: int) -> Iterator[WorkerEvent]:
        tail = self.whole[max(0, kept - _LOOK_BACK) : kept]
        ids = self.whole[kept : kept + limit]
        said, sent, told = "", 0, 0
        surrounding, read = 0, len(tail)
        for count in range(1, len(ids) + 1):
            all_ids = tail + ids[:count]
            new = decode(all_ids[surrounding:])[len(decode(all_ids[surrounding:read])) :]
            if new and not new.endswith("\ufffd"):
                said += new
                surrounding, read = read, len(all_ids)
                text = said
            else:
                text = said + new[: new.rfind(" ") + 1]
            at = said.find(self.stop) if self.stop else -1
            last = count == len(ids) or at >= 0
            if last:
                text = said[:at] if at >= 0 else said + (new if text != said else "")
            if count % self.stride and not last:
                continue
            reason = {"type": "stop"} if last else None
            first = told if self.incremental else 0
            yield WorkerEvent(
                text[sent:] if self.incremental else text,
                msgspec.Raw(msgspec.json.encode(ids[first:count])),
                MetaInfo(reason, completion_tokens=count),
            )
            sent, told = max(sent, len(text)), count
            if last:
                return


def answered(
    speaker: Speaker, cuts: list[int], params: dict[str, Any], with_ids: bool = True
) -> tuple[str, list[int]]:
    """Text and ids that reach the client when the n-th attempt ends after `cuts[n]` events."""
    increments = Increments(speaker.incremental, with_ids)
    text, ids = "", list[int]()
    now = params
    for cut in [*cuts, None]:
        for i, event in enumerate(speaker.events(len(increments.kept), now["max_new_tokens"])):
            if i == cut:
                break
            piece = increments.take(event)
            text, ids = text + piece.text, ids + piece.ids
            if event.meta_info.finish_reason is not None:
                return text, ids
        now = increments.resume(params, is_whole)
        assert now["max_new_tokens"] == params["max_new_tokens"] - len(increments.kept)
    raise AssertionError("the last attempt is not cut")


texts = st.text("ab é漢😀 \n", min_size=1, max_size=30)
cuts = st.lists(st.integers(0, 40), max_size=4)


@given(texts, cuts, st.booleans(), st.integers(1, 4), st.booleans())
def test_an_answer_is_the_same_however_often_it_is_cut(
    text: str, cut: list[int], incremental: bool, stride: int, with_ids: bool
) -> None:
    speaker = Speaker(list(text.encode()), incremental, stride)
    expected = text, list(text.encode()) if with_ids else []
    assert answered(speaker, [], GREEDY, with_ids) == expected
    assert answered(speaker, cut, GREEDY, with_ids) == expected


@given(st.text("abST", max_size=20), st.text("abST", max_size=9), cuts, st.booleans())
def test_a_stop_text_is_found_wherever_the_answer_is_cut(
    before: str, after: str, cut: list[int], incremental: bool
) -> None:
    speaker = Speaker(list(f"{before}STOP{after}".encode()), incremental, stop="STOP")
    for stop in ("STOP", ["x", "STOP"]):
        params = GREEDY | {"stop": stop}
        assert answered(speaker, cut, params) == answered(speaker, [], params)


@given(texts, cuts, st.integers(1, 40))
def test_the_limit_holds_for_the_whole_answer(text: str, cut: list[int], limit: int) -> None:
    speaker = Speaker(list(text.encode()))
    params = GREEDY | {"max_new_tokens": limit}
    assert answered(speaker, cut, params) == answered(speaker, [], params)
    assert len(answered(speaker, cut, params)[1]) == min(limit, len(speaker.whole))


@pytest.mark.parametrize(
    "state",
    [
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"repetition_penalty": 1.2},
        {"regex": "a+"},
        {"ebnf": "root ::= 'a'"},
        {"json_schema": "{}"},
        {"stop_regex": "a{3}"},
    ],
)
def test_what_counts_the_answer_says_it_again_from_the_start(state: dict[str, Any]) -> None:
    speaker = Speaker(list(b"abcdef"))
    assert answered(speaker, [3, 5], GREEDY | state) == ("abcdef", list(b"abcdef"))
    increments = Increments(incremental=False, with_ids=False)
    increments.take(next(speaker.events(0, 9)))
    assert increments.resume(GREEDY | state, is_whole) == GREEDY | state
    assert increments.kept == []
    with pytest.raises(EngineFailure, match="ask again"):
        increments.resume({"max_new_tokens": 9, "temperature": 1.0} | state, is_whole)


def test_neutral_penalties_count_nothing() -> None:
    increments = Increments(incremental=False, with_ids=False)
    increments.take(next(Speaker(list(b"abc")).events(0, 9)))
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
    increments.resume(GREEDY | neutral, is_whole)
    assert increments.kept == [ord("a")]


def after(text: str, tokens: int, *, with_ids: bool = False) -> Increments:
    """One that has taken the first `tokens` of an answer."""
    increments = Increments(incremental=True, with_ids=with_ids)
    for i, event in enumerate(Speaker(list(text.encode()), incremental=True).events(0, 999)):
        if i < tokens:
            increments.take(event)
    return increments


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"temperature": 1, "top_k": 50}])
def test_sampling_goes_on_where_nothing_need_be_said_again(params: dict[str, Any]) -> None:
    increments = after("aé", 1)
    increments.resume(params, is_whole)
    assert increments.kept == [ord("a")]


def test_sampling_in_the_middle_of_a_character() -> None:
    params = {"temperature": 1}
    hidden = after("aé", 2)
    hidden.resume(params, is_whole)
    assert hidden.kept == [ord("a")], "nobody has seen the half"
    with pytest.raises(EngineFailure):
        after("aé", 2, with_ids=True).resume(params, is_whole)
    # The worker says the space, which is complete, but not the token that it came with.
    with pytest.raises(EngineFailure):
        after("a", 1).resume(params | {"stop": "xy"}, is_whole)


def test_one_token_is_left_to_end_with() -> None:
    increments = after("abc", 2)
    now = increments.resume(GREEDY | {"max_new_tokens": 2, "min_new_tokens": 2}, is_whole)
    assert increments.kept == [ord("a")]
    assert (now["max_new_tokens"], now["min_new_tokens"]) == (1, 1)
    assert GREEDY["max_new_tokens"] == 999


def test_a_limit_that_was_not_given_stays_so() -> None:
    assert after("abc", 2).resume({"temperature": 0, "max_new_tokens": None}, is_whole) == {
        "temperature": 0,
        "max_new_tokens": None,
    }
