"""The rows of a run that may break off and go on: complete cells are kept, others run again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from experiments.cells import Cell
from experiments.request_row import CellRow, LoadRow
from experiments.rows import Row, RowFile
from experiments.spec import differing
from sglang_stream.errors import InvalidRequest

_KEYS = ("mode", "stream_policy", "placement", "qps", "seed")
_CellId = tuple[Any, ...]


class Ledger:
    """A file of rows, new or to go on with.

    `conditions`: all that the rows of its cells depend on, in every manifest as `conditions`. What
    a cell left that was broken off is dropped, and so is a manifest that no complete cell follows.
    Raises InvalidRequest if the file has cells of other conditions or rows of another kind, or
    cannot be written.
    """

    def __init__(self, path: Path, conditions: Row) -> None:
        self.path = path
        kept, self._ended = _complete(_whole_rows(path) if path.exists() else [])
        for row in kept:
            if row.get("bench") == "manifest" and row.get("conditions") != _plain(conditions):
                what = ", ".join(differing(row.get("conditions") or {}, _plain(conditions)))
                raise InvalidRequest(
                    f"--out {path} holds rows of other conditions ({what}): give another file, or "
                    "delete this one",
                    param="--out",
                )
        if path.exists():
            _rewrite(path, kept)
        self._file = RowFile(path, append=True)

    def missing(self, cells: list[Cell]) -> list[Cell]:
        """Those of `cells` that are not complete."""
        return [cell for cell in cells if _id_of_cell(cell) not in self._ended]

    def start(self, manifest: Row) -> None:
        """Says where the rows that follow come from."""
        self._file.add(manifest)

    def add(self, row: LoadRow) -> None:
        """Appends a row; it is in the file when this returns."""
        fields = msgspec.to_builtins(row)
        self._file.add(fields)
        if isinstance(row, CellRow):
            self._ended.add(_id_of(fields))


def _whole_rows(path: Path) -> list[Row]:
    """All rows; a last one that was not written to its end is left out. Raises InvalidRequest."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidRequest(f"--out {path} cannot be gone on with: {e}", param="--out") from e
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
            if number == len(lines) and rows:
                continue
        known = isinstance(row, dict) and ("kind" in row or row.get("bench") == "manifest")
        if not known:
            raise InvalidRequest(
                f"--out {path}, line {number}: this is no row of `replay`: give another file",
                param="--out",
            )
        rows.append(row)
    return rows


def _complete(rows: list[Row]) -> tuple[list[Row], set[_CellId]]:
    """The rows of complete cells, each manifest before those of its run; the cells."""
    ended = {_id_of(row) for row in rows if row.get("kind") == "cell"}
    kept: list[Row] = []
    manifest: Row | None = None
    for row in rows:
        if row.get("bench") == "manifest":
            manifest = row
        elif _id_of(row) in ended:
            kept += [row] if manifest is None else [manifest, row]
            manifest = None
    return kept, ended


def _rewrite(path: Path, rows: list[Row]) -> None:
    """Puts `rows` in the file's place, all or none."""
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(new, path)
    except OSError as e:
        raise InvalidRequest(f"--out {path}: {e.strerror}", param="--out") from e


def _id_of(row: Row) -> _CellId:
    return tuple(row.get(key) for key in _KEYS)


def _id_of_cell(cell: Cell) -> _CellId:
    return cell.mode, cell.policy, cell.placement, cell.qps, cell.seed


def _plain(row: Row) -> Row:
    """As it is when it has been a line of JSON."""
    return dict(json.loads(json.dumps(row)))
