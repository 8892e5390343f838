"""Traces: what a retrieval brought, and when. Readers of the published formats, and our own.

    crawler_traces(folder)   query_<n>.csv: `type`, `query`, `endTime` (s), `content`
    anns_traces(map)         query_trace_map_5k.json: {query id: {"query", "trace_file"}};
                             trace files: `StartTime_us`, `EndTime_us`, `PipelinePool`;
                             retrieved_corpus_content.part.*.json: {document id: text}
    recorded_traces(file)    one JSON object a line, as `write_trace` writes it
    read_gaps(file)          seconds between two arrivals, one number a line

The published formats are those of Stream2LLM (arXiv 2604.16395). A bad row raises InvalidRequest
that names the file, the line and the reason; with `on_bad="skip"` it is left out with a warning,
and so is a query of which nothing can be read. Files are read as the traces are asked for.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from sglang_stream.errors import InvalidRequest

logger = logging.getLogger(__name__)

OnBad = Literal["stop", "skip"]
TraceMode = Literal["append", "update"]

_QUERY_FILE = re.compile(r"query_(\d+)\.csv")
_CORPUS_FILES = "retrieved_corpus_content.part.*.json"
# Beside the map or, as published, in this folder beside it.
_TRACE_FOLDERS = (".", "res")
_LONGEST_FIELD = 1 << 30  # characters; a page is one field of its row


class TraceDocument(NamedTuple):
    """A page or a passage."""

    id: str
    text: str


class TraceStep(NamedTuple):
    """What came `at_s` seconds after the query began: documents to append or, in update mode, the
    whole list."""

    at_s: float
    documents: tuple[TraceDocument, ...]


class Trace(msgspec.Struct, frozen=True):
    """The retrieval for one query; its steps in the order of time, at least one."""

    query_id: str
    query: str
    mode: TraceMode
    steps: tuple[TraceStep, ...]

    def __post_init__(self) -> None:
        times = [step.at_s for step in self.steps]
        if not times:
            raise ValueError("it has no steps")
        if not all(map(math.isfinite, times)) or times[0] < 0 or times != sorted(times):
            raise ValueError("its steps are not in the order of time")


class _BadRow(Exception):
    """Why a row cannot be read."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


def crawler_traces(folder: Path, on_bad: OnBad = "stop") -> Iterator[Trace]:
    """The published crawler traces of a folder, in the order of their numbers.

    A page without content brings nothing and is left out; so is a query without any, of which the
    published data set has 13. Raises InvalidRequest, also if the folder holds no traces.
    """
    files = {int(m[1]): p for p in _listed(folder) if (m := _QUERY_FILE.fullmatch(p.name))}
    if not files:
        raise InvalidRequest(f"{folder} holds no query_<n>.csv: name the folder of crawler traces")
    for number in sorted(files):
        trace = _crawler_trace(files[number], f"query_{number}", on_bad)
        if trace is not None:
            yield trace


def _crawler_trace(path: Path, query_id: str, on_bad: OnBad) -> Trace | None:
    query: str | None = None
    steps: list[TraceStep] = []
    try:
        for line, row in _csv_rows(path, ("type", "query", "endTime", "content"), on_bad):
            try:
                at_s = _seconds(line, "endTime", row["endTime"])
                if row["type"] == "tavily_search":
                    query = row["query"]
                elif row["type"] != "page_scrape":
                    raise _BadRow(
                        line, f"type {row['type']!r} is neither tavily_search nor page_scrape"
                    )
                elif row["content"].strip():
                    document = TraceDocument(f"{query_id}/{line}", row["content"])
                    steps.append(TraceStep(at_s, (document,)))
            except _BadRow as e:
                _refuse(path, e, on_bad)
        if not query:
            raise _BadRow(1, "no row of type tavily_search tells the query")
    except _BadRow as e:
        _refuse(path, e, on_bad)
        return None
    if not steps:
        logger.warning("skipped %s: no page has content", path)
        return None
    steps.sort(key=lambda step: step.at_s)
    return Trace(query_id, query, "append", tuple(steps))


def anns_traces(query_map: Path, on_bad: OnBad = "stop") -> Iterator[Trace]:
    """The published ANNS traces of a query map, in its order.

    Each row of a trace file is one list, which comes when the row's time, `EndTime_us` less
    `StartTime_us`, is over; rows follow on each other. Raises InvalidRequest, also if the map or
    the texts cannot be read.
    """
    corpus: dict[str, str] = {}
    for part in sorted(_listed(query_map.parent, _CORPUS_FILES)):
        for document, text in _json_object(part).items():
            if isinstance(text, str):
                corpus[document] = text
            else:
                _refuse(part, _BadRow(0, f"document {document} is no text"), on_bad)
    if not corpus:
        raise InvalidRequest(f"{query_map.parent} holds no {_CORPUS_FILES}: put the texts there")
    for query_id, entry in _json_object(query_map).items():
        try:
            query, path = _map_entry(query_map, query_id, entry)
            trace = _anns_trace(path, query_id, query, corpus, on_bad)
        except _BadRow as e:
            _refuse(query_map, e, on_bad)
            continue
        if trace is not None:
            yield trace


def _map_entry(query_map: Path, query_id: str, entry: Any) -> tuple[str, Path]:
    """The query and its trace file."""
    fields = entry if isinstance(entry, dict) else {}
    query, name = fields.get("query"), fields.get("trace_file")
    if not isinstance(query, str) or not isinstance(name, str):
        raise _BadRow(0, f"query {query_id} has no text 'query' or no text 'trace_file'")
    for folder in _TRACE_FOLDERS:
        path = query_map.parent / folder / name
        if path.is_file():
            return query, path
    raise _BadRow(0, f"query {query_id} has the trace file {name}, which is not there")


