from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.bench.apart import MODES, Load, schedule, table
from experiments.bench.run import main
from experiments.rows import Row, read_rows


def lines_of(rows: Sequence[Row]) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=120).print(table(rows))
    return file.getvalue().splitlines()


def row(mode: str, repeat: int, stream: int, ttft_s: float, **more: Any) -> Row:
    common = {"bench": "apart", "size": 4096, "streams": 2, "tokens": [1, 2], "ready_tokens": 3584}
    said = {"mode": mode, "repeat": repeat, "stream": stream, "ttft_s": ttft_s, "cached_tokens": 0}
    return {**common, **said, **more}


def rows_of_a_run(streaming_s: float = 0.1, resending_s: float = 0.2) -> list[Row]:
    seconds = {"waiting": 1.0, "streaming": streaming_s, "re-sending": resending_s}
    return [
        row(mode, repeat, stream, seconds[mode])
        for repeat in range(3)
        for mode in MODES
        for stream in range(2)
    ]


def test_schedule() -> None:
    loads = list(schedule([4096, 16384], [1, 8], 3))
    assert len(set(loads)) == len(loads) == 2 * 2 * 3 * 3
    firsts = [load.mode for load in loads if (load.size, load.streams) == (4096, 1)][:: len(MODES)]
    assert sorted(firsts) == sorted(MODES)


def test_expected_time_holds_the_arrivals() -> None:
    assert Load(4096, 8, 0, "waiting").expected_s(10.0) == pytest.approx(11.0)
    assert Load(4096, 8, 0, "streaming").expected_s(10.0) == pytest.approx(17.5)


def test_goals() -> None:
    text = "\n".join(lines_of(rows_of_a_run()))
    assert "2 at once" in text
    assert "1,000 (1,000)" in text
    assert text.count("met") == 3
    assert "MISSED" not in text
    slow = lines_of(rows_of_a_run(streaming_s=0.3))
    assert [line.split()[1:3] for line in slow if "MISSED" in line] == [
        ["at", "least"],
        ["at", "most"],
        ["at", "most"],
    ]


def test_prompts_that_were_not_asked_in_all_modes_are_left_out() -> None:
    rows = rows_of_a_run()[:-1]
    assert any("streams measured" in line and " 5" in line for line in lines_of(rows))
    assert any("2 at once" in line for line in lines_of(rows[:2]))


def test_other_tokens_are_shown() -> None:
    rows = rows_of_a_run()
    rows[0]["tokens"] = [9, 9]
    assert any("same tokens" in line and "5 of 6" in line for line in lines_of(rows))


@pytest.mark.long
def test_on_running_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small run on workers apart: rows, their table, and the same table from the file."""
    out = tmp_path / "rows.jsonl"
    few = ["--apart-sizes", "256", "--streams", "2", "--repeats", "1"]
    assert main(["apart", *few, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 at once" in printed
    rows = [row for row in read_rows(out) if row["bench"] == "apart"]
    assert [(row["mode"], row["stream"]) for row in rows] == [
        (mode, stream) for mode in MODES for stream in range(2)
    ]
    assert all(row["ttft_s"] > 0 and row["prompt_tokens"] == 272 for row in rows)
    assert [row["cached_tokens"] for row in rows[:2]] == [0, 0]
    for stream in range(2):
        assert len({tuple(row["tokens"]) for row in rows if row["stream"] == stream}) == 1
    assert main(["--show", str(out)]) == 0
    assert capsys.readouterr().out == printed.partition("The rows are in")[0]
