from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from sglang_stream.sdk.items import Ids, Texts, parse_chunk, parse_context


@dataclass
class Page:
    """As LangChain's documents look."""

    page_content: str
    id: str | None = None


@pytest.mark.parametrize(
    ("item", "piece"),
    [
        ("text", Texts(["text"])),
        ("", Texts([""])),
        ({"text": "t"}, Texts([{"text": "t"}])),
        ({"text": "t", "id": 7, "url": "u"}, Texts([{"text": "t", "id": "7"}])),
        (Page("p"), Texts([{"text": "p"}])),
        (Page("p", "x"), Texts([{"text": "p", "id": "x"}])),
        ([1, 2], Ids([1, 2])),
        (range(3), Ids([0, 1, 2])),
        (array("i", [5]), Ids([5])),
        (np.array([1, 2], dtype=np.int64), Ids([1, 2])),
        ([], Ids([])),
    ],
)
def test_chunks(item: Any, piece: Any) -> None:
    parsed = parse_chunk(item, 1)
    assert parsed == piece
    if isinstance(parsed, Ids):
        assert all(type(i) is int for i in parsed.ids)


@pytest.mark.parametrize(
    ("item", "piece"),
    [
        (["a", {"text": "b"}, Page("c")], Texts(["a", {"text": "b"}, {"text": "c"}])),
        (iter(["a"]), Texts(["a"])),
        ([], Texts([])),
        ([3, 4], Ids([3, 4])),
        (np.array([3, 4]), Ids([3, 4])),
    ],
)
def test_contexts(item: Any, piece: Any) -> None:
    assert parse_context(item, 1) == piece


@pytest.mark.parametrize(
    "item", [None, 1, 1.5, b"x", {"texts": "t"}, {"text": None}, [True], ["a"], [1.0], np.zeros(2)]
)
def test_bad_chunks(item: Any) -> None:
    with pytest.raises(TypeError, match="item 4 is "):
        parse_chunk(item, 4)


@pytest.mark.parametrize("item", [None, "text", {"text": "t"}, ["a", 1], [None], [["a"]], b"x"])
def test_bad_contexts(item: Any) -> None:
    with pytest.raises(TypeError, match=r"item 4 is .*in update mode"):
        parse_context(item, 4)


def test_half_a_character_is_named() -> None:
    with pytest.raises(ValueError, match="item 3 is not valid Unicode at character 1"):
        parse_chunk("a\ud800", 3)
    with pytest.raises(ValueError, match="item 3"):
        parse_context([{"text": "\udc00"}], 3)