def _anns_trace(
    path: Path, query_id: str, query: str, corpus: Mapping[str, str], on_bad: OnBad
) -> Trace | None:
    steps: list[TraceStep] = []
    at_us, before = 0.0, -math.inf
    columns = ("StartTime_us", "EndTime_us", "PipelinePool")
    try:
        for line, row in _csv_rows(path, columns, on_bad):
            try:
                start = _seconds(line, "StartTime_us", row["StartTime_us"])
                end = _seconds(line, "EndTime_us", row["EndTime_us"])
                if end < start:
                    raise _BadRow(line, f"EndTime_us {end:g} is before StartTime_us {start:g}")
                if start < before:
                    raise _BadRow(line, f"StartTime_us {start:g} is before the row above")
                before = start
                at_us += end - start
                ids = _pool(line, row["PipelinePool"])
                unknown = [i for i in ids if i not in corpus]
                if unknown:
                    raise _BadRow(line, f"document {unknown[0]} is not in {_CORPUS_FILES}")
                documents = tuple(TraceDocument(i, corpus[i]) for i in ids)
                steps.append(TraceStep(at_us / 1e6, documents))
            except _BadRow as e:
                _refuse(path, e, on_bad)
    except _BadRow as e:
        _refuse(path, e, on_bad)
        return None
    if not any(step.documents for step in steps):
        logger.warning("skipped %s: no list has documents", path)
        return None
    return Trace(query_id, query, "update", tuple(steps))


def _pool(line: int, text: str) -> list[str]:
    """The ids of a tuple written as text: "(17, 4)"."""
    inner = re.fullmatch(r"\s*\((.*)\)\s*", text)
    if inner is None:
        raise _BadRow(line, f"PipelinePool {text!r} is not a tuple of document ids")
    ids = [part.strip().strip("'\"") for part in inner[1].split(",")]
    if not ids[-1]:
        ids.pop()  # "()" and "(17,)"
    if not all(ids):
        raise _BadRow(line, f"PipelinePool {text!r} has an empty document id")
    return ids


def recorded_traces(path: Path, on_bad: OnBad = "stop") -> Iterator[Trace]:
    """The traces of a file that `write_trace` wrote. Raises InvalidRequest."""
    try:
        with path.open("rb") as lines:
            for line, raw in enumerate(lines, start=1):
                try:
                    yield _DECODER.decode(raw)
                except (msgspec.DecodeError, UnicodeDecodeError) as e:
                    _refuse(path, _BadRow(line, str(e)), on_bad)
    except OSError as e:
        raise InvalidRequest(f"{path}: {e.strerror}") from e


def write_trace(path: Path, trace: Trace) -> None:
    """Adds a trace to a file. Raises InvalidRequest if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as lines:
            lines.write(msgspec.json.encode(trace) + b"\n")
    except OSError as e:
        raise InvalidRequest(f"{path}: {e.strerror}") from e


def read_gaps(path: Path) -> list[float]:
    """Seconds between two arrivals; the first one's before the first arrival.

    Raises InvalidRequest: with one gap left out, the arrivals would be others.
    """
    gaps = []
    for line, text in enumerate(_text(path).splitlines(), start=1):
        try:
            gaps.append(_seconds(line, "the gap", text))
        except _BadRow as e:
            raise InvalidRequest(f"{path}, line {line}: {e.reason}") from e
    if not gaps:
        raise InvalidRequest(f"{path} is empty: write one gap in seconds on each line")
    return gaps


_DECODER = msgspec.json.Decoder(Trace)


def _refuse(path: Path, bad: _BadRow, on_bad: OnBad) -> None:
    """Raises what is wrong or, to skip it, only says so."""
    where = f"{path}, line {bad.line}" if bad.line else str(path)
    if on_bad == "stop":
        raise InvalidRequest(
            f'{where}: {bad.reason}. Mend it, or leave such rows out with on_bad = "skip"',
            param="on_bad",
        )
    logger.warning("skipped %s: %s", where, bad.reason)


def _csv_rows(
    path: Path, columns: tuple[str, ...], on_bad: OnBad
) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row with the line it ends on. Raises _BadRow if the file is no table with them."""
    csv.field_size_limit(_LONGEST_FIELD)  # the module's own, which is less than a page may have
    try:
        with path.open(newline="", encoding="utf-8") as text:
            reader = csv.DictReader(text, strict=True)
            missing = [c for c in columns if c not in (reader.fieldnames or ())]
            if missing:
                raise _BadRow(1, f"there is no column {missing[0]}")
            for row in reader:
                if None in row or None in row.values():  # too many fields, too few
                    reason = f"the row has not {len(reader.fieldnames or ())} fields"
                    _refuse(path, _BadRow(reader.line_num, reason), on_bad)
                else:
                    yield reader.line_num, row
    except OSError as e:
        raise _BadRow(0, e.strerror or str(e)) from e
    except UnicodeDecodeError as e:
        raise _BadRow(0, f"it is no UTF-8 text ({e.reason} at byte {e.start})") from e
    except csv.Error as e:
        raise _BadRow(reader.line_num, str(e)) from e


def _seconds(line: int, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _BadRow(line, f"{name} {text!r} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise _BadRow(line, f"{name} {text!r} is not a time of 0 or more")
    return value


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as e:
        raise InvalidRequest(f"{path}, line {e.lineno}: {e.msg}") from e
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} is not a JSON object")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise InvalidRequest(f"{path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise InvalidRequest(f"{path} is no UTF-8 text ({e.reason} at byte {e.start})") from e


def _listed(folder: Path, pattern: str = "*") -> list[Path]:
    if not folder.is_dir():
        raise InvalidRequest(f"{folder}: there is no such folder")
    return list(folder.glob(pattern))
