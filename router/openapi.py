"""The router's OpenAPI document: a description of each route, and how they become one document.

A route that nothing here describes is an error, so the document cannot fall behind the server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from router.openapi_schemas import COMPONENTS, ref
from router.schemas import Body, ChunksBody, ContextBody, GenerateBody, OpenBody, WorkerBody
from sglang_stream.errors import StreamError

JSON = "application/json"
SSE = "text/event-stream"
TEXT = "text/plain"

Schema = Mapping[str, Any]

EVENTS: Schema = {
    "description": "Each server-sent event; the last has the data `[DONE]`.",
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}

_NAME = str.maketrans({"/": "_", "{": None, "}": None})

_ANYWHERE = (401, 403)
"""What any call may be answered where API keys are in use."""


@dataclass(frozen=True)
class Call:
    """One method of one route.

    `status`: of the answer to a call that succeeds. `answer`: its content, a schema by media type.
    `refusals`: the statuses of the errors it may meet, besides those any call may. `body`: one of
    our models or a schema. `text`: more than the summary says. `errors`: the schemas, by status, of
    errors that have one of their own.
    """

    summary: str
    answer: Mapping[str, Schema]
    status: int = 200
    refusals: tuple[int, ...] = ()
    body: type[Body] | Schema | None = None
    text: str = ""
    query: Mapping[str, Schema] = field(default_factory=dict)
    errors: Mapping[int, Schema] = field(default_factory=dict)


_FLUSH = Call(
    "Empties the prefix cache of every worker.",
    {JSON: ref("Flushed")},
    refusals=(422, 503),
    query={"timeout": {"type": "number", "minimum": 0}},
    errors={503: ref("NotFlushed")},
)
_FORWARDED = (400, 404, 413, 422, 429, 503)
_OF_A_WORKER = dict.fromkeys(_FORWARDED, ref("WorkerError"))

CALLS: Mapping[tuple[str, str], Call] = {
    ("POST", "/v1/streams"): Call(
        "Opens a stream.",
        {JSON: ref("Stream")},
        201,
        (400, 404, 413, 422, 429, 503),
        OpenBody,
    ),
    ("GET", "/v1/streams"): Call(
        "The caller's open streams.",
        {JSON: ref("StreamList")},
        text="Those that this router knows: it has opened them, or has served a call of theirs. "
        "Behind a load balancer each router lists a part, and one stream may be listed by several. "
        "GET /v1/streams/{stream_id} finds a stream through every router.",
    ),
    ("GET", "/v1/streams/{stream_id}"): Call(
        "A stream's state and usage.", {JSON: ref("Stream")}, refusals=(404, 503)
    ),
    ("DELETE", "/v1/streams/{stream_id}"): Call(
        "Aborts a stream.", {JSON: ref("Deleted")}, refusals=(404, 503)
    ),
    ("POST", "/v1/streams/{stream_id}/chunks"): Call(
        "Adds chunks to an append stream.",
        {JSON: ref("Appended")},
        202,
        (404, 409, 413, 422, 429, 503),
        ChunksBody,
    ),
    ("PUT", "/v1/streams/{stream_id}/context"): Call(
        "Replaces the context of an update stream.",
        {JSON: ref("Updated")},
        202,
        (404, 409, 413, 422, 429, 503),
        ContextBody,
    ),
    ("POST", "/v1/streams/{stream_id}/generate"): Call(
        "Seals a stream and generates.",
        {JSON: ref("Completion"), SSE: EVENTS},
        refusals=(400, 404, 409, 413, 422, 429, 503),
        body=GenerateBody,
    ),
    ("POST", "/v1/chat/completions"): Call(
        "An ordinary chat completion, by a worker.",
        {JSON: {"type": "object"}, SSE: EVENTS},
        refusals=_FORWARDED,
        body=ref("ChatCompletionRequest"),
        errors=_OF_A_WORKER,
    ),
    ("POST", "/v1/completions"): Call(
        "An ordinary completion of a text or of token ids, by a worker.",
        {JSON: {"type": "object"}, SSE: EVENTS},
        refusals=_FORWARDED,
        body=ref("CompletionRequest"),
        errors=_OF_A_WORKER,
    ),
    ("GET", "/v1/models"): Call(
        "The models that are served.",
        {JSON: ref("ModelList")},
        refusals=(413, 503),
        errors=_OF_A_WORKER,
    ),
    ("GET", "/v1/models/{model}"): Call(
        "One model.", {JSON: ref("Model")}, refusals=(404, 413, 503), errors=_OF_A_WORKER
    ),
    ("GET", "/health"): Call("Whether the router runs.", {}),
    ("GET", "/readiness"): Call(
        "Whether a worker can take a stream.", {JSON: ref("Readiness")}, refusals=(503,)
    ),
    ("GET", "/workers"): Call("The workers and their health.", {JSON: ref("Workers")}),
    ("POST", "/workers"): Call(
        "Takes another worker.", {JSON: ref("Worker")}, 202, (400, 413, 422), WorkerBody
    ),
    ("DELETE", "/workers/{worker_id}"): Call(
        "Drains a worker, then stops using it.",
        {JSON: ref("Worker")},
        202,
        (404,),
        text="Nothing new is placed on it. Its open streams are replayed on other workers; while "
        "there is none they stay, and are served. Answers that run on it end undisturbed. When "
        "nothing is left on it, its link closes and it is no longer listed by GET /workers, which "
        "until then shows it as draining; POST /workers with its URL takes it back. Each router "
        "has a list of its own.",
    ),
    ("GET", "/flush_cache"): _FLUSH,
    ("POST", "/flush_cache"): _FLUSH,
    ("GET", "/metrics"): Call("Prometheus metrics.", {TEXT: {"type": "string"}}),
}


def describe(app: FastAPI) -> None:
    """Lets `app` answer with the document of its own routes, which is made when first asked for."""
    made: list[dict[str, Any]] = []

    def openapi() -> dict[str, Any]:
        if not made:
            made.append(document(app))
        return made[0]

    app.openapi = openapi  # type: ignore[method-assign]


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the routes of `app`. Raises LookupError for one unknown here."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path in routes(app):
        call = CALLS.get((method, path))
        if call is None:
            raise LookupError(f"nothing describes {method} {path}")
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, call)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "sglang-stream",
            "summary": "Prompts whose context is still being retrieved",
            "version": version("sglang-stream"),
        },
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "responses": {f"E{status}": _refusal(status) for status in _statuses()},
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, where the router was given some.",
                }
            },
        },
    }


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and path of each route; a path without the convertors of its parameters."""
    for route in app.routes:
        if isinstance(route, APIRoute):
            for method in sorted(route.methods or ()):
                yield method, route.path_format


