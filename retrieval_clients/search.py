"""Seeds for the crawler: the pages that a search service finds for a question.

    seeds = await find_pages(question, Searxng("http://localhost:8080"))
    async for text in stream_chat(crawl(page.url for page in seeds), question):
        ...

SearXNG is a search service to run oneself (its settings must list `json` under `search: formats`);
Tavily is one on the internet that needs a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from sglang_stream.errors import InvalidRequest, LimitReached, StreamError, Unauthorized

_TAVILY_MOST_RESULTS = 20


@dataclass(frozen=True, slots=True)
class Found:
    """A page found. `snippet`: what the service shows of it, perhaps ""."""

    url: str
    title: str
    snippet: str


@dataclass(frozen=True, slots=True)
class Searxng:
    """A SearXNG instance. `timeout_s`: seconds for all of an answer."""

    base_url: str
    timeout_s: float = 10.0

    name = "SearXNG"

    def request(self, query: str, limit: int) -> httpx.Request:
        # It has no field for the number of results: a page of them is some 10 to 30.
        url = f"{self.base_url.rstrip('/')}/search"
        return httpx.Request("GET", url, params={"q": query, "format": "json"})

    def refusal(self, response: httpx.Response) -> StreamError | None:
        """What is particular to this service about a status that is no success."""
        if response.status_code == 403:
            return InvalidRequest(
                f"{self.base_url} gives no JSON: add it in the instance's settings.yml, "
                "`search: formats: [html, json]`"
            )
        return None


@dataclass(frozen=True, slots=True)
class Tavily:
    """Tavily with its API key. `timeout_s`: seconds for all of an answer."""

    api_key: str = field(repr=False)
    base_url: str = "https://api.tavily.com"
    timeout_s: float = 20.0

    name = "Tavily"

    def request(self, query: str, limit: int) -> httpx.Request:
        return httpx.Request(
            "POST",
            f"{self.base_url.rstrip('/')}/search",
            headers={"Authorization": f"Bearer {self.api_key}"},
            json={"query": query, "max_results": min(limit, _TAVILY_MOST_RESULTS)},
        )

    def refusal(self, response: httpx.Response) -> StreamError | None:
        """What is particular to this service about a status that is no success."""
        if response.status_code == 401:
            return Unauthorized("Tavily does not accept the API key: take it from app.tavily.com")
        if response.status_code in (432, 433):
            return LimitReached("the Tavily plan's searches are used up: raise its limit, or wait")
        return None


SearchService = Searxng | Tavily


async def find_pages(
    query: str,
    service: SearchService,
    limit: int = 10,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
) -> list[Found]:
    """At most `limit` pages for `query`, best first, each URL once; none if none are found.

    Raises InvalidRequest for an empty query or an address that is none, Unauthorized, LimitReached,
    and StreamError if the service does not answer in time or not as it should.
    """
    if not query.strip() or limit < 1:
        raise InvalidRequest("a search needs a query that is not empty, and a limit of 1 or more")
    try:
        with anyio.fail_after(service.timeout_s):
            async with httpx.AsyncClient(timeout=service.timeout_s, transport=transport) as client:
                response = await client.send(service.request(query, limit))
    except (httpx.TimeoutException, TimeoutError) as e:
        raise StreamError(
            f"{service.name} at {service.base_url} did not answer within {service.timeout_s:g} s"
        ) from e
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as e:
        raise InvalidRequest(
            f"{service.base_url!r} is no address of {service.name}: {e}; write http(s)://host:port"
        ) from e
    except httpx.TransportError as e:
        raise StreamError(f"{service.name} at {service.base_url} cannot be reached: {e}") from e
    if not response.is_success:
        raise service.refusal(response) or _refusal(service, response)
    return _distinct(_results(service, response))[:limit]


def _refusal(service: SearchService, response: httpx.Response) -> StreamError:
    if response.status_code == 429:
        retry = response.headers.get("retry-after", "")
        return LimitReached(
            f"{service.name} takes no more searches for now: ask more slowly",
            retry_after=int(retry) if retry.isdecimal() else None,
        )
    return StreamError(
        f"{service.name} at {service.base_url} answered {response.status_code} "
        f"{response.reason_phrase}: {response.text[:200]}"
    )


def _results(service: SearchService, response: httpx.Response) -> Iterator[Found]:
    """Both services give `results`, a list of objects with `url`, `title` and `content`."""
    try:
        results: list[dict[str, Any]] = response.json()["results"]
        for result in results:
            title, snippet = result.get("title") or "", result.get("content") or ""
            yield Found(str(result["url"]), str(title), str(snippet))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise StreamError(
            f"{service.name} at {service.base_url} gave no search results but "
            f"{response.text[:200]!r}: is it the right address?"
        ) from e


def _distinct(found: Iterable[Found]) -> list[Found]:
    by_url: dict[str, Found] = {}
    for page in found:
        by_url.setdefault(page.url, page)
    return list(by_url.values())
