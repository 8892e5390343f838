"""The demo's local site: real pages of about 1,000 tokens each, served with a retriever's delays.

The pages are what `pydoc` writes for modules of the standard library, cut so that their main text,
as the crawler extracts it, has 900 to 1,100 tokens. The delays are log-normal with the median and
the spread of the crawler's gaps between chunks in the paper (Stream2LLM, arXiv 2604.16395).
"""

from __future__ import annotations

import importlib
import math
import os
import pydoc
import random
import statistics
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate

from retrieval_clients import main_text

PAGE_COUNT = 12
# Modules whose pages are the same in every process, in Python 3.10 to 3.12. (pydoc lists some
# classes in the order of a set, which differs between processes.) More than are needed: trafilatura
# judges a page as a whole, so that one line more can add hundreds of tokens to its main text, and
# then there is no cut of the right size, depending on the tokenizer.
MODULES = (
    "calendar",
    "code",
    "datetime",
    "decimal",
    "enum",
    "ipaddress",
    "itertools",
    "pathlib",
    "pdb",
    "pickle",
    "re",
    "socketserver",
    "mailbox",
    "selectors",
    "weakref",
    "zipfile",
    "typing",
    "types",
    "statistics",
    "email.message",
)
MIN_TOKENS, TARGET_TOKENS, MAX_TOKENS = 900, 1000, 1100

MEDIAN_GAP_S = 0.7
# The paper's gaps have quartiles of 0.387 and 1.340 s: log-normal with this sigma.
GAP_SIGMA = math.log(1.340 / 0.387) / (2 * statistics.NormalDist().inv_cdf(0.75))
# The crawler needs some time for each page, which must not change the order of arrival.
MIN_GAP_S = 0.1


@dataclass(frozen=True, slots=True)
class SitePage:
    """A page of the site. `text`: its main text, of `tokens` tokens; `path` begins with "/"."""

    path: str
    html: str
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Site:
    """A site being served. `urls`: in the order of the pages, which is that of their arrival."""

    base_url: str
    urls: tuple[str, ...]


def make_pages(count_tokens: Callable[[str], int]) -> tuple[SitePage, ...]:
    """The site: pages of the first `PAGE_COUNT` of `MODULES` that can be cut to the size wanted.

    `count_tokens`: the number of tokens of a text. The same Python and counter make the same site.
    Raises ValueError, with what is wrong with each page, if there are too few; ImportError if the
    extra `crawler` is not installed.
    """
    pages: list[SitePage] = []
    failures: list[str] = []
    for module in MODULES:
        try:
            pages.append(make_page(module, count_tokens))
        except ValueError as e:
            failures.append(f"{module}: {e}")
        if len(pages) == PAGE_COUNT:
            return tuple(pages)
    raise ValueError(
        f"only {len(pages)} of {PAGE_COUNT} pages can be made with this tokenizer:\n"
        + "\n".join(failures)
    )


def make_page(module: str, count_tokens: Callable[[str], int]) -> SitePage:
    """The page of one module, by its import name. Raises ValueError as `cut` does, ImportError."""
    doc = _Doc()
    whole = doc.page(f"Python: {module}", doc.docmodule(importlib.import_module(module)))
    html = cut(whole, count_tokens)
    text = main_text(html).text
    return SitePage(f"/{module}.html", html, text, count_tokens(text))


def cut(html: str, count_tokens: Callable[[str], int]) -> str:
    """The beginning of `html` whose main text has about `TARGET_TOKENS` tokens.

    Cut after a line or an element, with the elements that are then open closed. Raises ValueError
    if no such cut gives a main text of `MIN_TOKENS` to `MAX_TOKENS`.
    """
    borders = _Borders(html).found

    def tokens(border: int) -> int:
        return count_tokens(main_text(borders[border].cut(html)).text)

    # Doubling before bisecting: the extraction takes long on large pages, and most are cut early.
    end = 1
    while end < len(borders) and tokens(end) < TARGET_TOKENS:
        end *= 2
    low, high = end // 2, min(end, len(borders))
    best = bisect_left(range(low, high), TARGET_TOKENS, key=tokens) + low
    sizes = {i: tokens(i) for i in (best - 1, best) if 0 <= i < len(borders)}
    if not sizes:
        raise ValueError("it has no element to cut after")
    nearest = min(sizes, key=lambda i: abs(sizes[i] - TARGET_TOKENS))
    if not MIN_TOKENS <= sizes[nearest] <= MAX_TOKENS:
        raise ValueError(
            f"its main text can be cut to {sorted(sizes.values())} tokens, "
            f"and {MIN_TOKENS} to {MAX_TOKENS} are wanted"
        )
    return borders[nearest].cut(html)


