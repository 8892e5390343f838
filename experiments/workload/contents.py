"""What the pieces of a query say: the token ids that are really sent.

The same document has the same ids wherever it stands, since its identity tells them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from experiments.workload.shapes import Document, Query
from retrieval_clients.traces import Trace, TraceDocument

Tokenize = Callable[[str], list[int]]


class Contents(Protocol):
    """The ids of what a query consists of, each as many as the query says."""

    def opening(self, query: Query) -> list[int]: ...

    def document(self, document: Document) -> list[int]: ...

    def question(self, query: Query) -> list[int]: ...


@dataclass(frozen=True)
class RandomContents:
    """Random ids of a vocabulary, the same for the same `seed` and identity. Openings are each
    query's own, so that no two queries share a prefix."""

    seed: int
    vocabulary: range

    def opening(self, query: Query) -> list[int]:
        return self._ids(f"opening/{query.query_id}", query.opening_tokens)

    def document(self, document: Document) -> list[int]:
        return self._ids(f"document/{document.id}", document.tokens)

    def question(self, query: Query) -> list[int]:
        return self._ids(f"question/{query.query_id}", query.question_tokens)

    def _ids(self, name: str, count: int) -> list[int]:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
        places = rng.integers(len(self.vocabulary), size=count)
        return [self.vocabulary[place] for place in places.tolist()]


class TextContents:
    """The texts of traces. A scaled-down query has the beginnings of its texts. There is no
    opening: one common to all queries would be found in the cache."""

    def __init__(self, traces: Iterable[Trace], tokenize: Tokenize) -> None:
        self._tokenize = tokenize
        self._texts: dict[str, str] = {}
        self._questions: dict[str, str] = {}
        for trace in traces:
            self._questions[trace.query_id] = trace.query
            for step in trace.steps:
                self._texts.update((identity(d), d.text) for d in step.documents)

    def opening(self, query: Query) -> list[int]:
        return []

    def document(self, document: Document) -> list[int]:
        return self._tokenize(self._texts[document.id])[: document.tokens]

    def question(self, query: Query) -> list[int]:
        return self._tokenize(self._questions[query.query_id])[: query.question_tokens]


def identity(document: TraceDocument) -> str:
    """What a document is known by in shapes: its content, since traces may have two texts under
    one id, and one text under two."""
    return hashlib.sha256(document.text.encode(errors="surrogatepass")).hexdigest()[:16]
