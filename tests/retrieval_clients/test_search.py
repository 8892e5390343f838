from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest

from retrieval_clients.search import Found, SearchService, Searxng, Tavily, find_pages
from sglang_stream.errors import InvalidRequest, LimitReached, StreamError, Unauthorized
from tests.retrieval_clients.webserver import Reply, Web

SEARXNG = Searxng("http://searx.test/")
TAVILY = Tavily("tvly-secret")
RESULTS = {
    "results": [
        {"url": "http://a.test/", "title": "A", "content": "About a."},
        {"url": "http://a.test/", "title": "A again", "content": None},
        {"url": "http://b.test/", "title": None},
    ]
}

Answer = Callable[[httpx.Request], httpx.Response]


def find(service: SearchService, answer: Answer, limit: int = 10) -> list[Found]:
    return asyncio.run(
        find_pages("a question", service, limit, transport=httpx.MockTransport(answer))
    )


def test_searxng_is_asked_for_json() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json=RESULTS)

    assert find(SEARXNG, answer) == [
        Found("http://a.test/", "A", "About a."),
        Found("http://b.test/", "", ""),
    ]
    assert str(asked[0].url) == "http://searx.test/search?q=a+question&format=json"


def test_tavily_gets_the_key_and_the_limit() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json=RESULTS)

    assert [page.url for page in find(TAVILY, answer, limit=1)] == ["http://a.test/"]
    assert asked[0].headers["authorization"] == "Bearer tvly-secret"
    assert json.loads(asked[0].content) == {"query": "a question", "max_results": 1}
    assert "secret" not in repr(TAVILY)


@pytest.mark.parametrize(
    ("service", "status", "error", "text"),
    [
        (SEARXNG, 403, InvalidRequest, "formats: \\[html, json\\]"),
        (SEARXNG, 429, LimitReached, "ask more slowly"),
        (SEARXNG, 502, StreamError, "answered 502 Bad Gateway: oh no"),
        (TAVILY, 401, Unauthorized, "API key"),
        (TAVILY, 403, StreamError, "answered 403 Forbidden"),
        (TAVILY, 432, LimitReached, "plan"),
    ],
)
def test_a_refusal_says_what_to_do(
    service: SearchService, status: int, error: type[StreamError], text: str
) -> None:
    with pytest.raises(error, match=text) as raised:
        find(service, lambda _: httpx.Response(status, text="oh no", headers={"Retry-After": "7"}))
    assert type(raised.value) is error
    assert raised.value.retry_after == (7 if status == 429 else None)


@pytest.mark.parametrize("body", ["<html>", "[]", '{"results": [{"title": "no url"}]}', "{}"])
def test_an_answer_of_another_kind_is_an_error(body: str) -> None:
    with pytest.raises(StreamError, match="is it the right address"):
        find(SEARXNG, lambda _: httpx.Response(200, text=body))


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://host", "http://host:port"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="no address of SearXNG"):
        asyncio.run(find_pages("a question", Searxng(url)))


def test_an_empty_query_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not empty"):
        asyncio.run(find_pages(" ", SEARXNG))


def test_a_real_server_is_searched(web: Web) -> None:
    reply = Reply(json.dumps(RESULTS).encode(), headers={"Content-Type": "application/json"})
    web.routes["/search?q=a+question&format=json"] = reply
    found = asyncio.run(find_pages("a question", Searxng(web.base)))
    assert [page.url for page in found] == ["http://a.test/", "http://b.test/"]


def test_a_server_that_does_not_answer_is_given_up(web: Web) -> None:
    web.routes["/search?q=a+question&format=json"] = web.never
    with pytest.raises(StreamError, match=r"did not answer within 0\.2 s"):
        asyncio.run(find_pages("a question", Searxng(web.base, timeout_s=0.2)))


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(StreamError, match="cannot be reached"):
        asyncio.run(find_pages("a question", Searxng("http://127.0.0.1:1")))
