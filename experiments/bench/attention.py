"""The CPU attention against SGLang's `torch_native`: 128 new tokens over 8,192 cached, one thread.

`python -m experiments.bench.attention` prints the table. The measuring runs in processes of its
own (`sglang_stream.engine.cpu.measure`), one for each type of number, with one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

BARS = {("attention", "extend"): 10.0, ("forward", "extend"): 6.0}
"""How many times faster ours must be, by part and phase."""


def run(
    model_path: str | None = None,
    *,
    new: int = 128,
    cached: int = 8192,
    repeats: int = 10,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> list[dict[str, Any]]:
    """One row for each dtype, part ("attention": one layer's call, "forward": the whole model)
    and phase ("extend" by `new` tokens, then "decode" of one).

    A row has `dtype`, `threads`, `part`, `phase`, `new`, `cached`, the `repeats` times of `ours`
    and `stock` in seconds, `ratio` (the medians', stock over ours) and `difference` (the largest
    between the results, over the largest result). `model_path`: None for the small model. Raises
    RuntimeError with the last lines of a measuring process that failed.
    """
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        command = [sys.executable, "-m", "sglang_stream.engine.cpu.measure", "--dtype", dtype]
        command += ["--new", str(new), "--cached", str(cached), "--repeats", str(repeats)]
        if model_path is not None:
            command += ["--model-path", model_path]
        ran = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if ran.returncode != 0:
            raise RuntimeError(f"measuring {dtype} failed:\n" + ran.stderr[-2000:])
        rows += [json.loads(line) for line in ran.stdout.splitlines()]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows, with the bar where there is one."""
    shown = Table(
        title="CPU attention against SGLang's torch_native: one thread, medians in ms",
        box=None,
        padding=(0, 1),
        pad_edge=False,
    )
    for heading in ("dtype", "call", "new + cached"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("stock", "ours", "ratio", "bar", "differ"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        bar = BARS.get((row["part"], row["phase"]))
        shown.add_row(
            row["dtype"],
            f"{row['part']}, {row['phase']}",
            f"{row['new']} + {row['cached']}",
            f"{statistics.median(row['stock']) * 1e3:.1f}",
            f"{statistics.median(row['ours']) * 1e3:.1f}",
            f"{row['ratio']:.1f}",
            "" if bar is None else f"{bar:g} {'met' if row['ratio'] >= bar else 'MISSED'}",
            f"{row['difference']:.0e}",
        )
    return shown


def main() -> None:
    """Measures and prints the table."""
    console = Console()
    with console.status("measuring: some minutes"):
        rows = run()
    console.print(table(rows))


if __name__ == "__main__":
    main()
