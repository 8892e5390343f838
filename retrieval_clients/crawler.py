"""A crawler whose pages can be read by a model while the others are still being fetched.

    async for text in stream_chat(crawl(urls), question="..."):    # pages only, errors logged
        print(text, end="")

    async for item in crawl(urls).items():                         # Page and PageError
        ...

Items come in the order in which they are complete, not in the order of the URLs. What goes wrong
with one page never ends the crawl.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

import anyio
import httpx
from anyio.streams.memory import MemoryObjectSendStream

from retrieval_clients.maintext import MainText, decode, main_text, require_crawler_extra
from retrieval_clients.web import (
    TEXT_TYPES,
    Answer,
    CrawlSettings,
    Fetcher,
    FetchFailed,
    Reason,
    new_client,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Page:
    """A page and its main text; the SDK takes it as a chunk by its `id` and `page_content`.

    `url`: as it was given; `final_url`: where the redirects led. `status`: of the last answer.
    `started_s`, `ended_s`: seconds since the crawl began, from when the page's turn came until its
    text was extracted.
    """

    url: str
    final_url: str
    title: str
    text: str
    status: int
    started_s: float
    ended_s: float

    @property
    def id(self) -> str:
        return self.url

    @property
    def page_content(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class PageError:
    """A page that could not be had: `reason` for programs, `detail` for people.

    `status`: the HTTP status, None if there was none. Times as in `Page`.
    """

    url: str
    reason: Reason
    detail: str
    status: int | None
    started_s: float
    ended_s: float


class Crawl:
    """A crawl: an async iterable of its pages, and an async context manager.

    It begins with the first item asked for and can be gone through once, by one task. Leaving the
    context, `aclose()`, or cancelling the task that waits for an item stops it and closes all
    connections.
    """

    def __init__(self, urls: Iterable[str], settings: CrawlSettings) -> None:
        self._items = _crawl(urls, settings)
        self._pages = _pages(self._items)

    def __aiter__(self) -> AsyncGenerator[Page, None]:
        """The pages, each as soon as it is complete. Errors are logged as warnings."""
        return self._pages

    def items(self) -> AsyncGenerator[Page | PageError, None]:
        """Pages and errors, each as soon as it is complete."""
        return self._items

    async def __aenter__(self) -> Crawl:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stops the crawl; without effect when it has ended."""
        await self._pages.aclose()
        await self._items.aclose()


def crawl(urls: Iterable[str], settings: CrawlSettings | None = None) -> Crawl:
    """A crawl of `urls`, each once; what follows # in a URL does not make another page.

    `urls` is read as the crawl goes on, and no further than the consumer keeps up: at most twice
    `concurrency` pages are fetched or kept ahead of it. An exception from `urls` is raised to the
    consumer after the pages that were begun.

    Raises ImportError if the extra `crawler` is not installed, TypeError if `urls` is one text.
    """
    if isinstance(urls, str):
        raise TypeError("urls must be an iterable of URLs, not one text: write crawl([url])")
    require_crawler_extra()
    return Crawl(urls, settings or CrawlSettings())


async def _pages(items: AsyncGenerator[Page | PageError, None]) -> AsyncGenerator[Page, None]:
    try:
        async for item in items:
            if isinstance(item, Page):
                yield item
            else:
                logger.warning("skipped %s: %s (%s)", item.url, item.detail, item.reason)
    finally:
        await items.aclose()


async def _crawl(
    urls: Iterable[str], settings: CrawlSettings
) -> AsyncGenerator[Page | PageError, None]:
    began = time.monotonic()
    send, receive = anyio.create_memory_object_stream[Page | PageError](settings.concurrency)
    async with new_client(settings) as client, receive:
        fetcher = Fetcher(client, settings)

        async def read(url: str) -> Page | PageError:
            return await _read_page(fetcher, url, began)

        todo = _distinct(urls)
        workers = [
            asyncio.create_task(_work(todo, read, send.clone()))
            for _ in range(settings.concurrency)
        ]
        # The workers' clones are left: the items end when the last worker does.
        send.close()
        try:
            async for item in receive:
                yield item
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _work(
    todo: Iterator[str],
    read: Callable[[str], Awaitable[Page | PageError]],
    send: MemoryObjectSendStream[Page | PageError],
) -> None:
    """Takes URLs from `todo`, which all workers share, until there are none."""
    async with send:
        for url in todo:
            await send.send(await read(url))


async def _read_page(fetcher: Fetcher, url: str, began: float) -> Page | PageError:
    started_s = time.monotonic() - began
    try:
        answer = await fetcher.fetch(url)
        # In a thread: extraction is CPU work, and other pages are arriving.
        found = await asyncio.to_thread(_extract, answer)
        if not found.text.strip():
            raise FetchFailed("empty", "no text was found in the page", answer.status)
    except FetchFailed as e:
        return PageError(url, e.reason, e.detail, e.status, started_s, time.monotonic() - began)
    except Exception as e:
        # Pages are made by anybody, and find the bugs of every parser: one is not the crawl.
        logger.exception("unexpected error with %s", url)
        detail = f"{type(e).__name__}: {e}"
        return PageError(url, "failed", detail, None, started_s, time.monotonic() - began)
    ended_s = time.monotonic() - began
    return Page(url, answer.url, found.title, found.text, answer.status, started_s, ended_s)


def _extract(answer: Answer) -> MainText:
    text = decode(answer.body, answer.charset)
    return MainText("", text) if answer.content_type in TEXT_TYPES else main_text(text)


def _distinct(urls: Iterable[str]) -> Iterator[str]:
    """Each URL once, as it was first written."""
    seen: set[str] = set()
    for url in urls:
        try:
            key = str(httpx.URL(url).copy_with(fragment=None))
        except httpx.InvalidURL:
            key = url
        if key not in seen:
            seen.add(key)
            yield url
