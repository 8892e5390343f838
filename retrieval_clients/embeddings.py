"""Texts as vectors to search by: from a local sentence-transformers model, or without any model.

    embedder, vectors = embed_corpus(texts, cache_folder)                       # TF-IDF and SVD
    embedder, vectors = embed_corpus(texts, cache_folder, model_path="./bge")   # extra `embeddings`
    query = embedder.embed(["How do I ...?"])[0]

Vectors have length 1, so that their inner product is the cosine. A corpus is embedded once; the
vectors are kept in the cache folder under a digest of the texts and of what embedded them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retrieval_clients.anns import Vectors, require_ann_extra
from retrieval_clients.passages import write_whole
from sglang_stream.errors import InvalidRequest

DIMENSIONS = 128
_MAX_TERMS = 30_000
_SEED = 0


class Embedder(Protocol):
    """Turns texts into vectors of length 1 (0 for a text without a known word), float32."""

    def embed(self, texts: Sequence[str]) -> Vectors: ...


def embed_corpus(
    texts: Sequence[str], cache: Path, model_path: Path | None = None
) -> tuple[Embedder, Vectors]:
    """An embedder and the vectors of `texts`, of shape (texts, dimensions).

    Without `model_path` the embedder is fitted to the texts. Raises ImportError without the extra
    `ann` (`embeddings` with a model), InvalidRequest if the model is not there.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if model_path is None:
        return _tfidf_corpus(texts, cache)
    embedder = SentenceEmbedder(model_path)
    path = cache / f"embeddings-{_digest([*_model_files(model_path), *texts])}.npy"
    if path.exists():
        return embedder, np.load(path)
    vectors = embedder.embed(texts)
    written = io.BytesIO()
    np.save(written, vectors)
    write_whole(path, written.getvalue())
    return embedder, vectors


class TfidfEmbedder:
    """TF-IDF weights projected onto the main directions of a corpus (latent semantic analysis).

    `terms`: in the order of the columns; `idf`: their weights; `directions`: of shape (dimensions,
    terms).
    """

    def __init__(self, terms: Sequence[str], idf: Vectors, directions: Vectors) -> None:
        self.terms = terms
        self.idf = idf
        self.directions = directions
        self._weights = _vectorizer(vocabulary=list(terms))
        self._weights.idf_ = idf

    @classmethod
    def fit(cls, texts: Sequence[str], dimensions: int = DIMENSIONS) -> TfidfEmbedder:
        """The embedder of a corpus; fewer dimensions where it has fewer texts or terms.

        Raises InvalidRequest if the texts have too few words in common.
        """
        require_ann_extra()
        from sklearn.decomposition import TruncatedSVD

        vectorizer = _vectorizer(max_features=_MAX_TERMS, min_df=2)
        try:
            weights = vectorizer.fit_transform(texts)
        except ValueError as e:
            raise InvalidRequest(f"{len(texts)} texts are too few to embed: {e}") from e
        rank = min(dimensions, *(side - 1 for side in weights.shape))
        if rank < 1:
            raise InvalidRequest(f"{len(texts)} texts are too few to embed: they share no words")
        svd = TruncatedSVD(rank, random_state=_SEED).fit(weights)
        return cls(
            [str(term) for term in vectorizer.get_feature_names_out()],
            vectorizer.idf_.astype(np.float32),
            svd.components_.astype(np.float32),
        )

    def embed(self, texts: Sequence[str]) -> Vectors:
        return _normalised(self._weights.transform(texts) @ self.directions.T)


class SentenceEmbedder:
    """A sentence-transformers model in a local folder; nothing is downloaded."""

    def __init__(self, model_path: Path) -> None:
        if not model_path.is_dir():
            raise InvalidRequest(
                f"{model_path}: there is no such folder; give that of a sentence-transformers model"
            )
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as e:
            raise ImportError(
                f"embedding with a model needs the package {e.name!r}: run "
                '`pip install "sglang-stream[embeddings]"`, or leave the model out',
                name=e.name,
            ) from e
        self._model: Any = SentenceTransformer(str(model_path), local_files_only=True)

    def embed(self, texts: Sequence[str]) -> Vectors:
        return _normalised(self._model.encode(list(texts), show_progress_bar=False))


def _tfidf_corpus(texts: Sequence[str], cache: Path) -> tuple[TfidfEmbedder, Vectors]:
    """Fitted, or read back: plain arrays, so that reading them cannot run anything."""
    require_ann_extra()
    settings = [metadata.version("scikit-learn"), str(DIMENSIONS), str(_MAX_TERMS)]
    path = cache / f"tfidf-{_digest([*settings, *texts])}.npz"
    if path.exists():
        with np.load(path) as kept:
            embedder = TfidfEmbedder(kept["terms"].tolist(), kept["idf"], kept["directions"])
            return embedder, kept["vectors"]
    embedder = TfidfEmbedder.fit(texts)
    vectors = embedder.embed(texts)
    written = io.BytesIO()
    np.savez(
        written,
        terms=np.array(embedder.terms),
        idf=embedder.idf,
        directions=embedder.directions,
        vectors=vectors,
    )
    write_whole(path, written.getvalue())
    return embedder, vectors


def _vectorizer(**settings: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, stop_words="english", dtype=np.float32, **settings)


def _normalised(vectors: Any) -> Vectors:
    vectors = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return result


def _model_files(folder: Path) -> list[str]:
    """Names, sizes and times of a model's files: another model at the same path is not the same."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{f.relative_to(folder)} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]
