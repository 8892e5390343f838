"""Requests whose context arrives over time, in the one form that the runner replays and the
simulator computes.

    opened            steps[0]        steps[1]              steps[-1]        question
    |--- at_s[0] ---->|               |                     |--- (known) --->|

A document is an identity and a length: equal identities are equal tokens, so an update's common
prefix can be told without any text. Texts are found by identity when a request is really sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from sglang_stream.messages import Mode


class Document(NamedTuple):
    """A piece of context of so many tokens."""

    id: str
    tokens: int


class Step(NamedTuple):
    """What has arrived `at_s` seconds after the request began: documents to append or, in update
    mode, the whole list."""

    at_s: float
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class Query:
    """One request without its arrival. `opening_tokens` stand before the context,
    `question_tokens` after it; at least one step, in the order of time."""

    query_id: str
    mode: Mode
    steps: tuple[Step, ...]
    opening_tokens: int = 0
    question_tokens: int = 0

    @property
    def last_chunk_s(self) -> float:
        """When the last step arrives, after the request began."""
        return self.steps[-1].at_s

    @property
    def prompt_tokens(self) -> int:
        """Of the final prompt."""
        return self.opening_tokens + self.context_tokens(len(self.steps)) + self.question_tokens

    def context(self, steps: int) -> tuple[Document, ...]:
        """The documents after so many steps."""
        if self.mode == "update":
            return self.steps[steps - 1].documents if steps else ()
        return tuple(d for step in self.steps[:steps] for d in step.documents)

    def context_tokens(self, steps: int) -> int:
        """Tokens of the documents after so many steps."""
        return sum(d.tokens for d in self.context(steps))


class Arrived(NamedTuple):
    """A request of a load: `query` begins `at_s` seconds after the load."""

    at_s: float
    query: Query


def common_tokens(before: tuple[Document, ...], after: tuple[Document, ...]) -> int:
    """The tokens of the documents that two lists begin with alike."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
    return sum(document.tokens for document, _ in same)
