"""Errors become HTTP answers here, once, all in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sglang_stream.errors import EngineFailure, Malformed, StreamError, Unauthorized


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """`content` (what msgspec can encode) as a JSON answer."""
    return Response(
        msgspec.json.encode(content),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def error_response(error: StreamError) -> Response:
    """The answer to a call that failed with `error`."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return json_response({"error": error.to_fields()}, error.status, headers)


def malformed(error: ValidationError) -> Malformed:
    """The first thing wrong with a body, and the field it is in."""
    return _first_of(error.errors(include_url=False, include_input=False, include_context=False))


def _first_of(errors: Sequence[Any]) -> Malformed:
    first, *others = errors
    param = ".".join(str(part) for part in first["loc"]) or None
    text = f"{param}: {first['msg']}" if param else first["msg"]
    if others:
        text += f" (and {len(others)} more)"
    return Malformed(text, param=param)


def install_error_handlers(app: FastAPI) -> None:
    """Gives every error of `app` OpenAI's shape, those of the framework too."""

    async def stream_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, StreamError)
        return error_response(error)

    async def framework_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        fields = {
            "message": str(error.detail),
            "type": "invalid_request_error" if error.status_code < 500 else "server_error",
            "code": HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"),
            "param": None,
        }
        return json_response({"error": fields}, error.status_code, dict(error.headers or {}))

    async def bad_parameter(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_first_of(error.errors()))

    async def client_gone(_: Request, error: Exception) -> Response:
        return error_response(Malformed("the body ended early"))

    async def unforeseen(_: Request, error: Exception) -> Response:
        return error_response(EngineFailure("the router failed: its log says why"))

    app.add_exception_handler(StreamError, stream_error)
    app.add_exception_handler(HTTPException, framework_error)
    app.add_exception_handler(RequestValidationError, bad_parameter)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(Exception, unforeseen)
