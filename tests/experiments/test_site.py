from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from itertools import pairwise

import httpx
import pytest

from experiments.demo import site
from experiments.demo.site import (
    GAP_SIGMA,
    MAX_TOKENS,
    MIN_GAP_S,
    MIN_TOKENS,
    MODULES,
    SitePage,
    arrival_delays,
    cut,
    make_pages,
    serve_site,
)
from retrieval_clients import CrawlSettings, Page, crawl, main_text


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def pages() -> tuple[SitePage, ...]:
    return make_pages(words)


def small(n: int) -> list[SitePage]:
    """Pages that cost nothing to make."""
    return [
        SitePage(f"/{i}.html", f"<html><body><p>Page {i}.</p></body></html>", f"Page {i}.", 2)
        for i in range(n)
    ]


class _Balance(HTMLParser):
    """Whether every element that must be ended is ended, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("br", "hr", "meta", "p"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "p":
            # These may end with what they stand in; pydoc makes use of it.
            while self.open[-1] != tag and self.open[-1] in ("dt", "dd"):
                self.open.pop()
            assert self.open.pop() == tag


class TestPages:
    def test_twelve_pages_of_the_size_wanted(self, pages: tuple[SitePage, ...]) -> None:
        paths = [p.path for p in pages]
        assert paths == [f"/{name}.html" for name in MODULES if f"/{name}.html" in paths]
        assert len({p.text for p in pages}) == len(pages) == 12
        assert all(MIN_TOKENS <= p.tokens <= MAX_TOKENS for p in pages)
        assert 11_500 <= sum(p.tokens for p in pages) <= 12_500

    def test_text_and_tokens_are_those_of_the_html(self, pages: tuple[SitePage, ...]) -> None:
        for p in pages:
            assert (p.text, p.tokens) == (main_text(p.html).text, words(p.text))

    def test_the_html_is_whole(self, pages: tuple[SitePage, ...]) -> None:
        for p in pages:
            balance = _Balance()
            balance.feed(p.html)
            assert balance.open == []
            assert p.html.startswith("<!DOCTYPE html")
            assert p.html.endswith("</body></html>\n")
            assert "file:" not in p.html

    def test_the_same_in_every_process(self, pages: tuple[SitePage, ...]) -> None:
        code = (
            "from experiments.demo.site import make_page;"
            "print(make_page('enum', lambda text: len(text.split())).html, end='')"
        )
        for seed in ("1", "2"):
            out = subprocess.run(
                [sys.executable, "-c", code],
                env={"PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            )
            assert out.stdout == next(p.html for p in pages if p.path == "/enum.html")

    def test_the_small_models_tokenizer(self) -> None:
        tiny_model = pytest.importorskip("sglang_stream.engine.cpu.tiny_model")
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model.default_tiny_model())
        made = make_pages(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
        assert all(MIN_TOKENS <= p.tokens <= MAX_TOKENS for p in made)
        assert 11_500 <= sum(p.tokens for p in made) <= 12_500

    def test_modules_that_cannot_be_cut_are_passed_over(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "little", type(sys)("little", "A few words."))
        monkeypatch.setattr(site, "MODULES", ("little", "calendar", "pdb"))
        monkeypatch.setattr(site, "PAGE_COUNT", 1)
        assert [p.path for p in make_pages(words)] == ["/calendar.html"]

    def test_too_few_modules_that_can_be_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "little", type(sys)("little", "A few words."))
        monkeypatch.setattr(site, "MODULES", ("little", "calendar"))
        monkeypatch.setattr(site, "PAGE_COUNT", 2)
        with pytest.raises(ValueError, match=r"only 1 of 2 pages .*\nlittle: .* 900 to 1100"):
            make_pages(words)


class TestCut:
    def html(self, lines: list[str]) -> str:
        body = "".join(f"<p>{line}</p>\n" for line in lines)
        return f"<html><body><div>{body}</div></body></html>"

    def test_at_the_border_nearest_to_the_target(self) -> None:
        line = " ".join(["word"] * 70)
        short = cut(self.html([f"{i} {line}" for i in range(100)]), words)
        assert words(main_text(short).text) == 14 * 71
        assert short.endswith("word</div></body></html>\n")

    def test_nothing_is_cut_that_is_as_small_as_wanted(self) -> None:
        line = " ".join(["word"] * 95)
        short = cut(self.html([line] * 10), words)
        assert words(main_text(short).text) == 950

    @pytest.mark.parametrize(
        ("lines", "reason"),
        [
            ([], "no element"),
            (["word"], r"\[1\] tokens"),
            (["word " * 5000], r"\[5000\] tokens"),
            (["word " * 800, "other " * 400], r"\[800, 1200\] tokens"),
        ],
    )
    def test_what_cannot_be_cut(self, lines: list[str], reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            cut(self.html(lines), words)


class TestDelays:
    @pytest.mark.parametrize("seed", range(20))
    def test_gaps(self, seed: int) -> None:
        delays = arrival_delays(12, seed)
        assert delays == arrival_delays(12, seed)
        gaps = [b - a for a, b in pairwise(delays)]
        assert len(gaps) == 11
        assert statistics.median(gaps) == pytest.approx(0.7)
        assert min([delays[0], *gaps]) >= MIN_GAP_S - 1e-9
        assert delays != arrival_delays(12, seed + 1)

    def test_the_spread_is_that_of_the_paper(self) -> None:
        delays = arrival_delays(20_000, 1)
        gaps = [b - a for a, b in pairwise(delays)]
        p25, p50, p75 = statistics.quantiles(gaps, n=4)
        assert p50 == pytest.approx(0.7, rel=0.02)
        # Of the published gaps: 0.387, 0.701 and 1.340 s.
        assert p25 == pytest.approx(0.387, rel=0.1)
        assert p75 == pytest.approx(1.340, rel=0.1)
        assert 0.8 < GAP_SIGMA < 1.0

    def test_few_pages(self) -> None:
        assert arrival_delays(0, 1) == ()
        assert arrival_delays(1, 1) == pytest.approx((0.7,))
        assert len(arrival_delays(2, 1)) == 2


class TestServing:
    def test_a_crawl_sees_the_pages_in_order_at_their_times(
        self, pages: tuple[SitePage, ...]
    ) -> None:
        delays = [0.25 * (i + 1) for i in range(12)]

        async def run(urls: tuple[str, ...]) -> list[Page]:
            return [p async for p in crawl(urls, CrawlSettings(concurrency=12))]

        with serve_site(pages, delays) as served:
            found = asyncio.run(run(served.urls))
        assert tuple(p.url for p in found) == served.urls
        assert [p.text for p in found] == [p.text for p in pages]
        for page, delay in zip(found, delays, strict=True):
            assert page.ended_s - page.started_s >= delay

    def test_any_order_of_asking(self) -> None:
        made = small(6)

        async def run(urls: list[str]) -> list[str]:
            return [p.url async for p in crawl(urls, CrawlSettings(concurrency=6))]

        with serve_site(made, [0.25 * (i + 1) for i in range(6)]) as served:
            assert asyncio.run(run(list(reversed(served.urls)))) == list(served.urls)

    def test_robots_and_unknown_pages(self) -> None:
        with serve_site(small(1), [0.0]) as served:
            robots = httpx.get(served.base_url + "/robots.txt")
            assert (robots.status_code, robots.text) == (200, "User-agent: *\nAllow: /\n")
            assert robots.headers["content-type"] == "text/plain; charset=utf-8"
            page = httpx.get(served.urls[0])
            assert (page.status_code, page.text) == (200, small(1)[0].html)
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert httpx.get(served.base_url + "/none").status_code == 404

    def test_leaving_does_not_wait_for_pages_that_are_due_later(self) -> None:
        before = threading.active_count()
        began = time.monotonic()
        with serve_site(small(1), [60.0]) as served, pytest.raises(httpx.TimeoutException):
            httpx.get(served.urls[0], timeout=0.2)
        assert time.monotonic() - began < 10
        with pytest.raises(httpx.ConnectError):
            httpx.get(served.urls[0])
        deadline = time.monotonic() + 5
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == before

    def test_a_client_that_leaves_early_is_not_complained_about(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with serve_site(small(2), [0.3, 0.6]) as served:
            with pytest.raises(httpx.TimeoutException):
                httpx.get(served.urls[0], timeout=0.05)
            assert httpx.get(served.urls[1]).status_code == 200
        assert capfd.readouterr().err == ""

    def test_one_delay_for_each_page(self) -> None:
        with pytest.raises(ValueError, match="zip"), serve_site(small(2), [0.0]):
            pass
