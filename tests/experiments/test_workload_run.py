from __future__ import annotations

from pathlib import Path

import pytest

from experiments.rows import read_rows
from experiments.workload.comparison import Compared, compare
from experiments.workload.generator import generate
from experiments.workload.run import as_row, main
from experiments.workload.shapes import Document, Query, Step
from sglang_stream.errors import InvalidRequest


def test_the_table_and_the_queries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "queries.jsonl"
    assert main(["--queries", "40", "--seed", "3", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "crawler: 40 queries" in shown
    assert "anns: 40 queries" in shown
    for word in ("tokens", "retrieval s", "chunks", "gap s", "P95", "28,372", "ratio", "met"):
        assert word in shown
    made = [*generate("crawler", 40, 3), *generate("anns", 40, 3)]
    assert read_rows(out) == [as_row(query) for query in made]


def test_one_workload_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["anns", "--queries", "10", "--rest", "last"]) == 0
    assert "crawler" not in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--queries", "0"], ["books"], ["--rest", "middle"]])
def test_wrong_flags_are_named(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert args[0].lstrip("-") in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="--out"):
        main(["--queries", "1", "--out", str(tmp_path)])


def test_a_comparison_by_hand() -> None:
    def query(*times: float) -> Query:
        return Query("q", "append", tuple(Step(s, (Document("d", 10),)) for s in times))

    rows = {
        (row.quantity, row.figure): row.ours
        for row in compare("crawler", [query(2.0, 3.0, 6.0), query(4.0)], "first")
    }
    assert rows["tokens", "mean"] == 20
    assert rows["retrieval s", "P50"] == 5
    assert (rows["chunks", "min"], rows["chunks", "max"], rows["chunks", "mean"]) == (1, 3, 2)
    assert (rows["gap s", "mean"], rows["gap s", "P50"]) == (2, 2)
    last = {
        (row.quantity, row.figure): row.ours
        for row in compare("crawler", [query(2.0, 3.0, 6.0), query(4.0)], "last")
    }
    assert last["gap s", "mean"] == 1.5


def test_within_is_five_percent_either_way() -> None:
    assert Compared("tokens", "P50", 100, 105).within
    assert Compared("tokens", "P50", 100, 95).within
    assert not Compared("tokens", "P50", 100, 105.2).within
    assert not Compared("tokens", "P50", 100, 94.8).within
