"""Bounded reading of the web: redirects, robots.txt, time, size and kind of content.

Whatever goes wrong with one address is raised as `FetchFailed`, with a reason that programs can
tell apart and a detail that people can read.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

import anyio
import httpx

if TYPE_CHECKING:
    from protego import Protego

Reason = Literal[
    "bad_url",  # not an absolute http(s) URL
    "robots",  # the site's robots.txt forbids it, or the server failed to give that file
    "connect",  # no connection: refused, unknown host, TLS
    "timeout",
    "network",  # the connection broke, or what came was not HTTP
    "redirects",  # more than allowed
    "status",  # not 2xx
    "content_type",  # neither HTML nor plain text
    "too_large",
    "encoding",  # a content encoding that was not asked for, or a broken one
    "empty",  # no main text in it
    "failed",  # anything else; the log has the traceback
]
T = TypeVar("T")

HTML_TYPES = ("text/html", "application/xhtml+xml")
TEXT_TYPES = ("text/plain", "text/markdown")
# RFC 9309 (Robots Exclusion Protocol), section 2.5: at least so much of robots.txt is read.
_ROBOTS_BYTES = 500 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CrawlSettings:
    """Limits of a crawl.

    `concurrency`: pages fetched at once, over all hosts. `timeout_s`: seconds for a page from its
    request to its last byte, redirects included; the robots.txt of a host has the same limit for
    itself, once. `connect_timeout_s`: seconds for a connection. `read_timeout_s`: seconds between
    two parts of an answer. `max_redirects`: for a page. `max_body_bytes`: of a page, after
    decompression; a larger one is an error, since half a page is not the page. `obey_robots`:
    whether robots.txt is asked for and obeyed. `user_agent`: the name that servers see, and that
    robots.txt is read for.
    """

    concurrency: int = 8
    timeout_s: float = 20.0
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 10.0
    max_redirects: int = 5
    max_body_bytes: int = 4 << 20
    obey_robots: bool = True
    user_agent: str = "sglang-stream-crawler"

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.max_body_bytes < 1 or self.max_redirects < 0:
            raise ValueError("concurrency and max_body_bytes must be 1 or more, max_redirects 0")
        if min(self.timeout_s, self.connect_timeout_s, self.read_timeout_s) <= 0:
            raise ValueError("time-outs must be more than 0 seconds")


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of a page as it came, decompressed. `url`: where the redirects led."""

    url: str
    status: int
    content_type: str
    charset: str | None
    body: bytes


class FetchFailed(Exception):
    """A page could not be had. `status`: the HTTP status, if it came that far."""

    def __init__(self, reason: Reason, detail: str, status: int | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.status = status


def new_client(settings: CrawlSettings) -> httpx.AsyncClient:
    """The HTTP client of one crawl, to be closed by who asked for it."""
    return httpx.AsyncClient(
        headers={
            "User-Agent": settings.user_agent,
            "Accept": ", ".join((*HTML_TYPES, *(f"{kind};q=0.9" for kind in TEXT_TYPES))),
            # The one encoding that is decompressed here, within a bound.
            "Accept-Encoding": "gzip",
        },
        timeout=httpx.Timeout(settings.read_timeout_s, connect=settings.connect_timeout_s),
        # The crawl bounds itself; a second bound here would only show up as time-outs.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency),
        # A proxy from the environment is used, but it cannot reach this machine's own servers.
        mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},
    )


