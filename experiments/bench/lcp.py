"""The longest common prefix of two 128k-token prompts, which every update has to find."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

from rich.table import Table

from experiments.rows import Row
from experiments.stats import verdict
from sglang_stream.errors import EngineFailure

GOAL_S = 100e-6


def measure() -> list[Row]:
    """One row for each comparison, with its `tokens` and `seconds`, timed in a process of the
    engine's. Raises EngineFailure with its last words if it fails."""
    command = [sys.executable, "-m", "sglang_stream.engine.measure"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EngineFailure(f"comparing prompts failed:\n{done.stderr[-2000:]}")
    return [{"bench": "lcp", **json.loads(line)} for line in done.stdout.splitlines()]


def table(rows: Sequence[Row]) -> Table:
    """Median and worst comparison, in microseconds."""
    shown = Table(title="Longest common prefix of two prompts that differ in their last token")
    for heading in ("tokens", "comparisons", "median us", "worst us", f"at most {GOAL_S * 1e6:g}"):
        shown.add_column(heading, justify="right")
    for tokens in sorted({row["tokens"] for row in rows}):
        times = [row["seconds"] for row in rows if row["tokens"] == tokens]
        shown.add_row(
            f"{tokens:,}",
            str(len(times)),
            f"{median(times) * 1e6:.1f}",
            f"{max(times) * 1e6:.1f}",
            verdict(median(times) <= GOAL_S),
        )
    return shown
