"""What is searched, and what is asked: installed documentation, and sentences held out of it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retrieval_clients.anns import IndexKind, PassageIndex, Vectors, build_index
from retrieval_clients.embeddings import embed_corpus
from retrieval_clients.passages import Passage, PassageSettings, installed_passages
from sglang_stream.errors import InvalidRequest

_SENTENCE = re.compile(r"(.+?[.?!])(\s|$)", re.DOTALL)
_QUESTION_CHARS = range(40, 200)


@dataclass(frozen=True)
class Question:
    """The first sentence of a docstring that is not in the index. `id`: the docstring's."""

    id: str
    text: str
    vector: Vectors


@dataclass(frozen=True)
class Corpus:
    """An index over `index.documents`, and questions to it."""

    index: PassageIndex
    questions: tuple[Question, ...]


def build_corpus(
    cache: Path,
    passages: PassageSettings,
    kind: IndexKind,
    questions: int,
    seed: int,
    model_path: Path | None = None,
) -> Corpus:
    """Collects, embeds and indexes; minutes the first time, then seconds.

    `model_path`: of a sentence-transformers model. Raises InvalidRequest, and ImportError without
    the extra that it needs.
    """
    asked, kept = hold_out(installed_passages(cache, passages), questions, seed)
    embedder, vectors = embed_corpus([p.text for p in kept], cache, model_path)
    sentences = [sentence for _, sentence in asked]
    made = zip(asked, embedder.embed(sentences), strict=True)
    return Corpus(
        build_index(vectors, kept, kind),
        tuple(Question(passage.id, text, vector) for (passage, text), vector in made),
    )


def hold_out(
    passages: Sequence[Passage], questions: int, seed: int
) -> tuple[list[tuple[Passage, str]], list[Passage]]:
    """So many docstrings with their first sentences, and the passages of none of them.

    Raises InvalidRequest if there are not so many.
    """
    found: dict[str, Passage] = {}
    for passage in passages:
        sentence = first_sentence(passage) if passage.part == 0 else None
        if sentence is not None:
            found.setdefault(sentence, passage)
    if len(found) < questions:
        raise InvalidRequest(
            f"--questions {questions}: {len(passages):,} passages begin with {len(found):,} "
            "sentences that can be asked; ask fewer",
            param="--questions",
        )
    asked = random.Random(seed).sample(list(found.items()), questions)
    out = {(passage.package, passage.name) for _, passage in asked}
    kept = [p for p in passages if (p.package, p.name) not in out]
    return [(passage, sentence) for sentence, passage in asked], kept


def first_sentence(passage: Passage) -> str | None:
    """That of a docstring, on one line; None where it has none of a question's length."""
    match = _SENTENCE.match(passage.text)
    if match is None or "/" in passage.name or passage.name == "description":
        return None
    sentence = " ".join(match[1].split())
    return sentence if len(sentence) in _QUESTION_CHARS else None