class Fetcher:
    """Fetches pages with one client. Any number of tasks may use it at the same time."""

    def __init__(self, client: httpx.AsyncClient, settings: CrawlSettings) -> None:
        self._client = client
        self._settings = settings
        self._robots: dict[httpx.URL, _Rules] = {}

    async def fetch(self, url: str) -> Answer:
        """The page at `url`. Raises FetchFailed."""
        try:
            return await self._follow(httpx.URL(url), self._receive_page, self._check_robots)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, zlib.error) as e:
            raise self._translate(e) from e

    async def _follow(
        self,
        url: httpx.URL,
        receive: Callable[[httpx.Response], Awaitable[T]],
        allow: Callable[[httpx.URL], Awaitable[None]],
    ) -> T:
        """What `receive` makes of the answer behind all redirects; `allow` is asked at each hop.

        The time that `allow` takes does not count.
        """
        left_s = self._settings.timeout_s
        for _ in range(self._settings.max_redirects + 1):
            if url.scheme not in ("http", "https") or not url.host:
                raise FetchFailed("bad_url", f"not an absolute http(s) URL: {url}")
            await allow(url)
            began = time.monotonic()
            with anyio.fail_after(left_s):
                async with self._client.stream("GET", url) as response:
                    if response.next_request is None:
                        return await receive(response)
                    url = response.next_request.url
            left_s -= time.monotonic() - began
        raise FetchFailed("redirects", f"more than {self._settings.max_redirects} redirects")

    async def _receive_page(self, response: httpx.Response) -> Answer:
        status = response.status_code
        if not response.is_success:
            raise FetchFailed("status", f"HTTP {status} {response.reason_phrase}", status)
        kind = response.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind not in HTML_TYPES + TEXT_TYPES:
            raise FetchFailed("content_type", f"neither HTML nor text: {kind or 'unknown'}", status)
        limit = self._settings.max_body_bytes
        body = await _read(response, limit)
        if len(body) > limit:
            raise FetchFailed("too_large", f"the page has more than {limit} bytes", status)
        return Answer(str(response.url), status, kind, response.charset_encoding, body)

    async def _check_robots(self, url: httpx.URL) -> None:
        if not self._settings.obey_robots:
            return
        source = url.join("/robots.txt")
        rules = self._robots.setdefault(source, _Rules())
        # Who comes first fetches for all. If it is cancelled meanwhile, the next one does.
        async with rules.lock:
            if rules.parsed is None:
                rules.parsed = await self._fetch_robots(source)
        if not rules.parsed.can_fetch(str(url), self._settings.user_agent):
            raise FetchFailed("robots", f"robots.txt of {url.host} does not allow {url}")

    async def _fetch_robots(self, url: httpx.URL) -> Protego:
        """The rules at `url`, after RFC 9309, section 2.3.1.

        4xx: all is allowed; 5xx: nothing is. Where RFC 9309 forbids everything on a host that does
        not answer at all, this allows it: the page is asked for next, and its own error is then
        the one that is reported.
        """
        from protego import Protego

        try:
            text = await self._follow(url, _receive_robots, _allow_all)
        except (httpx.HTTPError, TimeoutError, zlib.error, FetchFailed):
            text = ""
        return Protego.parse(text)

    def _translate(self, e: Exception) -> FetchFailed:
        match e:
            case httpx.ConnectTimeout():
                seconds = self._settings.connect_timeout_s
                return FetchFailed("timeout", f"no connection within {seconds:g} s")
            case httpx.TimeoutException():
                seconds = self._settings.read_timeout_s
                return FetchFailed("timeout", f"nothing came for {seconds:g} s")
            case TimeoutError():
                return FetchFailed("timeout", f"not complete in {self._settings.timeout_s:g} s")
            case httpx.InvalidURL():
                return FetchFailed("bad_url", str(e))
            case httpx.ConnectError():
                return FetchFailed("connect", str(e) or "no connection")
            case zlib.error():
                return FetchFailed("encoding", f"the compressed page is broken: {e}")
        return FetchFailed("network", str(e) or type(e).__name__)


@dataclass(slots=True)
class _Rules:
    """The robots.txt of one origin, None until it was fetched."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    parsed: Protego | None = None


async def _allow_all(url: httpx.URL) -> None:
    """robots.txt itself is always allowed (RFC 9309, section 2.2.2)."""


async def _receive_robots(response: httpx.Response) -> str:
    if response.is_server_error:
        return "User-agent: *\nDisallow: /"
    if not response.is_success:
        return ""
    body = await _read(response, _ROBOTS_BYTES)
    return body[:_ROBOTS_BYTES].decode("utf-8-sig", errors="replace")


async def _read(response: httpx.Response, limit: int) -> bytes:
    """The decompressed body, read no further than one byte past `limit`.

    Decompressed here, since a few kB that httpx decompresses can become many MB at once. Raises
    FetchFailed for an encoding other than gzip, zlib.error for a broken one.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip"):
        detail = f"content encoding {encoding!r} was not asked for"
        raise FetchFailed("encoding", detail, response.status_code)
    gzip = zlib.decompressobj(zlib.MAX_WBITS | 16) if "gzip" in encoding else None
    body = bytearray()
    async for part in response.aiter_raw():
        body += part if gzip is None else gzip.decompress(part, limit + 1 - len(body))
        if len(body) > limit:
            return bytes(body[: limit + 1])
    if gzip is not None and body and not gzip.eof:
        raise zlib.error("it ends too early")
    return bytes(body)
