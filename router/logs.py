"""The log of a router process: JSON for machines, text for a terminal.

A line carries the fields of its context, such as the stream it is about, and its own:

    with log_context(stream_id=stream.id):
        logger.info("replayed", extra={"fields": {"worker": url}})
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from json import dumps
from types import MappingProxyType
from typing import Any

_CONTEXT: ContextVar[Mapping[str, Any]] = ContextVar(
    "log_context",
    default=MappingProxyType({}),
)
_CHATTY = ("httpx", "httpcore")  # a line for every request that the router sends


@contextmanager
def log_context(**fields: Any) -> Iterator[None]:
    """Adds `fields` to every line logged inside, also by tasks started there."""
    token = _CONTEXT.set({**_CONTEXT.get(), **fields})
    try:
        yield
    finally:
        _CONTEXT.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts (ISO 8601, UTC), level, logger, message, the fields, traceback.

    A field does not replace what a line always has. What JSON does not know is written as text.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry = _fields(record) | {
            "ts": _time(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        traceback = _traceback(self, record)
        if traceback:
            entry["traceback"] = traceback
        first = ("ts", "level", "logger", "message")
        ordered = {name: entry.pop(name) for name in first} | entry
        return dumps(ordered, default=str)


class TextFormatter(logging.Formatter):
    """`time level logger [stream] message field=value ...`, then the traceback; local time."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        stream_id = fields.pop("stream_id", None)
        parts = [
            _time(record).astimezone().strftime("%H:%M:%S.%f")[:-3],
            f"{record.levelname:<7}",
            record.name,
            *([] if stream_id is None else [f"[{stream_id}]"]),
            record.getMessage(),
            *(f"{name}={value}" for name, value in fields.items()),
        ]
        line = " ".join(parts)
        traceback = _traceback(self, record)
        return f"{line}\n{traceback}" if traceback else line


def configure(level: str, json: bool) -> None:
    """Sends the log of this process to stderr, from `level` ("info", ...) up.

    Replaces what was configured before. Raises ValueError for an unknown level. uvicorn joins in
    if started with `log_config=None`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if json else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {**_CONTEXT.get(), **getattr(record, "fields", {})}


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, timezone.utc)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The exception and the stack that a line was logged with; empty without."""
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)
