"""What a caller's iterable may yield, turned into what the HTTP API takes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

DocumentBody = str | dict[str, str]


@dataclass(frozen=True)
class Texts:
    """Texts (taken verbatim) and documents (`{"text", "id"?}`), as the API takes them."""

    items: list[DocumentBody]


@dataclass(frozen=True)
class Ids:
    """Token ids."""

    ids: list[int]


Piece = Texts | Ids


def parse_chunk(item: Any, number: int) -> Piece:
    """Item `number` (from 1) of an append stream: one text, one document or some token ids.

    Raises TypeError for anything else, ValueError for a text that is not valid Unicode.
    """
    document = _document(item, number)
    if document is not None:
        return Texts([document])
    if isinstance(item, Iterable) and not isinstance(item, (bytes, bytearray, Mapping)):
        with suppress(TypeError):
            return Ids(int_list(item))
    raise TypeError(
        f"item {number} is {_describe(item)}: a chunk is a text, a mapping with 'text', an object "
        "with page_content, or a sequence of token ids"
    )


def parse_context(item: Any, number: int) -> Piece:
    """Item `number` (from 1) of an update stream: all documents, or the ids of the whole context.

    Raises TypeError for anything else, ValueError for a text that is not valid Unicode.
    """
    if isinstance(item, Iterable) and not isinstance(item, (str, bytes, bytearray, Mapping)):
        parts = list(item)
        documents = [d for part in parts if (d := _document(part, number)) is not None]
        if len(documents) == len(parts):
            return Texts(documents)
        with suppress(TypeError):
            return Ids(int_list(parts))
    raise TypeError(
        f"item {number} is {_describe(item)}: in update mode each item is the whole list of "
        "documents (texts, mappings with 'text', objects with page_content) or of token ids"
    )


def int_list(ids: Iterable[Any]) -> list[int]:
    """Token ids as plain ints; NumPy's and those of an array are taken too. Raises TypeError."""
    parts = list(ids)
    if any(isinstance(part, bool) for part in parts):
        raise TypeError("True and False are no token ids")
    return [operator.index(part) for part in parts]


def _document(item: Any, number: int) -> DocumentBody | None:
    """The document that `item` is, or None."""
    if isinstance(item, str):
        return _checked(item, number)
    if isinstance(item, Mapping):
        text, name = item.get("text"), item.get("id")
    else:
        text, name = getattr(item, "page_content", None), getattr(item, "id", None)
    if not isinstance(text, str):
        return None
    body = {"text": _checked(text, number)}
    return body if name is None else {"id": str(name), **body}


def _checked(text: str, number: int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"item {number} is not valid Unicode at character {e.start}: decode it with "
            "errors='replace'"
        ) from e
    return text


def _describe(item: Any) -> str:
    """The kind of a bad item and, for a container, of what is in it."""
    kind = type(item).__name__
    if isinstance(item, (list, tuple)):
        inner = sorted({type(part).__name__ for part in item})
        return f"a {kind} of {' and '.join(inner)}" if inner else f"an empty {kind}"
    return f"of type {kind}"
