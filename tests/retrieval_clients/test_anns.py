from __future__ import annotations

import asyncio
import threading
from itertools import pairwise
from typing import Any

import anyio
import numpy as np
import pytest

from retrieval_clients.anns import (
    Hit,
    IndexKind,
    PassageIndex,
    SearchSettings,
    TopK,
    Vectors,
    build_index,
    progressive_search,
)
from retrieval_clients.passages import Passage
from sglang_stream.errors import InvalidRequest
from sglang_stream.sdk.items import Texts, parse_context

KINDS: tuple[IndexKind, ...] = ("ivf", "hnsw")
TO_THE_END = SearchSettings(k=8, stable_steps=None, with_recall=True)


def unit_vectors(count: int, seed: int = 0) -> Vectors:
    vectors = np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS = unit_vectors(3000)
PASSAGES = [Passage("p==1", f"m.f{i}", 0, f"Text {i}.") for i in range(len(VECTORS))]
QUERIES = unit_vectors(20, seed=1)


@pytest.fixture(scope="module", params=KINDS)
def index(request: pytest.FixtureRequest) -> PassageIndex:
    return build_index(VECTORS, PASSAGES, request.param)


def all_lists(index: PassageIndex, query: Vectors, settings: SearchSettings) -> list[TopK]:
    async def run() -> list[TopK]:
        return [found async for found in progressive_search(index, query, settings)]

    return asyncio.run(run())


def test_each_list_differs_from_the_one_before_and_the_last_is_nearly_exact(
    index: PassageIndex,
) -> None:
    lengths, last = [], []
    for query in QUERIES:
        lists = all_lists(index, query, TO_THE_END)
        assert all([h.id for h in a] != [h.id for h in b] for a, b in pairwise(lists))
        assert all(a.step < b.step and a.effort < b.effort for a, b in pairwise(lists))
        assert all(a.at_s < b.at_s for a, b in pairwise(lists))
        lengths.append(len(lists))
        last.append(lists[-1].recall or 0.0)
    assert max(lengths) > 1
    assert min(last) >= 0.9


def test_recall_never_falls_in_an_inverted_file_and_ends_at_one() -> None:
    index = build_index(VECTORS, PASSAGES, "ivf")
    for query in QUERIES:
        recalls = [found.recall or 0.0 for found in all_lists(index, query, TO_THE_END)]
        assert recalls == sorted(recalls)
        assert recalls[-1] == 1.0


def test_the_exact_search_is_the_nearest_by_inner_product(index: PassageIndex) -> None:
    scores = VECTORS @ QUERIES[0]
    nearest = np.argsort(-scores)[:5]
    hits = index.search_exactly(QUERIES[0], 5)
    assert [hit.id for hit in hits] == [PASSAGES[i].id for i in nearest]
    assert [hit.score for hit in hits] == pytest.approx(scores[nearest].tolist(), abs=1e-5)


def test_efforts_grow_to_the_last_one(index: PassageIndex) -> None:
    efforts = list(index.efforts(SearchSettings(k=8, growth=1.2, max_effort=40)))
    assert efforts == sorted(set(efforts))
    assert efforts[0] == (1 if index.kind == "ivf" else 8)
    assert efforts[-1] == 40


def test_an_effort_below_the_first_one_is_kept_to(index: PassageIndex) -> None:
    assert list(index.efforts(SearchSettings(k=8, max_effort=1))) == [1]


class Scripted(PassageIndex):
    """An index whose lists are written down; each step may wait for `release`."""

    def __init__(self, lists: str, *, blocked: bool = False) -> None:
        super().__init__(None, (), "ivf")
        self._lists = lists.split()
        self.entered = threading.Semaphore(0)
        self.release = threading.Event()
        self.running = 0
        if not blocked:
            self.release.set()

    def efforts(self, settings: SearchSettings) -> Any:
        return iter(range(1, len(self._lists) + 1))

    def search(self, vector: Vectors, k: int, effort: int) -> tuple[Hit, ...]:
        self.running += 1
        self.entered.release()
        self.release.wait()
        self.running -= 1
        return tuple(Hit(name, name, 1.0) for name in self._lists[effort - 1])


def run_to_end(index: Scripted, settings: SearchSettings) -> tuple[str, int, bool]:
    """The lists yielded, the steps done, and whether the list was taken for stable."""

    async def run() -> tuple[str, int, bool]:
        search = progressive_search(index, QUERIES[0], settings)
        lists = ["".join(hit.id for hit in found) async for found in search]
        return " ".join(lists), search.steps, search.is_stable

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("stable_steps", "expected"),
    [
        (1, ("ab", 2, True)),
        (2, ("ab ba ab", 6, True)),
        (3, ("ab ba ab ac", 7, False)),
        (None, ("ab ba ab ac", 7, False)),
    ],
)
def test_a_search_ends_once_its_list_has_stood(
    stable_steps: int | None, expected: tuple[str, int, bool]
) -> None:
    index = Scripted("ab ab ba ab ab ab ac")
    assert run_to_end(index, SearchSettings(stable_steps=stable_steps)) == expected


def test_a_cancelled_search_leaves_nothing_running() -> None:
    index = Scripted("ab ba", blocked=True)

    async def run() -> bool:
        async def first() -> TopK:
            return await anext(aiter(progressive_search(index, QUERIES[0])))

        task = asyncio.create_task(first())
        await asyncio.to_thread(index.entered.acquire)
        task.cancel()
        await asyncio.sleep(0)
        waits_for_its_thread = not task.done()
        index.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return waits_for_its_thread

    assert asyncio.run(run())
    assert index.running == 0
    assert not index.entered.acquire(blocking=False)


def test_a_search_that_is_left_ends_there() -> None:
    index = Scripted("ab ba ab")

    async def run() -> int:
        async with progressive_search(index, QUERIES[0]) as search:
            async for _ in search:
                break
        assert [found async for found in search] == []
        return search.steps

    assert asyncio.run(run()) == 1


def test_a_step_lasts_as_long_as_it_is_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def note(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(anyio, "sleep", note)
    run_to_end(Scripted("ab ba ab"), SearchSettings(step_s=60.0))
    assert len(slept) == 3
    assert all(50 < seconds <= 60 for seconds in slept)


def test_a_list_is_an_item_of_an_update_stream() -> None:
    hits = (Hit("a", "Text of a.", 0.9), Hit("b", "Text of b.", 0.8))
    found = TopK(hits, 0.1, 1, 1, None)
    expected = [{"id": "a", "text": "Text of a."}, {"id": "b", "text": "Text of b."}]
    assert parse_context(found, 1) == Texts(list(expected))
    assert (len(found), found[1], found[:1]) == (2, hits[1], hits[:1])


def test_vectors_must_fit_the_documents() -> None:
    with pytest.raises(InvalidRequest, match=r"3000 documents and vectors of shape \(2, 16\)"):
        build_index(VECTORS[:2], PASSAGES)


@pytest.mark.parametrize("bad", [{"k": 0}, {"growth": 1.0}, {"step_s": -1.0}, {"stable_steps": 0}])
def test_settings_without_a_meaning_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        SearchSettings(**bad)
