"""A progressive nearest-neighbour search whose list a model can read while it is still refined.

    index = build_index(embedder.embed([p.text for p in passages]), passages, kind="ivf")
    lists = progressive_search(index, embedder.embed([question])[0])
    async for text in stream_chat(lists, question=question, mode="update"):
        print(text, end="")

The query is searched again and again with growing effort (faiss: nprobe of an inverted file,
efSearch of a graph), and a list is yielded whenever it differs from the one before:

    effort    1   2   4   8   16   32 ...
    list      A   A   B   C   C    C       yields A, B, C; ends once C has stood for some steps

faiss belongs to the extra `ann` and is imported when it is first needed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar, overload

import anyio
import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from sglang_stream.errors import InvalidRequest

IndexKind = Literal["ivf", "hnsw"]
Vectors = NDArray[np.float32]
T = TypeVar("T")

# faiss warns if k-means has fewer vectors a centroid, and its lists are then mostly noise.
_LEAST_VECTORS_PER_LIST = 39
_HNSW_LINKS = 16
_HNSW_EF_CONSTRUCTION = 100


class Document(Protocol):
    """What an index can hold; passages are."""

    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Hit:
    """A document found; the SDK takes it by its `id` and `page_content`.

    `score`: the inner product with the query, the cosine where both are normalised.
    """

    id: str
    text: str
    score: float

    @property
    def page_content(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class TopK(Sequence[Hit]):
    """The whole list after a step, best first: one item of `stream_chat(mode="update")`.

    `at_s`: seconds from the first step's beginning until the list was there. `step`: from 1.
    `effort`: its nprobe or efSearch. `recall`: the share of the exact top-k that is in the list,
    None if it was not asked for.
    """

    hits: tuple[Hit, ...]
    at_s: float
    step: int
    effort: int
    recall: float | None

    @overload
    def __getitem__(self, at: int) -> Hit: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Hit]: ...
    def __getitem__(self, at: int | slice) -> Hit | Sequence[Hit]:
        return self.hits[at]

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How a search goes on, and when it ends.

    `k`: documents of a list. `growth`: each step's effort is so many times the one before (one
    more at least); the first is 1 for nprobe and `k` for efSearch, which faiss never takes below
    it. `max_effort`: the last step's; None is all lists of an inverted file, and 64 `k` in a graph.
    `stable_steps`: the search ends once so many steps in a row have left the list unchanged; None
    goes to the end. `step_s`: seconds that a step takes at least, for searches that are quicker
    than those they stand for. `with_recall`: search exactly first, to tell the recall of each list.
    """

    k: int = 10
    growth: float = 2.0
    max_effort: int | None = None
    stable_steps: int | None = 3
    step_s: float = 0.0
    with_recall: bool = False

    def __post_init__(self) -> None:
        if self.k < 1 or self.growth <= 1 or self.step_s < 0:
            raise InvalidRequest("a search needs k of 1 or more, growth over 1 and step_s from 0")
        if any(bound is not None and bound < 1 for bound in (self.max_effort, self.stable_steps)):
            raise InvalidRequest("max_effort and stable_steps are None, or 1 or more")


class PassageIndex:
    """Documents and the faiss index of their vectors; several threads may search it."""

    def __init__(self, index: Any, documents: Sequence[Document], kind: IndexKind) -> None:
        self.documents = documents
        self.kind = kind
        self._index = index

    def efforts(self, settings: SearchSettings) -> Iterator[int]:
        """The efforts of all steps, growing to the last one."""
        first = 1 if self.kind == "ivf" else settings.k
        full = int(self._index.nlist) if self.kind == "ivf" else max(64 * settings.k, first)
        last = min(full, settings.max_effort or full)
        effort = min(first, last)
        while effort < last:
            yield effort
            effort = max(effort + 1, round(effort * settings.growth))
        yield last

    def search(self, vector: Vectors, k: int, effort: int) -> tuple[Hit, ...]:
        """At most `k` documents, best first: fewer where the lists looked at hold fewer."""
        import faiss

        if self.kind == "ivf":
            parameters = faiss.SearchParametersIVF(nprobe=effort)
        else:
            parameters = faiss.SearchParametersHNSW(efSearch=effort)
        return self._hits(*self._index.search(vector[None], k, params=parameters))

    def search_exactly(self, vector: Vectors, k: int) -> tuple[Hit, ...]:
        """The `k` documents nearest of all."""
        import faiss

        if self.kind == "ivf":
            return self.search(vector, k, self._index.nlist)
        flat = faiss.downcast_index(self._index.storage)
        return self._hits(*flat.search(vector[None], k))

    def _hits(self, scores: NDArray[Any], rows: NDArray[Any]) -> tuple[Hit, ...]:
        """faiss fills what it did not find with -1."""
        found = (
            (self.documents[row], score)
            for row, score in zip(rows[0], scores[0], strict=True)
            if row >= 0
        )
        return tuple(Hit(document.id, document.text, float(score)) for document, score in found)


