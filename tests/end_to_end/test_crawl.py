"""A crawl of a local site, streamed into a prompt while its pages arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from experiments.demo.site import SitePage, serve_site
from retrieval_clients import Page, crawl, main_text
from sglang_stream import stream_chat
from tests.end_to_end.asking import Asked, ask_async, asked, settings
from tests.end_to_end.server import Server
from tests.end_to_end.texts import Prompts, words

DELAYS = (0.6, 0.1, 0.3, 0.9)  # seconds until each page is answered


def page(number: int) -> SitePage:
    paragraphs = "".join(f"<p>{words((number, p), 60)}.</p>" for p in range(2))
    html = (
        f"<html><head><title>{number}</title></head><body><main>{paragraphs}</main></body></html>"
    )
    return SitePage(f"/{number}.html", html, main_text(html).text, 0)


def test_a_prompt_of_pages_as_they_arrive(server: Server, prompts: Prompts) -> None:
    pages = [page(number) for number in range(len(DELAYS))]
    arrived: list[str] = []

    async def crawled(urls: Sequence[str]) -> AsyncIterator[Page]:
        async for found in crawl(urls):
            arrived.append(found.text)
            yield found

    async def run() -> Asked:
        with serve_site(pages, DELAYS) as site:
            return await ask_async(server, crawled(site.urls), question="What do they say?")

    answer = asyncio.run(run())
    assert sorted(arrived) == sorted(p.text for p in pages)
    assert all(len(text) > 100 for text in arrived)
    context = "".join(f"{text}\n\n" for text in arrived)
    assert prompts.decode(answer.prompt) == prompts.text({}, context, "What do they say?")
    assert answer.tokens == server.cold(answer.prompt).tokens
    assert answer.usage.stream is not None
    assert 1 <= answer.usage.stream.chunks <= len(pages)
    assert answer.usage.stream.ready_tokens > 0


@pytest.mark.anyio
async def test_the_crawl_itself_is_an_iterable_of_chunks(server: Server) -> None:
    """Pages that cannot be had are left out."""
    with serve_site([page(9)], [0.1]) as site:
        urls = [*site.urls, f"{site.base_url}/none.html"]
        async with stream_chat(crawl(urls), **settings(server, {})) as stream:
            text = "".join([piece async for piece in stream])
            answer = asked(text, await stream.get_final_completion(), stream.usage)
    assert answer.tokens == server.cold(answer.prompt).tokens
    assert answer.usage.stream is not None
    assert answer.usage.stream.chunks == 1
