"""Log lines: JSON that a machine reads back, text for a terminal, fields of a context."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from router.identity import worker_tag
from router.logs import JsonFormatter, TextFormatter, configure, log_context
from router.moves import Moves
from router.worker import Worker
from tests.router.conftest import opened, until
from tests.router.rig import rig

logger = logging.getLogger("router.some")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    chatty = {name: logging.getLogger(name).level for name in ("httpx", "httpcore")}
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    for name, before in chatty.items():
        logging.getLogger(name).setLevel(before)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", json=True)
    logger.info("moved %d\nstreams", 2, extra={"fields": {"worker": "http://w", "path": {1}}})
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    entry = json.loads(text)
    assert list(entry) == ["ts", "level", "logger", "message", "worker", "path"]
    at = datetime.fromisoformat(entry.pop("ts").replace("Z", "+00:00"))
    assert abs(at - datetime.now(timezone.utc)) < timedelta(seconds=60)
    assert entry == {
        "level": "info",
        "logger": "router.some",
        "message": "moved 2\nstreams",
        "worker": "http://w",
        "path": "{1}",
    }


def test_an_exception_is_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", json=True)
    try:
        raise KeyError("gone")
    except KeyError:
        logger.exception("failed")
    logger.info("nothing raised", exc_info=True)
    failed, quiet = lines(capsys)
    assert failed["level"] == "error"
    assert failed["traceback"].startswith("Traceback (most recent call last):\n")
    assert failed["traceback"].endswith("KeyError: 'gone'")
    assert "traceback" not in quiet


def test_fields_do_not_replace_what_every_line_has(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", json=True)
    with log_context(level="x", message="y"):
        logger.info("text", extra={"fields": {"logger": "z", "ts": 0}})
    (entry,) = lines(capsys)
    assert (entry["level"], entry["message"], entry["logger"]) == ("info", "text", "router.some")
    assert entry["ts"] != 0


def test_contexts_nest_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", json=True)
    with log_context(stream_id="st-1", worker="a"):
        with log_context(worker="b", request_id="r"):
            logger.info("inner", extra={"fields": {"request_id": "own"}})
        logger.info("outer")
    logger.info("none")
    inner, outer, none = lines(capsys)
    assert (inner["stream_id"], inner["worker"], inner["request_id"]) == ("st-1", "b", "own")
    assert (outer["stream_id"], outer["worker"]) == ("st-1", "a")
    assert "request_id" not in outer
    assert "stream_id" not in none


def test_each_task_has_its_own_context(capsys: pytest.CaptureFixture[str]) -> None:
    async def handle(stream_id: str) -> None:
        with log_context(stream_id=stream_id):
            await asyncio.sleep(0)  # the other one sets its own
            await asyncio.create_task(say(stream_id))

    async def say(stream_id: str) -> None:
        logger.info(stream_id)

    async def main() -> None:
        await asyncio.gather(handle("st-1"), handle("st-2"))

    configure("info", json=True)
    asyncio.run(main())
    found = lines(capsys)
    assert {entry["stream_id"] for entry in found} == {"st-1", "st-2"}
    assert all(entry["stream_id"] == entry["message"] for entry in found)


def test_text_shows_the_stream(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", json=False)
    with log_context(stream_id="st-1"):
        logger.warning("replayed", extra={"fields": {"worker": "http://w"}})
    logger.info("ready")
    about_stream, about_none = capsys.readouterr().err.splitlines()
    clock = r"\d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(
        rf"{clock} WARNING router.some \[st-1\] replayed worker=http://w", about_stream
    )
    assert re.fullmatch(rf"{clock} INFO    router.some ready", about_none)


def test_text_ends_with_the_traceback() -> None:
    try:
        raise KeyError("gone")
    except KeyError as e:
        error = (type(e), e, e.__traceback__)
    record = logging.LogRecord("router", logging.ERROR, __file__, 1, "failed", (), error)
    first, second, *_, last = TextFormatter().format(record).splitlines()
    assert first.endswith("ERROR   router failed")
    assert second == "Traceback (most recent call last):"
    assert last == "KeyError: 'gone'"


def test_configure_replaces_and_quietens(capsys: pytest.CaptureFixture[str]) -> None:
    configure("debug", json=False)
    configure("info", json=True)
    logger.debug("too fine")
    logging.getLogger("httpx").info("HTTP Request: ...")
    logger.info("once")
    assert [entry["message"] for entry in lines(capsys)] == ["once"]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        configure("loud", json=True)


class Kept(logging.Handler):
    """Keeps what is logged, as it would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))

    def named(self, text: str) -> list[Any]:
        """The streams of the lines that begin with `text`."""
        return [line.get("stream_id") for line in self.lines if line["message"].startswith(text)]


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler = Kept()
    root = logging.getLogger("router")
    root.addHandler(handler)
    root.setLevel("INFO")
    yield handler
    root.removeHandler(handler)
    root.setLevel(logging.NOTSET)


def test_lines_name_the_stream_that_they_are_about(
    tokenizer_dir: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, ask = Moves.find, Worker.ask

    async def logged_find(*args: Any) -> Any:
        logger.info("finding")
        return await find(*args)

    async def logged_ask(*args: Any) -> Any:
        logger.info("asking")
        return await ask(*args)

    monkeypatch.setattr(Moves, "find", logged_find)
    monkeypatch.setattr(Worker, "ask", logged_ask)
    with rig(tokenizer_dir, "unified", "unified", routers=1) as made:
        (router,) = made.routers
        stream = opened(router)
        assert kept.named("asking") == [stream], "of its opening"
        first = made.holder(router, stream)
        second = made.other(first)
        assert kept.named("finding") == [stream], "of a look at it"
        made.lose(first)
        moved = f"stream {stream} goes on"
        until(lambda: kept.named(moved) == [stream])
        made.reset()
        until(lambda: stream not in made.workers[first].streams)
        router.delete(f"/workers/{worker_tag(second)}")
        until(lambda: kept.named(moved) == [stream, stream])
        until(lambda: stream not in made.workers[second].streams)
        router.delete(f"/v1/streams/{stream}")
        assert set(kept.named("finding")) == set(kept.named("asking")) == {stream}