def build_index(
    vectors: Vectors, documents: Sequence[Document], kind: IndexKind = "ivf"
) -> PassageIndex:
    """An index of `documents` by inner product; row i of `vectors` is document i's, normalised.

    The same vectors give the same index: it is built by one thread, from faiss's own fixed seed.
    Takes seconds for some 20,000 vectors. Raises ImportError without the extra `ann`,
    InvalidRequest if vectors and documents do not fit together.
    """
    require_ann_extra()
    import faiss

    if not documents or vectors.ndim != 2 or len(vectors) != len(documents):
        raise InvalidRequest(
            f"an index needs a vector for each document: there are {len(documents)} documents "
            f"and vectors of shape {vectors.shape}"
        )
    size, dimensions = vectors.shape
    index: Any
    if kind == "ivf":
        # 4 sqrt(n) is what faiss's guidelines advise for less than a million vectors.
        lists = max(1, min(round(4 * size**0.5), size // _LEAST_VECTORS_PER_LIST))
        flat = faiss.IndexFlatIP(dimensions)
        index = faiss.IndexIVFFlat(flat, dimensions, lists, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexHNSWFlat(dimensions, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _HNSW_EF_CONSTRUCTION
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        index.train(vectors)
        index.add(vectors)
    finally:
        faiss.omp_set_num_threads(threads)
    return PassageIndex(index, documents, kind)


class ProgressiveSearch:
    """One search: an async iterable of its lists, and an async context manager.

    It begins with the first list asked for and can be gone through once. A step runs in a thread;
    cancelling the task that waits for it waits for its end (milliseconds), and between two lists
    nothing runs, so a search that was left leaves nothing behind.
    `steps`: those done so far. `is_stable`: whether it ended because its list had stopped changing.
    """

    def __init__(self, index: PassageIndex, vector: Vectors, settings: SearchSettings) -> None:
        self.steps = 0
        self.is_stable = False
        self._lists = self._search(index, vector, settings)

    def __aiter__(self) -> AsyncGenerator[TopK, None]:
        return self._lists

    async def __aenter__(self) -> ProgressiveSearch:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stops the search; without effect when it has ended."""
        await self._lists.aclose()

    async def _search(
        self, index: PassageIndex, vector: Vectors, settings: SearchSettings
    ) -> AsyncGenerator[TopK, None]:
        exact: tuple[Hit, ...] | None = None
        if settings.with_recall:
            exact = await _in_thread(index.search_exactly, vector, settings.k)
        began = time.monotonic()
        last_ids: list[str] | None = None
        unchanged = 0
        for step, effort in zip(count(1), index.efforts(settings), strict=False):
            step_ends = time.monotonic() + settings.step_s
            hits = await _in_thread(index.search, vector, settings.k, effort)
            await anyio.sleep(max(0.0, step_ends - time.monotonic()))
            self.steps = step
            ids = [hit.id for hit in hits]
            if ids != last_ids:
                last_ids, unchanged = ids, 0
                at_s = time.monotonic() - began
                yield TopK(hits, at_s, step, effort, None if exact is None else recall(hits, exact))
                continue
            unchanged += 1
            if unchanged == settings.stable_steps:
                self.is_stable = True
                return


def progressive_search(
    index: PassageIndex, vector: Vectors, settings: SearchSettings | None = None
) -> ProgressiveSearch:
    """The search for the documents nearest to `vector`, of shape (dimensions,)."""
    return ProgressiveSearch(index, vector, settings or SearchSettings())


def recall(found: Sequence[Hit], exact: Sequence[Hit]) -> float:
    """The share of `exact` that was found, at whatever rank; 1.0 if there is nothing to find."""
    wanted = {hit.id for hit in exact}
    return len(wanted & {hit.id for hit in found}) / len(wanted) if wanted else 1.0


async def _in_thread(function: Callable[..., T], *arguments: object) -> T:
    """What a function returns that runs in a thread; when cancelled, waits for its end first.

    anyio's own call does that for its cancel scopes, but not where a task is cancelled by asyncio.
    """
    running = asyncio.create_task(to_thread.run_sync(function, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await asyncio.wait({running})
        raise


def require_ann_extra() -> None:
    """Imports what the extra `ann` brings. Raises ImportError that says how to install it."""
    try:
        import faiss  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as e:
        raise ImportError(
            f'searching needs the package {e.name!r}: run `pip install "sglang-stream[ann]"`',
            name=e.name,
        ) from e
