from __future__ import annotations

import itertools
from array import array
from typing import Any

import pytest

from router.auth import Caller
from router.schemas import DocumentBody
from router.streams import Stream, Streams
from sglang_stream.errors import LimitReached, StreamNotFound
from sglang_stream.messages import Accepted
from sglang_stream.prompt import Opening

ANYBODY = Caller(None, b"", None, admin=False)
_numbers = itertools.count()


def stream(**fields: Any) -> Stream:
    return Stream(
        **{
            "id": f"st-{next(_numbers)}",
            "mode": "append",
            "model": "m",
            "worker": None,
            "opening": Opening(array("i", [1, 2]), "", "ids"),
            "order": "relevance",
            "idle_timeout_s": 10.0,
            "tokens": 2,
            **fields,
        }
    )


def test_the_prompt_of_an_append_stream() -> None:
    s = stream()
    s.accepted(1, array("i", [3]), Accepted(1, 3))
    s.accepted(2, array("i", [4, 5]), Accepted(2, 5))
    s.accepted(1, array("i", [3]), Accepted(1, 5))
    assert (s.seq, s.tokens) == (2, 5)
    assert s.context() == array("i", [1, 2, 3, 4, 5])
    assert s.prompt() is None
    s.tail = array("i", [6])
    assert s.prompt() == [1, 2, 3, 4, 5, 6]


def test_a_prompt_that_is_not_all_known_here() -> None:
    s = stream()
    # The answer to call 1 was lost: the worker has 10 tokens of it.
    s.accepted(2, array("i", [4]), Accepted(2, 13))
    assert s.tokens == 13
    assert (s.context(), s.known_seq) == (None, 0)


def test_the_prompt_of_an_update_stream() -> None:
    s = stream(mode="update")
    s.accepted(3, array("i", [7]), Accepted(3, 3))
    s.accepted(2, array("i", [8, 9]), Accepted(2, 3))
    assert (s.context(), s.known_seq) == (array("i", [1, 2, 7]), 3)


def test_a_document_is_known_by_its_id_or_its_text() -> None:
    s = stream(mode="update", order="sticky")
    first = s.place(1, ["a", DocumentBody(id="a", text="A"), "b", "b"])
    assert first.texts == ["a", "A", "b", "b"]
    s.accepted(1, array("i"), Accepted(1, 2), first)
    second = s.place(2, ["c", "b", DocumentBody(id="a", text="new"), "a"])
    assert second.texts == ["a", "new", "b", "c"]
    # Not accepted yet: the next one stands on what the worker has.
    assert s.place(3, ["c", "b"]).texts == ["b", "c"]
    s.accepted(2, array("i"), Accepted(2, 2), second)
    assert s.place(3, ["x", "c", "a"]).texts == ["a", "c", "x"]
    assert s.place(1, ["a", DocumentBody(id="a", text="A"), "b", "b"]).texts == first.texts


def test_the_limit_counts_open_streams_only() -> None:
    streams = Streams(1, 1000)
    first = stream()
    streams.check_room()
    streams.add(first)
    with pytest.raises(LimitReached):
        streams.check_room()
    first.state = "sealed"
    streams.check_room()
    streams.add(stream())
    assert streams.open_count() == 1
    assert streams.find(first.id, ANYBODY) is first
    with pytest.raises(StreamNotFound, match=first.id):
        streams.find(first.id, Caller("a", b"another", None, admin=False))
    streams.forget(first)
    assert streams.find(first.id, ANYBODY) is None


def test_the_copies_are_bounded() -> None:
    streams = Streams(9, 1000)
    streams.add(stream(tokens=251))
    with pytest.raises(LimitReached, match="stream-buffer-gb"):
        streams.check_room()


def test_who_is_idle() -> None:
    streams = Streams(9, 1000)
    old, young = stream(touched_s=0.0), stream(touched_s=8.0)
    streams.add(old)
    streams.add(young)
    assert streams.idle(now_s=10.5) == []
    assert streams.idle(now_s=12.0) == [old]
