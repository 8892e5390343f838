"""The way back to one ordinary request, against a server without `/v1/streams`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sglang_stream import stream_chat
from sglang_stream.errors import InvalidRequest
from tests.sglang_stream.sdk.fake_router import serving

MODELS = {"object": "list", "data": [{"id": "served", "object": "model"}]}


class PlainServer:
    """An OpenAI-compatible server that answers "ok"; `missing` is its answer to other paths."""

    def __init__(self) -> None:
        self.url = ""
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.missing: Response = JSONResponse({"detail": "Not Found"}, 404)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", lambda _: JSONResponse(MODELS)),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/streams", lambda _: self.missing, methods=["POST"]),
            ]
        )

    async def _complete(self, request: Request) -> Response:
        self.seen.append((request.url.path, json.loads(await request.body())))
        chat = "chat" in request.url.path
        choice = {"delta": {"content": "ok"}} if chat else {"text": "ok"}
        events = [
            {"object": "x.chunk", "choices": [{"index": 0, **choice}]},
            {"object": "x.chunk", "choices": [], "usage": {"prompt_tokens": 4}},
        ]
        lines = [f"data: {json.dumps(event)}\r\n\r\n" for event in events]
        return StreamingResponse(
            iter([*lines, "data: [DONE]\r\n\r\n"]), media_type="text/event-stream"
        )


@pytest.fixture
def plain() -> Iterator[PlainServer]:
    server = PlainServer()
    with serving(server.app()) as url:
        server.url = url
        yield server


def run(plain: PlainServer, chunks: Any, *args: Any, **options: Any) -> dict[str, Any]:
    stream = stream_chat(chunks, *args, base_url=plain.url, **options)
    with pytest.warns(UserWarning, match="has no /v1/streams"):
        assert "".join(stream) == "ok"
    assert stream.usage is not None
    assert stream.usage.prompt_tokens == 4
    assert stream.usage.stream is None
    assert stream.ttft_s is not None
    return plain.seen[-1][1]


@pytest.mark.parametrize(
    "missing",
    [
        JSONResponse({"detail": "Not Found"}, 404),
        JSONResponse({"detail": "Method Not Allowed"}, 405),
        JSONResponse({"error": {"message": "Invalid URL", "code": "unknown_url"}}, 404),
        Response("<html>nothing here</html>", status_code=404),
    ],
)
def test_all_chunks_go_in_one_chat_request(plain: PlainServer, missing: Response) -> None:
    plain.missing = missing
    system = [{"role": "system", "content": "S"}]
    chunks = ["verbatim ", {"id": "d", "text": "a document"}]
    body = run(plain, chunks, "Q?", messages=system, preamble="P: ", max_tokens=3)
    assert plain.seen[-1][0] == "/v1/chat/completions"
    assert body == {
        "model": "served",
        "messages": [*system, {"role": "user", "content": "P: verbatim a document\n\nQ?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 3,
    }


def test_the_last_list_counts_and_every_document_has_its_blank_line(plain: PlainServer) -> None:
    body = run(plain, [["a"], ["b", {"text": "c"}]], "Q", mode="update", model="m")
    assert body["messages"] == [{"role": "user", "content": "b\n\nc\n\nQ"}]
    assert body["model"] == "m"


def test_prompts_of_text_and_of_token_ids(plain: PlainServer) -> None:
    assert run(plain, ["b"], "c", prompt="a")["prompt"] == "abc"
    assert run(plain, [[2], [3]], input_ids=[1], question_ids=[4])["prompt"] == [1, 2, 3, 4]
    assert {path for path, _ in plain.seen} == {"/v1/completions"}


@pytest.mark.filterwarnings("ignore:.*has no /v1/streams")
@pytest.mark.parametrize(
    ("chunks", "options"),
    [
        ([[1, 2]], {}),
        (["text"], {"input_ids": [1]}),
        ([[1]], {"input_ids": [1], "question": "Q"}),
        (["text"], {"question_ids": [1]}),
    ],
)
def test_texts_and_ids_cannot_be_mixed(plain: PlainServer, chunks: Any, options: Any) -> None:
    with pytest.raises(InvalidRequest, match="cannot mix"):
        list(stream_chat(chunks, base_url=plain.url, **options))


def test_it_says_so_once(plain: PlainServer) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            list(stream_chat(["a"], base_url=plain.url))
    assert len(caught) == 1
    assert plain.url in str(caught[0].message)
