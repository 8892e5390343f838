"""Rows of the runner and of the simulator, as they are in their files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from experiments.published import PublishedName
from experiments.request_row import CellRow, EventRow, LoadRow, RequestRow
from experiments.rows import Row
from experiments.spec import differing
from sglang_stream.errors import InvalidRequest

_CellId = tuple[str | None, ...]

_decode = msgspec.json.Decoder(RequestRow | EventRow | CellRow).decode


@dataclass
class Rows:
    """What is in some files. `published`: which published table the rows of a source, machine and
    workload are to be compared with; `broken_off`: how many rows of cells without an end were left
    out."""

    requests: list[RequestRow] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)
    cells: list[CellRow] = field(default_factory=list)
    manifests: list[Row] = field(default_factory=list)
    published: dict[tuple[str, str, str], PublishedName] = field(default_factory=dict)
    broken_off: int = 0

    @property
    def goodput_ttft_s(self) -> float | None:
        """The strictest objective of the specifications."""
        limits = [(row.get("spec") or {}).get("goodput_ttft_ms") for row in self.manifests]
        known = [limit for limit in limits if limit is not None]
        return min(known) / 1e3 if known else None


def load_rows(paths: Sequence[Path]) -> Rows:
    """All rows of these files. Raises InvalidRequest that names the file and the line, and if two
    files have the same cell, or different loads or engines under one name."""
    rows, origins = Rows(), _Origins()
    for path in paths:
        _load(path, rows, origins)
    if not rows.requests:
        names = ", ".join(map(str, paths))
        raise InvalidRequest(f"{names}: no request of a complete cell: run `replay` or `simulate`")
    return rows


class _Origins:
    """Where cells come from, so that nothing is put together that is not alike."""

    def __init__(self) -> None:
        self._cells: dict[_CellId, Path] = {}
        self._specs: dict[tuple[str, ...], tuple[Path, Row]] = {}

    def add(self, path: Path, row: LoadRow, spec: Row) -> None:
        """Raises InvalidRequest if the cell of `row` does not belong with those before."""
        other = self._cells.setdefault(_cell_of(row), path)
        if other != path:
            raise InvalidRequest(
                f"{path} and {other} both have the cell {row.mode} {row.stream_policy or ''} "
                f"{row.qps:g} QPS, seed {row.seed} of {row.workload}: give one of them"
            )
        self._compare(path, spec, "workload", row.workload)
        self._compare(path, spec, "engine", row.workload, row.source, row.machine)

    def _compare(self, path: Path, spec: Row, part: str, *of: str) -> None:
        fields = spec.get(part) or {}
        other, known = self._specs.setdefault((part, *of), (path, fields))
        names = differing(known, fields)
        if names:
            raise InvalidRequest(
                f"{path} and {other} are of different {part}s with the name {of[0]} "
                f"({', '.join(names)}): report them apart"
            )


def _load(path: Path, rows: Rows, origins: _Origins) -> None:
    own: list[tuple[_CellId, LoadRow]] = []
    cells: dict[_CellId, tuple[LoadRow, Row]] = {}
    spec: Row = {}
    for row in _read(path):
        if isinstance(row, LoadRow):
            cell = _cell_of(row)
            own.append((cell, row))
            cells.setdefault(cell, (row, spec))
        else:
            rows.manifests.append(row)
            spec = row.get("spec") or {}
    ended = {cell for cell, row in own if isinstance(row, CellRow) or row.source == "simulator"}
    for cell, (row, spec) in cells.items():
        if cell not in ended:
            continue
        origins.add(path, row, spec)
        if spec.get("published") is not None:
            rows.published[row.source, row.machine, row.workload] = spec["published"]
    for cell, row in own:
        if cell not in ended:
            rows.broken_off += 1
            continue
        match row:
            case RequestRow():
                rows.requests.append(row)
            case EventRow():
                rows.events.append(row)
            case CellRow():
                rows.cells.append(row)


def _read(path: Path) -> Iterator[LoadRow | Row]:
    """The rows of a file, one after the other; manifests as they are."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield json.loads(line) if b'"manifest"' in line[:100] else _decode(line)
                except (ValueError, msgspec.MsgspecError) as e:
                    if number > 1 and not line.endswith((b"}", b"\n")):
                        return  # broken off within the row
                    what = f"{path}, line {number}: this is no row of a load: {e}"
                    raise InvalidRequest(what) from e
    except OSError as e:
        raise InvalidRequest(f"{path}: {e.strerror}: `replay` and `simulate` write rows") from e


def _cell_of(row: LoadRow) -> _CellId:
    cell = (row.source, row.machine, row.workload, row.mode, row.stream_policy, row.placement)
    return *cell, str(row.qps), str(row.seed)
