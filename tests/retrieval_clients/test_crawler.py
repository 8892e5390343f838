from __future__ import annotations

import asyncio
import builtins
import gzip
import logging
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from retrieval_clients import CrawlSettings, Page, PageError, crawl
from tests.retrieval_clients.webserver import ARTICLE, Reply, Web, html

QUICK = CrawlSettings(timeout_s=5, connect_timeout_s=2, read_timeout_s=5)


def items_of(urls: list[str], settings: CrawlSettings = QUICK) -> list[Page | PageError]:
    async def read() -> list[Page | PageError]:
        return [item async for item in crawl(urls, settings).items()]

    return asyncio.run(read())


def only(urls: list[str], settings: CrawlSettings = QUICK) -> Page | PageError:
    (item,) = items_of(urls, settings)
    return item


def page(url: str, settings: CrawlSettings = QUICK) -> Page:
    item = only([url], settings)
    assert isinstance(item, Page), item
    return item


def error(url: str, settings: CrawlSettings = QUICK) -> PageError:
    item = only([url], settings)
    assert isinstance(item, PageError), item
    return item


def test_a_page_is_a_chunk_with_title_text_and_times(web: Web) -> None:
    web.routes["/a"] = Reply(html("<nav><a href='/'>menu</a></nav><article>" + ARTICLE))
    got = page(web.url("/a"))
    assert (got.url, got.final_url, got.status) == (web.url("/a"), web.url("/a"), 200)
    assert got.title == "A title"
    assert got.text.startswith("Prefill computes keys")
    assert "menu" not in got.text
    assert (got.id, got.page_content) == (got.url, got.text)
    assert 0 <= got.started_s < got.ended_s < 5
    assert web.agents == {"sglang-stream-crawler"}


def test_pages_come_in_the_order_of_arrival(web: Web) -> None:
    async def run() -> list[str]:
        found = aiter(crawl([web.url("/slow"), web.url("/fast")], QUICK))
        first = await anext(found)
        web.release.set()
        return [first.url, *[p.url async for p in found]]

    web.routes["/slow"] = web.never
    web.routes["/fast"] = Reply()
    assert asyncio.run(run()) == [web.url("/fast"), web.url("/slow")]


