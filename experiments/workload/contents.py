"""What the pieces of a query say: the token ids that are really sent.

The same document has the same ids wherever it stands, since its identity tells them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from experiments.workload.shapes import Document, Query
from retrieval_clients.traces import Trace

Tokenize = Callable[[str], list[int]]

VOCABULARY = range(300, 8000)  # ordinary tokens of every model


class Contents(Protocol):
    """The ids of what a query consists of, each as many as the query says."""

    def opening(self, query: Query) -> list[int]: ...

    def document(self, document: Document) -> list[int]: ...

    def question(self, query: Query) -> list[int]: ...


@dataclass(frozen=True)
class RandomContents:
    """Random ids of `VOCABULARY`, the same for the same `seed` and identity. Openings are each
    query's own, so that no two queries share a prefix."""

    seed: int

    def opening(self, query: Query) -> list[int]:
        return self._ids(f"opening/{query.query_id}", query.opening_tokens)

    def document(self, document: Document) -> list[int]:
        return self._ids(f"document/{document.id}", document.tokens)

    def question(self, query: Query) -> list[int]:
        return self._ids(f"question/{query.query_id}", query.question_tokens)

    def _ids(self, name: str, count: int) -> list[int]:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
        places = rng.integers(len(VOCABULARY), size=count)
        return [VOCABULARY[place] for place in places.tolist()]


class TextContents:
    """The texts of traces. A scaled-down query has the beginnings of its texts. There is no
    opening: one common to all queries would be found in the cache.

    Each text is tokenised once, here: while a load is measured there is no time for it.
    """

    def __init__(self, traces: Iterable[Trace], tokenize: Tokenize) -> None:
        self._ids: dict[str, NDArray[np.int32]] = {}
        self._questions: dict[str, str] = {}
        for trace in traces:
            self._questions[trace.query_id] = identity(trace.query)
            texts = [document.text for step in trace.steps for document in step.documents]
            for text in (trace.query, *texts):
                name = identity(text)
                if name not in self._ids:
                    self._ids[name] = np.array(tokenize(text), np.int32)

    def count(self, text: str) -> int:
        """The tokens of a text of the traces."""
        return len(self._ids[identity(text)])

    def opening(self, query: Query) -> list[int]:
        return []

    def document(self, document: Document) -> list[int]:
        return self._beginning(document.id, document.tokens)

    def question(self, query: Query) -> list[int]:
        return self._beginning(self._questions[query.query_id], query.question_tokens)

    def _beginning(self, name: str, tokens: int) -> list[int]:
        ids: list[int] = self._ids[name][:tokens].tolist()
        return ids


def identity(text: str) -> str:
    """What a text is known by in shapes: traces may have two texts under one id, and one text
    under two."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
