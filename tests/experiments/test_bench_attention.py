from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from experiments.bench.attention import run, table


def render(rows: list[dict[str, Any]]) -> list[str]:
    console = Console(file=io.StringIO(), width=160)
    console.print(table(rows))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def row(**values: Any) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "part": "attention",
        "phase": "extend",
        "new": 128,
        "cached": 8192,
        "ours": [0.1, 0.2, 9.0],
        "stock": [3.0, 2.0, 1.0],
        "ratio": 10.0,
        "difference": 1e-6,
        **values,
    }


def test_table_shows_medians_and_bars() -> None:
    met = next(line for line in render([row()]) if "float32" in line)
    assert "2000.0" in met
    assert "200.0" in met
    assert "10 met" in met
    missed = render([row(part="forward", ratio=5.9)])
    assert any("6 MISSED" in line for line in missed)
    decode = next(line for line in render([row(phase="decode")]) if "decode" in line)
    assert "met" not in decode


@pytest.mark.long
def test_measures_the_same_results_on_both_sides() -> None:
    rows = run(new=16, cached=500, repeats=3, dtypes=["float32"])
    assert [(r["part"], r["phase"]) for r in rows] == [
        ("attention", "extend"),
        ("forward", "extend"),
        ("attention", "decode"),
        ("forward", "decode"),
    ]
    assert all(r["threads"] == 1 and len(r["ours"]) == len(r["stock"]) == 3 for r in rows)
    assert all(r["difference"] < 1e-4 for r in rows)
    assert rows[0]["ratio"] > 2


def test_a_failed_measurement_tells_why() -> None:
    with pytest.raises(RuntimeError, match="no-such-model"):
        run("/no-such-model", dtypes=["float32"])
