"""Rows of a run, kept as JSON lines while it goes on, and the row that says where it ran."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from sglang_stream.errors import InvalidRequest

Row = dict[str, Any]

_PACKAGES = ("sglang-stream", "sglang", "torch", "numpy")


class RowFile:
    """A file of rows, new or to be added to. Raises InvalidRequest if it cannot be written."""

    def __init__(self, path: Path, *, append: bool = False) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a" if append else "w").close()
        except OSError as e:
            raise InvalidRequest(f"--out {path}: {e.strerror}", param="--out") from e
        self.path = path

    def add(self, row: Row) -> None:
        """Appends one row; it is in the file when this returns."""
        self.extend([row])

    def extend(self, rows: Iterable[Row]) -> None:
        """Appends many rows at once."""
        with self.path.open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. Raises InvalidRequest if it is none of ours."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as e:
        raise InvalidRequest(f"{path} holds no rows: {e}") from e


def manifest(model_path: str, flags: Sequence[str], seed: int) -> Row:
    """What was measured, by which versions, on which machine."""
    return {
        "bench": "manifest",
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": Path(model_path).name,
        "flags": list(flags),
        "seed": seed,
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "commit": source_commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
    }


def machine_of(manifest: Row) -> str:
    """The machine of a manifest, by its GPUs or else its cores."""
    gpus = manifest["gpus"]
    if gpus:
        return ", ".join(f"{gpus.count(gpu)}x {gpu}" for gpu in dict.fromkeys(gpus))
    return f"{manifest['cores']} cores of {manifest['cpu']}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """The commit of this source tree, with `-dirty` for changes; None outside a checkout."""
    return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    return (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
