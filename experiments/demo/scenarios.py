"""The demo's two retrievals: pages that a crawler fetches, and a search that refines its list."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from experiments.demo.site import SitePage
from retrieval_clients import CrawlSettings, PageError, crawl
from sglang_stream.errors import StreamError

QUESTION = "Which of these modules would you use to compare two files, and how?"
SEARCH_STEP_S = 2.5
# Documents by their rank, each line what the search knows one step later: it inserts 8, then 9,
# flips back, and settles the lower ranks.
SEARCH_LISTS = (
    (0, 1, 2, 3, 4, 5, 6, 7),
    (0, 1, 8, 2, 3, 4, 5, 6),
    (0, 1, 8, 2, 3, 9, 4, 5),
    (0, 1, 8, 2, 3, 4, 5, 6),
    (0, 1, 8, 2, 3, 4, 10, 5),
    (0, 1, 8, 2, 3, 4, 10, 11),
)


Retrieve = Callable[[], AsyncIterator[Any]]


@dataclass(frozen=True)
class Scenario:
    """One retrieval that can be run again and again. `retrieve` yields chunks or whole lists;
    `last_document` is the text that only its last item brings (the first one that changes)."""

    name: Literal["append", "update"]
    title: str
    items: int
    retrieve: Retrieve
    last_document: str


def crawl_scenario(urls: Sequence[str], pages: Sequence[SitePage]) -> Scenario:
    """Crawls the local site; `urls` in the order in which their pages arrive."""

    async def retrieve() -> AsyncIterator[Any]:
        # All pages are asked for at once, and the last ones take their time on purpose.
        settings = CrawlSettings(concurrency=len(urls), timeout_s=120, read_timeout_s=120)
        async with crawl(urls, settings) as crawled:
            async for item in crawled.items():
                if isinstance(item, PageError):
                    raise StreamError(f"{item.url} was not fetched: {item.reason}, {item.detail}")
                yield item

    title = f"append: {len(urls)} pages from a crawler"
    return Scenario("append", title, len(urls), retrieve, pages[-1].text)


def search_scenario(pages: Sequence[SitePage]) -> Scenario:
    """A search over the same texts whose list changes every `SEARCH_STEP_S` seconds."""

    async def retrieve() -> AsyncIterator[Any]:
        for step, ranks in enumerate(SEARCH_LISTS):
            if step:
                await asyncio.sleep(SEARCH_STEP_S)
            yield [{"id": pages[r].path, "text": pages[r].text} for r in ranks]

    before, last = SEARCH_LISTS[-2:]
    changed = next(i for i, (a, b) in enumerate(zip(before, last, strict=True)) if a != b)
    title = f"update: a list of {len(last)} documents that changes {len(SEARCH_LISTS) - 1} times"
    return Scenario("update", title, len(SEARCH_LISTS), retrieve, pages[last[changed]].text)
