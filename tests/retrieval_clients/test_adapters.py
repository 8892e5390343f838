from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from retrieval_clients.adapters import langchain_chunks, llama_index_chunks, model_chunks
from sglang_stream.sdk.items import Texts, parse_chunk


class Documents:
    """A LangChain retriever that answers when `gate` is open."""

    def __init__(self, *texts: str, gate: asyncio.Event | None = None) -> None:
        self._texts = texts
        self._gate = gate
        self.cancelled = False

    async def ainvoke(self, query: str) -> list[Any]:
        try:
            if self._gate is not None:
                await self._gate.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return [SimpleNamespace(page_content=f"{t} for {query}", id=None) for t in self._texts]


class Blocking:
    def get_relevant_documents(self, query: str) -> list[Any]:
        return [SimpleNamespace(page_content=f"old for {query}", id="7")]


class Nodes:
    async def aretrieve(self, query: str) -> list[Any]:
        node = SimpleNamespace(node_id="n1", get_content=lambda: f"node for {query}")
        return [SimpleNamespace(node=node, score=0.5)]


class Broken:
    async def ainvoke(self, query: str) -> list[Any]:
        raise ConnectionError("no index")


async def collect(chunks: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in chunks]


def test_retrievers_give_their_documents_as_they_answer_each_text_once() -> None:
    async def run() -> list[Any]:
        gate = asyncio.Event()
        found = []
        async for chunk in langchain_chunks("q", Documents("a", "b", gate=gate), Documents("b")):
            found.append(chunk)
            gate.set()
        return found

    assert asyncio.run(run()) == [{"text": "b for q"}, {"text": "a for q"}]


def test_a_retriever_without_async_methods_is_called_in_a_thread() -> None:
    chunks = asyncio.run(collect(langchain_chunks("q", Blocking())))
    assert chunks == [{"id": "7", "text": "old for q"}]
    assert parse_chunk(chunks[0], 1) == Texts([{"id": "7", "text": "old for q"}])


def test_nodes_come_by_their_ids() -> None:
    chunks = asyncio.run(collect(llama_index_chunks("q", Nodes())))
    assert chunks == [{"id": "n1", "text": "node for q"}]


def test_what_is_no_retriever_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="none of ainvoke, aget_relevant_documents"):
        langchain_chunks("q", Nodes())
    with pytest.raises(TypeError, match="none of aretrieve, retrieve"):
        llama_index_chunks("q", Documents())


def test_a_failure_ends_the_other_retrievers() -> None:
    async def run() -> bool:
        slow = Documents("a", gate=asyncio.Event())
        with pytest.raises(ConnectionError, match="no index"):
            await collect(langchain_chunks("q", slow, Broken()))
        return slow.cancelled

    assert asyncio.run(run())


def test_the_retrievers_of_langchain_itself() -> None:
    retrievers = pytest.importorskip("langchain_core.retrievers")
    documents = pytest.importorskip("langchain_core.documents")

    class Fixed(retrievers.BaseRetriever):  # type: ignore[misc, name-defined]
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Any]:
            return [documents.Document(page_content=f"found for {query}", id="d1")]

    chunks = asyncio.run(collect(langchain_chunks("q", Fixed())))
    assert chunks == [{"id": "d1", "text": "found for q"}]


def test_the_retrievers_of_llama_index_itself() -> None:
    retrievers = pytest.importorskip("llama_index.core.retrievers")
    schema = pytest.importorskip("llama_index.core.schema")

    class Fixed(retrievers.BaseRetriever):  # type: ignore[misc, name-defined]
        def _retrieve(self, query: Any) -> list[Any]:
            node = schema.TextNode(id_="n1", text=f"found for {query.query_str}")
            return [schema.NodeWithScore(node=node, score=0.5)]

    chunks = asyncio.run(collect(llama_index_chunks("q", Fixed())))
    assert chunks == [{"id": "n1", "text": "found for q"}]


class Tokens:
    """A model's stream: pieces, where "|" is a wait until `go`; counts what it was asked for."""

    def __init__(self, *pieces: Any) -> None:
        self._pieces = pieces
        self.go = asyncio.Event()
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for piece in self._pieces:
            if piece == "|":
                await self.go.wait()
            else:
                yield piece

    async def close(self) -> None:
        self.closed = True


def test_pieces_are_gathered_to_chunks_that_end_at_words() -> None:
    words = ["The", " quick", " bro", "wn", " fox", " jumps", " ov", "er", " it", "."]
    chunks = asyncio.run(collect(model_chunks(Tokens(*words), chars=12, seconds=60)))
    assert chunks == ["The quick", " brown fox", " jumps over", " it."]
    assert "".join(chunks) == "".join(words)


def test_what_came_is_not_kept_for_longer_than_asked() -> None:
    async def run() -> list[str]:
        tokens = Tokens("So", " far.", "|", " And on.")
        found = []
        async for chunk in model_chunks(tokens, chars=1000, seconds=0.02):
            found.append(chunk)
            if "".join(found) == "So far.":
                tokens.go.set()
        return found

    found = asyncio.run(run())
    assert "".join(found) == "So far. And on."
    assert len(found) > 1


def test_leaving_early_closes_the_models_stream() -> None:
    async def run() -> bool:
        tokens = Tokens("word " * 10, "|", "never")
        chunks = model_chunks(tokens, chars=5)
        await anext(chunks)
        pending = asyncio.create_task(collect(chunks))
        await asyncio.sleep(0)
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
        return tokens.closed

    assert asyncio.run(run())


def test_an_error_of_the_model_is_raised() -> None:
    async def failing() -> AsyncIterator[str]:
        yield "text"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(collect(model_chunks(failing(), seconds=60)))


def test_events_as_mappings_of_plain_completions_and_of_chats() -> None:
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]},
        {"choices": [{"index": 1, "delta": {"content": "other"}}]},
        {"choices": [{"index": 0, "delta": {"content": "One"}}]},
        {"choices": [{"index": 0, "text": " two"}]},
        {"choices": [], "usage": {"total_tokens": 3}},
    ]
    assert asyncio.run(collect(model_chunks(Tokens(*events), seconds=60))) == ["One two"]


def test_the_stream_of_the_openai_client_itself() -> None:
    openai = pytest.importorskip("openai")
    texts = ["Each", " token", " comes", " alone."]
    parts = [
        {
            "id": "1",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        }
        for text in texts
    ]
    body = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=body, headers={"Content-Type": "text/event-stream"})

    async def run() -> list[str]:
        http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        client = openai.AsyncOpenAI(api_key="k", base_url="http://m.test/v1", http_client=http)
        message = {"role": "user", "content": "Hello"}
        stream = await client.chat.completions.create(model="m", messages=[message], stream=True)
        return await collect(model_chunks(stream, chars=11, seconds=60))

    assert asyncio.run(run()) == ["Each token", " comes", " alone."]