def arrival_delays(n: int, seed: int) -> tuple[float, ...]:
    """When each of `n` pages arrives, in seconds since they were asked for together; ascending.

    The gaps between successive pages are log-normal, at least `MIN_GAP_S`, and their median is
    `MEDIAN_GAP_S` for every seed. The first page comes after such a gap too.
    """
    draw = random.Random(seed)
    gaps = [draw.lognormvariate(0.0, GAP_SIGMA) for _ in range(n)]
    scale = MEDIAN_GAP_S / statistics.median(gaps[1:] or gaps or [1.0])
    return tuple(accumulate(max(MIN_GAP_S, gap * scale) for gap in gaps))


@contextmanager
def serve_site(pages: Sequence[SitePage], delays: Sequence[float]) -> Iterator[Site]:
    """Serves `pages` on a free port of the loopback interface until the context is left.

    Page i is answered `delays[i]` seconds after its request. Whoever asks for all of them at once
    (a crawl of `len(pages)` concurrent ones) receives them in order, with the gaps of
    `arrival_delays`, every time. Raises ValueError if there is not one delay for each page.
    """
    answers = {p.path: (p.html.encode(), d) for p, d in zip(pages, delays, strict=True)}
    server = _Server(answers)
    # The port listens from here on, so that the first request cannot come too early.
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="demo site")
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        yield Site(base, tuple(base + page.path for page in pages))
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Doc(pydoc.HTMLDoc):
    """pydoc's pages, without the place where this machine keeps its library."""

    def filelink(self, url: str, path: str) -> str:
        return os.path.basename(path)


@dataclass(frozen=True, slots=True)
class _Border:
    """A place to cut: the offset in the page, and the elements open there, outermost first."""

    offset: int
    open_tags: tuple[str, ...]

    def cut(self, html: str) -> str:
        closing = "".join(f"</{tag}>" for tag in reversed(self.open_tags))
        return f"{html[: self.offset]}{closing}\n"


class _Borders(HTMLParser):
    """Finds the borders of a page: before each line break and each end of a block of text."""

    # Elements without an end, and paragraphs, which end by themselves (pydoc never ends most).
    _UNCLOSED = frozenset({"br", "hr", "img", "input", "link", "meta", "p"})
    _BLOCKS = frozenset({"dd", "dl", "dt", "p", "table", "td", "tr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[_Border] = []
        self._open: list[str] = []
        self._lines = [0, *accumulate(len(line) for line in html.splitlines(keepends=True))]
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "br":
            self._add()
        if tag not in self._UNCLOSED:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._BLOCKS:
            self._add()
        if tag in self._open:
            # Ends what was left open inside it as well, as a browser does.
            while self._open.pop() != tag:
                pass

    def _add(self) -> None:
        line, column = self.getpos()
        self.found.append(_Border(self._lines[line - 1] + column, tuple(self._open)))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A crawl connects for all its pages at once; the default of 5 would make some wait a second.
    request_queue_size = 128

    def __init__(self, answers: dict[str, tuple[bytes, float]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = {"/robots.txt": (b"User-agent: *\nAllow: /\n", 0.0), **answers}
        self.closing = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        body, delay_s = self.server.answers.get(self.path, (None, 0.0))
        if body is None:
            self.send_error(404)
            return
        if self.server.closing.wait(delay_s):
            return
        kind = "plain" if self.path.endswith(".txt") else "html"
        try:
            self.send_response(200)
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            # The client left before its page was due: nobody is there to be told.
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the demo draws its own progress."""
