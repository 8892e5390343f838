from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from retrieval_clients import embeddings
from retrieval_clients.embeddings import TfidfEmbedder, embed_corpus
from sglang_stream.errors import InvalidRequest

TEXTS = [
    "Reads rows from a table on disk.",
    "Writes rows to a table on disk.",
    "Multiplies two matrices of floats.",
    "Inverts a square matrix of floats.",
    "Sends a request and reads the reply.",
    "Waits for a reply to the request sent.",
]


def test_vectors_have_length_one_and_near_texts_are_near(tmp_path: Path) -> None:
    embedder, vectors = embed_corpus(TEXTS, tmp_path)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)))
    query = embedder.embed(["rows of a table"])[0]
    assert {int(i) for i in np.argsort(-(vectors @ query))[:2]} == {0, 1}


def test_a_text_without_a_known_word_has_no_direction(tmp_path: Path) -> None:
    embedder, _ = embed_corpus(TEXTS, tmp_path)
    assert not embedder.embed(["xyzzy"]).any()


def test_a_corpus_is_fitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder, vectors = embed_corpus(TEXTS, tmp_path)
    monkeypatch.setattr(TfidfEmbedder, "fit", lambda *_: pytest.fail("fitted again"))
    again, kept = embed_corpus(TEXTS, tmp_path)
    assert (kept == vectors).all()
    query = ["matrices of floats"]
    assert again.embed(query).tolist() == embedder.embed(query).tolist()


def test_other_texts_are_another_corpus(tmp_path: Path) -> None:
    embed_corpus(TEXTS, tmp_path)
    _, vectors = embed_corpus([*TEXTS, "Reads a reply from a table."], tmp_path)
    assert len(vectors) == len(TEXTS) + 1


def test_texts_that_share_no_words_cannot_be_embedded(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="too few to embed"):
        embed_corpus(["alpha", "beta"], tmp_path)


def test_without_the_extra_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"sglang-stream\[ann\]"):
        embed_corpus(TEXTS, tmp_path)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"sglang-stream\[embeddings\]"):
        embed_corpus(TEXTS, tmp_path, model_path=tmp_path)


def test_a_model_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no such folder"):
        embed_corpus(TEXTS, tmp_path, model_path=tmp_path / "none")


class FakeModel:
    """Letters counted; `calls` of all instances."""

    calls = 0

    def __init__(self, path: str, *, local_files_only: bool) -> None:
        assert local_files_only

    def encode(self, texts: Sequence[str], **_: Any) -> list[list[float]]:
        type(self).calls += 1
        return [[text.count("a"), text.count("e")] for text in texts]


def test_a_models_vectors_are_kept_until_its_files_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = FakeModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    monkeypatch.setattr(FakeModel, "calls", 0)
    weights = tmp_path / "model" / "weights"
    weights.parent.mkdir()
    weights.write_text("1")
    for expected in (1, 1):
        _, vectors = embed_corpus(TEXTS, tmp_path / "cache", model_path=weights.parent)
        assert FakeModel.calls == expected
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)))
    os.utime(weights, ns=(1, 1))
    embed_corpus(TEXTS, tmp_path / "cache", model_path=weights.parent)
    assert FakeModel.calls == 2


def test_lengths_are_part_of_a_digest() -> None:
    assert embeddings._digest(["ab", "c"]) != embeddings._digest(["a", "bc"])
