from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.bench.counters import counted_since, parse_counters
from experiments.bench.pressure import POLICIES, Cell, cells_of
from experiments.bench.pressure_table import table
from experiments.bench.run import main
from experiments.rows import Row, read_rows
from sglang_stream.errors import InvalidRequest

PAGE = """\
# TYPE sglang_stream_passes_total counter
sglang_stream_passes_total{policy="srpf"} 12.0
# TYPE sglang_stream_preemptions_total counter
sglang_stream_preemptions_total{kind="recompute",policy="srpf"} 3.0
sglang_stream_preemptions_total{kind="swap",policy="srpf"} 4.0
# TYPE sglang_stream_odd_events_total counter
sglang_stream_odd_events_total{kind="gap"} 7.0
# TYPE sglang_stream_open_streams gauge
sglang_stream_open_streams 2.0
"""


def lines_of(rows: Sequence[Row]) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=160).print(table(rows))
    return file.getvalue().splitlines()


def rows_of(
    policy: str | None, ttft_s: float, count: int = 200, kind: str = "soft", **counted: int
) -> list[Row]:
    cell: dict[str, Any] = {
        "bench": "pressure",
        "workload": "ann",
        "mode": "streaming" if policy else "waiting",
        "stream_policy": policy,
        "invalidation": kind if policy else None,
        "rate": 2.0,
        "pool_tokens": 2000,
        "seed": 0,
    }
    requests = [
        cell
        | {"what": "request", "number": i, "arrival_s": i / 2, "ttft_s": ttft_s * (1 + i / count)}
        | {"end_s": i / 2 + 8 + ttft_s}
        for i in range(count)
    ]
    last = {"what": "cell", "makespan_s": 100.0, "output_tokens": 8 * count, "requests": count}
    return [*requests, cell | last | counted]


def test_cells() -> None:
    cells = cells_of("crawler,ann", POLICIES)
    assert len(set(cells)) == len(cells) == 7 + 8
    assert cells[0] == Cell("crawler", "waiting")
    assert cells[0].flags == []
    assert [cell.name for cell in cells if cell.invalidation == "hard"] == ["slack:hard"]
    assert cells[-1].workload == "ann"
    assert cells[-1].flags == ["--stream-policy", "slack", "--invalidation", "hard"]
    assert cells_of("crawler", "fcfs:hard") == []  # nothing is invalidated there


@pytest.mark.parametrize(
    ("loads", "policies", "what"),
    [
        ("web", "fcfs", "--loads web"),
        ("", "fcfs", "--loads"),
        ("ann", "lifo", "--policies lifo"),
        ("ann", "fcfs:firm", "--policies fcfs:firm"),
    ],
)
def test_unknown_cells_are_refused(loads: str, policies: str, what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        cells_of(loads, policies)


def test_counters() -> None:
    counted = parse_counters(PAGE)
    assert counted == {"passes": 12, "preemptions_recompute": 3, "preemptions_swap": 4}
    assert counted_since({"passes": 2.0}, counted)["passes"] == 10
    assert counted_since({}, counted)["preemptions_swap"] == 4


def test_policies_are_told_as_ratios_over_waiting() -> None:
    rows = [
        *rows_of(None, 0.4),
        *rows_of("fcfs", 0.2, preemptions_recompute=5, preemptions_swap=6),
        *rows_of("srpf", 0.1, recomputed_tokens=1500, swapped_tokens=700, restored_tokens=300),
    ]
    text = "\n".join(lines_of(rows))
    assert "ann: 2 requests a second, a pool of 2,000 tokens" in text
    assert "(2.00x)" in text
    assert "(4.00x)" in text
    assert "5 + 6" in text
    assert "1.5" in text
    assert "0.7 / 0.3" in text
    assert "16.0" in text
    assert "fcfs / srpf at P95: 2.00 (2.00 to 2.00) met" in text
    assert "FEW" not in text


def test_goals_that_are_missed() -> None:
    rows = [*rows_of(None, 0.4), *rows_of("fcfs", 0.2), *rows_of("slack", 0.9, count=50)]
    text = "\n".join(lines_of(rows))
    assert "fcfs / slack at P95: 0.14" in text
    assert "(slack) MISSED" in text
    assert "50 FEW" in text


def test_soft_against_hard() -> None:
    counted = {"found_again_tokens": 1234, "invalidated_tokens": 5678}
    rows = [*rows_of("srpf", 0.1, **counted), *rows_of("srpf", 0.2, kind="hard")]
    text = "\n".join(lines_of(rows))
    assert "srpf:hard / soft at P95: 2.00" in text
    assert "found again: 1,234 of 5,678 tokens" in text


def test_refused_requests_are_counted() -> None:
    rows = rows_of("fcfs", 0.1, count=3)
    rows[0] = {k: v for k, v in rows[0].items() if k not in ("ttft_s", "end_s")} | {"failed": "no"}
    assert any("2, 1 failed FEW" in line for line in lines_of(rows))


@pytest.mark.long
def test_on_running_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Waiting and a policy with few requests, in two pieces: rows, and one table of both."""
    out = tmp_path / "rows.jsonl"
    few = ["pressure", "--loads", "ann", "--requests", "6", "--rate", "4", "--out", str(out)]
    assert main([*few, "--policies", "waiting"]) == 0
    assert main([*few, "--policies", "srpf", "--append"]) == 0
    printed = capsys.readouterr().out.rpartition("The rows are in")[0]
    rows = [row for row in read_rows(out) if row["bench"] == "pressure"]
    waiting, streaming = (
        {r["number"]: r for r in rows if r["what"] == "request" and r["mode"] == mode}
        for mode in ("waiting", "streaming")
    )
    assert sorted(waiting) == sorted(streaming) == list(range(6))
    for number, row in streaming.items():
        assert row["last_chunk_s"] == waiting[number]["last_chunk_s"]
        assert row["prompt_tokens"] == waiting[number]["prompt_tokens"]
        assert row["last_chunk_s"] <= row["seal_s"] <= row["first_token_s"] <= row["end_s"]
        assert row["usage"]["updates"] > 0
        assert waiting[number]["cached_tokens"] == 0
    cells = [row for row in rows if row["what"] == "cell"]
    assert [cell["stream_policy"] for cell in cells] == [None, "srpf"]
    assert all(cell["output_tokens"] == 48 for cell in cells)
    assert cells[0]["passes"] == 0
    assert cells[1]["passes"] > 0
    assert main(["--show", str(out)]) == 0
    assert printed.endswith(capsys.readouterr().out)