def test_iterating_skips_errors_and_logs_them(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> list[str]:
        return [p.url async for p in crawl([web.url("/gone"), web.url("/a")], QUICK)]

    web.routes["/a"] = Reply()
    with caplog.at_level(logging.WARNING, "retrieval_clients.crawler"):
        assert asyncio.run(run()) == [web.url("/a")]
    (record,) = caplog.records
    assert record.getMessage() == f"skipped {web.url('/gone')}: HTTP 404 Not Found (status)"


def test_no_more_pages_at_once_than_the_settings_allow(web: Web) -> None:
    web.routes.update({f"/{i}": web.never for i in range(6)})
    settings = replace(QUICK, concurrency=2, obey_robots=False)

    async def run() -> None:
        found = crawl([web.url(f"/{i}") for i in range(6)], settings)
        reader = asyncio.create_task(_count(found))
        for _ in range(2):
            assert await asyncio.to_thread(web.waiting.acquire, timeout=5)
        assert len(web.asked) == 2
        web.release.set()
        assert await reader == 6

    asyncio.run(run())


async def _count(found: Any) -> int:
    return len([item async for item in found])


def test_urls_are_read_no_further_than_the_consumer_keeps_up(web: Web) -> None:
    taken = 0

    def urls() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield web.url(f"/{taken}")

    async def run() -> None:
        # Each is a 404, which is an item as good as any.
        async with crawl(urls(), replace(QUICK, concurrency=2)) as found:
            for _ in range(3):
                await anext(found.items())

    asyncio.run(run())
    # 3 taken by the consumer, 2 in the queue, 2 in the hands of the workers.
    assert taken <= 7


def test_an_exception_from_the_urls_comes_after_the_pages_begun(web: Web) -> None:
    def urls() -> Iterator[str]:
        yield web.url("/a")
        raise RuntimeError("no more")

    async def run() -> list[str]:
        found = aiter(crawl(urls(), QUICK))
        first = await anext(found)
        with pytest.raises(RuntimeError, match="no more"):
            await anext(found)
        return [first.url]

    web.routes["/a"] = Reply()
    assert asyncio.run(run()) == [web.url("/a")]


def test_each_url_once(web: Web) -> None:
    web.routes["/a"] = Reply()
    urls = [web.url("/a"), web.url("/a#part"), web.url("/a").replace("http", "HTTP"), web.url("/a")]
    assert len(items_of([*urls, "http://[bad", "http://[bad"])) == 2
    assert web.asked.count("/a") == 1


@pytest.mark.parametrize("status", [404, 410, 500, 503])
def test_a_status_that_is_no_success(web: Web, status: int) -> None:
    web.routes["/a"] = Reply(status=status)
    got = error(web.url("/a"))
    assert (got.reason, got.status) == ("status", status)
    assert str(status) in got.detail


@pytest.mark.parametrize(
    "url",
    ["", "no url", "/relative", "ftp://host/a", "file:///etc/passwd", "http://", "http://h:port/"],
)
def test_what_is_no_url(url: str) -> None:
    assert error(url).reason == "bad_url"


def test_one_text_instead_of_urls_is_refused() -> None:
    with pytest.raises(TypeError, match=r"crawl\(\[url\]\)"):
        crawl("http://localhost/")


def test_connection_refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        got = error(f"http://127.0.0.1:{free.getsockname()[1]}/")
    assert (got.reason, got.status) == ("connect", None)


def test_a_server_that_closes_at_once(web: Web) -> None:
    def crash() -> Reply:
        raise ConnectionAbortedError

    web.handle_error = lambda *_: None  # type: ignore[method-assign]
    web.routes["/a"] = crash
    assert error(web.url("/a")).reason == "network"


def test_a_page_that_never_answers(web: Web) -> None:
    web.routes["/a"] = web.never
    got = error(web.url("/a"), replace(QUICK, read_timeout_s=0.1))
    assert (got.reason, got.detail) == ("timeout", "nothing came for 0.1 s")


def test_a_page_that_never_ends(web: Web) -> None:
    # Parts keep coming, so that only the time-out for the whole page can end it.
    web.routes["/a"] = Reply(b" ", endless=True)
    got = error(web.url("/a"), replace(QUICK, timeout_s=0.3, max_body_bytes=1 << 40))
    assert (got.reason, got.detail) == ("timeout", "not complete in 0.3 s")
    assert web.clients_gone.acquire(timeout=5)


def test_the_time_out_covers_all_redirects_together(web: Web) -> None:
    settings = replace(QUICK, timeout_s=0.5, max_redirects=1000)

    def hop() -> Reply:
        web.release.wait(0.1)
        return Reply(b"", 302, {"Location": "/a"})

    web.routes["/a"] = hop
    got = error(web.url("/a"), settings)
    assert got.reason == "timeout"
    assert got.ended_s - got.started_s < 3
    assert 2 <= web.asked.count("/a") <= 6


def test_redirects_are_followed_within_a_bound(web: Web) -> None:
    web.routes["/end"] = Reply()
    for i in range(4):
        web.redirect(f"/{i}", f"/{i - 1}" if i else "/end")
    settings = replace(QUICK, max_redirects=3)
    got = page(web.url("/2"), settings)
    assert (got.url, got.final_url) == (web.url("/2"), web.url("/end"))
    assert error(web.url("/3"), settings).reason == "redirects"


def test_a_redirect_loop(web: Web) -> None:
    web.redirect("/a", "/b")
    web.redirect("/b", "/a")
    assert error(web.url("/a")).reason == "redirects"
    assert len(web.asked) == 1 + QUICK.max_redirects + 1  # robots.txt, the page, the redirects


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/", "http://h:port/"])
def test_a_redirect_out_of_the_web(web: Web, to: str) -> None:
    web.redirect("/a", to)
    assert error(web.url("/a")).reason in ("bad_url", "network")


def test_a_body_larger_than_the_bound_is_not_read_to_its_end(web: Web) -> None:
    web.routes["/a"] = Reply(b"x" * 4096, endless=True)
    got = error(web.url("/a"), replace(QUICK, max_body_bytes=10_000))
    assert (got.reason, got.status) == ("too_large", 200)
    assert web.clients_gone.acquire(timeout=5)


def test_a_body_as_large_as_the_bound(web: Web) -> None:
    web.routes["/a"] = Reply(html())
    size = len(html())
    assert page(web.url("/a"), replace(QUICK, max_body_bytes=size)).text
    assert error(web.url("/a"), replace(QUICK, max_body_bytes=size - 1)).reason == "too_large"


def compressed(body: bytes) -> Reply:
    headers = {"Content-Type": "text/html", "Content-Encoding": "gzip"}
    return Reply(gzip.compress(body), headers=headers)


def test_gzip_and_its_bound(web: Web) -> None:
    web.routes["/a"] = compressed(html())
    web.routes["/bomb"] = compressed(bytes(64 << 20))
    assert page(web.url("/a")).text.startswith("Prefill")
    assert error(web.url("/bomb")).reason == "too_large"


def test_broken_and_unknown_encodings(web: Web) -> None:
    web.routes["/cut"] = Reply(compressed(html()).body[:-20], headers=compressed(b"").headers)
    web.routes["/plain"] = Reply(html(), headers=compressed(b"").headers)
    web.routes["/br"] = Reply(headers={"Content-Type": "text/html", "Content-Encoding": "br"})
    for path in ("/cut", "/plain", "/br"):
        assert error(web.url(path)).reason == "encoding"


@pytest.mark.parametrize("kind", ["image/png", "application/pdf", "application/json", ""])
def test_other_kinds_of_content(web: Web, kind: str) -> None:
    web.routes["/a"] = Reply(headers={"Content-Type": kind})
    assert error(web.url("/a")).reason == "content_type"


def test_plain_text_is_taken_as_it_is(web: Web) -> None:
    web.routes["/a"] = Reply(b"one\n\n<two>", headers={"Content-Type": "Text/Plain; charset=utf-8"})
    got = page(web.url("/a"))
    assert (got.title, got.text) == ("", "one\n\n<two>")


@pytest.mark.parametrize("body", [b"", html(""), html("<script>let x = 1</script>"), b"\0\1\2"])
def test_a_page_without_text(web: Web, body: bytes) -> None:
    web.routes["/a"] = Reply(body)
    got = error(web.url("/a"))
    assert (got.reason, got.status) == ("empty", 200)


def test_the_character_set_of_the_header(web: Web) -> None:
    body = ARTICLE.replace("Prefill", "Пример")
    web.routes["/a"] = Reply(
        html(body).decode().encode("koi8-r"), headers={"Content-Type": "text/html; charset=koi8-r"}
    )
    assert page(web.url("/a")).text.startswith("Пример")


def test_an_unexpected_error_is_an_item(
    web: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(html: str) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr("retrieval_clients.crawler.main_text", broken)
    web.routes["/a"] = Reply()
    got = error(web.url("/a"))
    assert (got.reason, got.detail) == ("failed", "RecursionError: too deep")
    assert "Traceback" in caplog.text


class TestRobots:
    def rules(self, web: Web, text: str, status: int = 200) -> None:
        web.routes["/robots.txt"] = Reply(text.encode(), status, {"Content-Type": "text/plain"})

    def test_what_it_forbids_is_not_asked_for(self, web: Web) -> None:
        self.rules(web, "User-agent: *\nDisallow: /private\n")
        web.routes.update({"/private/a": Reply(), "/a": Reply()})
        got = {i.url: i for i in items_of([web.url("/private/a"), web.url("/a")])}
        private = got[web.url("/private/a")]
        assert isinstance(private, PageError)
        assert (private.reason, private.status) == ("robots", None)
        assert isinstance(got[web.url("/a")], Page)
        assert sorted(web.asked) == ["/a", "/robots.txt"]

    def test_rules_for_this_crawler_by_name(self, web: Web) -> None:
        self.rules(web, "User-agent: sglang-stream-crawler\nDisallow: /\n\nUser-agent: *\nAllow: /")
        web.routes["/a"] = Reply()
        assert error(web.url("/a")).reason == "robots"
        assert page(web.url("/a"), replace(QUICK, user_agent="another")).text

    def test_it_can_be_ignored(self, web: Web) -> None:
        self.rules(web, "User-agent: *\nDisallow: /")
        web.routes["/a"] = Reply()
        assert page(web.url("/a"), replace(QUICK, obey_robots=False)).text
        assert web.asked == ["/a"]

    @pytest.mark.parametrize("status", [401, 403, 404, 429])
    def test_allowed_without_the_file(self, web: Web, status: int) -> None:
        self.rules(web, "User-agent: *\nDisallow: /", status)
        web.routes["/a"] = Reply()
        assert page(web.url("/a")).text

    @pytest.mark.parametrize("status", [500, 503])
    def test_forbidden_when_the_server_fails(self, web: Web, status: int) -> None:
        self.rules(web, "", status)
        web.routes["/a"] = Reply()
        assert error(web.url("/a")).reason == "robots"
        assert web.asked == ["/robots.txt"]

    def test_a_file_that_never_comes_does_not_stop_the_pages(self, web: Web) -> None:
        web.routes.update({"/robots.txt": web.never, "/a": Reply(), "/b": Reply()})
        settings = replace(QUICK, timeout_s=0.5)
        got = items_of([web.url("/a"), web.url("/b")], settings)
        assert [type(item) for item in got] == [Page, Page]
        assert web.asked.count("/robots.txt") == 1

    def test_the_file_may_be_behind_a_redirect_and_is_read_once(self, web: Web) -> None:
        web.redirect("/robots.txt", "/rules")
        web.routes["/rules"] = Reply(b"User-agent: *\nDisallow: /b", headers={})
        web.routes.update({f"/{name}": Reply() for name in "abcdef"})
        got = items_of([web.url(f"/{name}") for name in "abcdef"])
        assert [i.url for i in got if isinstance(i, PageError)] == [web.url("/b")]
        assert web.asked.count("/rules") == 1

    def test_the_beginning_of_a_huge_file_counts(self, web: Web) -> None:
        self.rules(web, "User-agent: *\nDisallow: /a\n" + "# nothing\n" * 100_000)
        web.routes.update({"/a": Reply(), "/b": Reply()})
        assert error(web.url("/a")).reason == "robots"
        assert page(web.url("/b")).text

    def test_a_redirect_asks_the_other_host(self, web: Web, other_web: Web) -> None:
        self.rules(other_web, "User-agent: *\nDisallow: /no")
        other_web.routes.update({"/no": Reply(), "/yes": Reply()})
        web.redirect("/to-no", other_web.url("/no"))
        web.redirect("/to-yes", other_web.url("/yes"))
        got = {i.url: i for i in items_of([web.url("/to-no"), web.url("/to-yes")])}
        refused, allowed = got[web.url("/to-no")], got[web.url("/to-yes")]
        assert isinstance(refused, PageError)
        assert refused.reason == "robots"
        assert isinstance(allowed, Page)
        assert allowed.final_url == other_web.url("/yes")
        assert "/no" not in other_web.asked


class TestStopping:
    """However a crawl is left, no task stays and every connection is closed."""

    def endless(self, web: Web) -> list[str]:
        paths = [f"/{i}" for i in range(4)]
        web.routes.update({path: Reply(b" ", endless=True) for path in paths})
        web.routes["/first"] = Reply()
        return [web.url(path) for path in ["/first", *paths]]

    def all_gone(self, web: Web) -> None:
        for _ in range(4):
            assert web.clients_gone.acquire(timeout=5)

    settings = replace(QUICK, max_body_bytes=1 << 40, timeout_s=60)

    async def alone(self) -> None:
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def test_leaving_the_context(self, web: Web) -> None:
        async def run() -> None:
            async with crawl(self.endless(web), self.settings) as found:
                await anext(aiter(found))
            await self.alone()
            assert [p async for p in found] == []
            self.all_gone(web)

        asyncio.run(run())

    def test_aclose_twice_and_before_the_beginning(self, web: Web) -> None:
        async def run() -> None:
            found = crawl(self.endless(web), self.settings)
            await found.aclose()
            await found.aclose()
            assert [p async for p in found] == []
            await self.alone()

        asyncio.run(run())
        assert web.asked == []

    def test_cancelling_the_consumer(self, web: Web) -> None:
        async def run() -> None:
            found = aiter(crawl(self.endless(web), self.settings))
            await anext(found)
            waiting = asyncio.create_task(anext(found))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await self.alone()
            self.all_gone(web)

        asyncio.run(run())

    def test_closing_what_an_async_for_goes_through(self, web: Web) -> None:
        """As the SDK does, which is given the crawl and not its context."""

        async def run() -> None:
            pages = aiter(crawl(self.endless(web), self.settings))
            await anext(pages)
            await pages.aclose()
            await self.alone()
            self.all_gone(web)

        asyncio.run(run())

    def test_forgetting_it(self, web: Web) -> None:
        """As `break` in an `async for` without a context manager does."""

        async def run() -> None:
            async for _ in crawl(self.endless(web), self.settings):
                break
            left = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.wait_for(asyncio.gather(*left, return_exceptions=True), 5)
            self.all_gone(web)

        asyncio.run(run())


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"max_body_bytes": 0},
        {"max_redirects": -1},
        {"timeout_s": 0},
        {"connect_timeout_s": 0},
        {"read_timeout_s": -1},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CrawlSettings(**wrong)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "trafilatura":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "sglang-stream\[crawler\]"'):
        crawl([])
