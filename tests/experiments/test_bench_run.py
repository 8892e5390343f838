from __future__ import annotations

import io
import json
from operator import itemgetter
from pathlib import Path

import pytest
from rich.console import Console

from experiments.bench import lcp, traffic
from experiments.bench.run import main
from experiments.rows import RowFile, manifest, read_rows
from sglang_stream.errors import InvalidRequest


def test_common_prefix_table() -> None:
    rows = [{"bench": "lcp", "tokens": 131072, "seconds": s} for s in (5e-5, 6e-5, 4e-3)]
    file = io.StringIO()
    Console(file=file, width=100).print(lcp.table(rows))
    assert all(word in file.getvalue() for word in ("131,072", "60.0", "4000.0", "met"))
    slow = [{**row, "seconds": 1.1e-4} for row in rows]
    Console(file=file, width=100).print(lcp.table(slow))
    assert "MISSED" in file.getvalue()


def test_common_prefix_is_timed() -> None:
    rows = lcp.measure()
    assert len(rows) == 200
    assert all(row["tokens"] == 128 * 1024 and 0 < row["seconds"] < 1 for row in rows)


def test_manifest_tells_where_it_ran() -> None:
    row = manifest("/somewhere/model", ["--dtype", "float32"], 7)
    assert json.loads(json.dumps(row)) == row
    assert row["model"] == "model"
    assert row["versions"]["sglang"]
    assert row["cores"] >= 1
    assert row["cpu"]


def test_rows_are_kept_one_by_one(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "deep" / "rows.jsonl")
    file.add({"a": 1})
    file.add({"b": [1, 2]})
    assert read_rows(file.path) == [{"a": 1}, {"b": [1, 2]}]
    with pytest.raises(InvalidRequest, match="--out"):
        RowFile(file.path / "below-a-file")
    file.path.write_text("no rows")
    with pytest.raises(InvalidRequest, match="holds no rows"):
        read_rows(file.path)


@pytest.mark.parametrize("sizes", ["", "12", "2048,", "many", "-8"])
def test_sizes_must_be_multiples_of_the_chunks(sizes: str) -> None:
    with pytest.raises(InvalidRequest, match="multiples of 8"):
        main(["lcp", f"--sizes={sizes}"])


def test_wrong_arguments_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing-of-that-name"]) == 2
    assert "nothing-of-that-name" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "re-sending" in capsys.readouterr().out


@pytest.mark.long
def test_on_the_running_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole small run: rows, their tables, and the same tables from the file."""
    out = tmp_path / "rows.jsonl"
    assert main(["ttft", "lcp", "--sizes", "256", "--repeats", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "256 tokens" in printed
    assert "131,072" in printed
    rows = read_rows(out)
    assert rows[0]["bench"] == "manifest"
    measured = [row for row in rows if row["bench"] == "ttft"]
    assert [row["mode"] for row in measured] == [
        *("waiting", "limit", "streaming", "re-sending", "streaming", "re-sending")
    ]
    assert all(row["ttft_s"] > 0 and row["prompt_tokens"] == 272 for row in measured)
    assert all(row["tokens"] == measured[0]["tokens"] for row in measured)
    assert [row["cached_tokens"] for row in measured[:2]] == [0, 224]
    assert measured[2]["computed_tokens"] >= measured[2]["ready_tokens"] > 0

    assert main(["--show", str(out)]) == 0
    assert capsys.readouterr().out == printed.partition("The rows are in")[0]


@pytest.mark.long
def test_traffic_on_running_engines(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["traffic", "--rounds", "1", "--out", str(out)]) == 0
    rows = [row for row in read_rows(out) if row["bench"] == "traffic"]
    plain, streams = (
        [
            row["tokens"]
            for row in sorted(rows, key=itemgetter("pair", "wave"))
            if row["server"] == s
        ]
        for s in ("plain", "streams")
    )
    assert len(plain) == traffic.PAIRS * traffic.WAVES
    assert plain == streams
