"""The document that the router serves about itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI

from router.openapi import CALLS, document, routes
from router.schemas import ChunksBody, ContextBody, GenerateBody, OpenBody
from router.server import create_app
from tests.router.conftest import error_of, router_config


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(router_config("http://127.0.0.1:1"))


@pytest.fixture(scope="module")
def described(app: FastAPI) -> dict[str, Any]:
    return document(app)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_route_is_described_and_nothing_else(app: FastAPI) -> None:
    assert set(routes(app)) == set(CALLS)


def test_a_route_without_a_description_is_an_error(app: FastAPI) -> None:
    async def handler() -> None: ...

    other = FastAPI()
    other.add_api_route("/v1/streams", handler, methods=["GET"])
    assert list(document(other)["paths"]) == ["/v1/streams"]
    other.add_api_route("/more/{name:path}", handler, methods=["PUT"])
    with pytest.raises(LookupError, match=r"PUT /more/\{name\}"):
        document(other)


def test_it_is_a_document_that_tools_can_use(described: dict[str, Any]) -> None:
    operations = schemathesis.openapi.from_dict(described).get_all_operations()
    assert {(o.ok().method.upper(), o.ok().path) for o in operations} == set(CALLS)
    names = [o["operationId"] for path in described["paths"].values() for o in path.values()]
    assert len(names) == len(set(names))


def test_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    found = set(references(described))
    assert found
    for reference in found:
        node = described
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


@pytest.mark.parametrize("model", [OpenBody, ChunksBody, ContextBody, GenerateBody])
def test_bodies_are_those_that_are_parsed(described: dict[str, Any], model: Any) -> None:
    schema = described["components"]["schemas"][model.__name__]
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == model.model_fields.keys()


def test_refusals(described: dict[str, Any]) -> None:
    append = described["paths"]["/v1/streams/{stream_id}/chunks"]["post"]
    assert list(append["responses"]) == ["202", *"401 403 404 409 413 422 429 503".split()]
    responses = described["components"]["responses"]
    assert "`seq_gap`" in responses["E409"]["description"]
    assert responses["E429"]["headers"]["Retry-After"]["required"]


def test_it_is_served_with_a_page(client: httpx.Client) -> None:
    answer = client.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.json()["paths"].keys() == {path for _, path in CALLS}
    page = client.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text


@pytest.mark.parametrize("timeout", ["-1", "soon", "nan", "inf"])
def test_a_flush_with_a_timeout_that_is_none(client: httpx.Client, timeout: str) -> None:
    refused = client.post("/flush_cache", params={"timeout": timeout})
    fields = error_of(refused, 422)
    assert fields["code"] == "malformed"
    assert fields["param"] == "query.timeout"