def _operation(method: str, path: str, call: Call) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(call.status).phrase}
    if call.answer:
        answer["content"] = {media: {"schema": schema} for media, schema in call.answer.items()}
    responses: dict[str, Any] = {str(call.status): answer}
    for status in (*call.refusals, *_ANYWHERE):
        own = call.errors.get(status)
        shared = {"$ref": f"#/components/responses/E{status}"}
        responses[str(status)] = _refusal(status, own) if own else shared
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{path.translate(_NAME)}",
        "summary": call.summary,
        "responses": dict(sorted(responses.items())),
    }
    if call.text:
        operation["description"] = call.text
    parameters = [_parameter(name, "path", {"type": "string"}) for name in _names(path)]
    parameters += [_parameter(name, "query", schema) for name, schema in call.query.items()]
    if parameters:
        operation["parameters"] = parameters
    if call.body is not None:
        schema = ref(call.body.__name__) if isinstance(call.body, type) else call.body
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return operation


def _names(path: str) -> list[str]:
    """The parameters of a path."""
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


def _parameter(name: str, where: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


def _statuses() -> list[int]:
    """All statuses of errors that some call documents."""
    return sorted({s for call in CALLS.values() for s in (*call.refusals, *_ANYWHERE)})


def _refusal(status: int, schema: Schema | None = None) -> dict[str, Any]:
    """The answer of an error: which codes it may have, and its object."""
    codes = sorted(cls.code for cls in _errors(StreamError) if cls.status == status)
    described = HTTPStatus(status).phrase
    if codes:
        described += ": " + ", ".join(f"`{code}`" for code in codes)
    refusal: dict[str, Any] = {
        "description": described,
        "content": {JSON: {"schema": schema or ref("Error")}},
    }
    if status in (429, 503):
        refusal["headers"] = {
            "Retry-After": {
                "description": "Seconds after which to try again.",
                "required": status == 429,
                "schema": {"type": "integer", "minimum": 1},
            }
        }
    return refusal


def _errors(cls: type[StreamError]) -> Iterator[type[StreamError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _errors(sub)


def _schemas() -> dict[str, Any]:
    bodies = [c.body for c in CALLS.values() if isinstance(c.body, type)]
    _, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    return dict(sorted({**definitions["$defs"], **COMPONENTS}.items()))
