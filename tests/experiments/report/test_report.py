from __future__ import annotations

import csv
import re
from pathlib import Path

import msgspec
import pytest

from experiments.report.load import load_rows
from experiments.report.measures import by_setting, measured
from experiments.report.run import files_of, main
from experiments.report.tables import tables_of
from experiments.report.timelines import request_timeline, worker_timeline
from experiments.rows import Row
from sglang_stream.errors import InvalidRequest
from tests.experiments.report.hand_made import MANIFEST, end, event, requests, write

ROWS = [
    *requests(None, 0.4),
    *requests("fcfs", 0.1),
    *requests(None, 0.4, qps=2.0),
    *requests("default", 0.2),
    *requests("srpf", 0.1),
]
EVENTS = [
    event("chunk", 1.0, query_id="q1", tokens=9),
    event("pass", 1.1, query_id="q1", worker="prefill-0", seconds=0.2, tokens=9),
    event("first_token", 2.0, query_id="q1"),
]


def tables(path: Path, goodput_s: float | None = None) -> dict[str, list[dict[str, str]]]:
    rows = load_rows([path])
    ((setting, cells),) = by_setting(measured(rows.requests)).items()
    return {
        table.name: list(csv.DictReader(table.as_csv().splitlines()))
        for table in tables_of(setting, cells, rows, goodput_s)
    }


def test_the_published_shape(tmp_path: Path) -> None:
    first, second = tables(write(tmp_path / "rows", ROWS))["ttft"]
    assert list(first) == ["QPS", "waiting, s", "streaming default, s", "fcfs", "srpf"]
    assert first["waiting, s"].startswith("0.5900 / ")
    assert first["streaming default, s"].startswith("0.2950 / ")
    assert first["fcfs"] == "4.000x / 4.000x / 4.000x"
    assert second["fcfs"] == ""


def test_rows_that_are_not_to_be_compared(tmp_path: Path) -> None:
    manifest = MANIFEST | {"spec": {"name": "cpu"}}
    assert "published" not in tables(write(tmp_path / "rows", ROWS, manifest))


def test_percentiles_by_seed(tmp_path: Path) -> None:
    one, *_ = tables(write(tmp_path / "one", ROWS))["percentiles"]
    assert "seeds, P50" not in one
    rows = [*requests("fcfs", 0.1), *requests("fcfs", 0.2, seed=1)]
    (two,) = tables(write(tmp_path / "two", rows))["percentiles"]
    assert two["seeds, P50"] == "0.1475 to 0.2950"
    assert "over waiting, P50" not in two


def test_goodput(tmp_path: Path) -> None:
    lines = tables(write(tmp_path / "rows", ROWS), 0.305)["goodput"]
    shares = {(line["QPS"], line[""]): line["share of requests"] for line in lines}
    assert shares["1", "waiting"] == "0.0%"
    assert shares["1", "default"] == "55.0%"
    assert shares["1", "fcfs"] == "100.0%"


def test_broken_off_cells_of_an_engine_are_left_out(tmp_path: Path) -> None:
    whole, part = requests(None, 0.4, source="engine"), requests("fcfs", 0.1, source="engine")
    rows = load_rows([write(tmp_path / "rows", [*whole, end(whole), *part])])
    assert len(rows.requests) == rows.broken_off == 20


def test_a_row_cut_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", ROWS)
    path.write_text(path.read_text()[:-30])
    assert len(load_rows([path]).requests) == len(ROWS) - 1


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "no request of a complete cell"),
        ('{"kind": "request"}\n', "line 1: this is no row of a load"),
        ("what?\n{}\n", "line 1: this is no row of a load"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match=what):
        load_rows([path])


def test_a_cell_in_two_files(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, requests("fcfs", 0.1)) for name in ("one", "two"))
    with pytest.raises(InvalidRequest, match=r"two and .*one both have the cell streaming fcfs 1"):
        load_rows([one, two])


def spec_of(part: str, **fields: int) -> Row:
    return MANIFEST | {"spec": {"name": "main", part: fields}}


def test_other_loads_under_one_name(tmp_path: Path) -> None:
    """Those of the simulator and of an engine, too; they are compared with each other."""
    engine = requests("fcfs", 0.1, source="engine", machine="2 cores")
    one = write(tmp_path / "one", requests("fcfs", 0.1), spec_of("workload", queries=20, seed=0))
    two = write(tmp_path / "two", [*engine, end(engine)], spec_of("workload", queries=40, seed=0))
    with pytest.raises(InvalidRequest, match=r"of different workloads .*crawler \(queries\)"):
        load_rows([one, two])


def test_other_engines_under_one_name(tmp_path: Path) -> None:
    one = write(tmp_path / "one", requests("fcfs", 0.1), spec_of("engine", kv_tokens=10))
    two = write(tmp_path / "two", requests("lcas", 0.1), spec_of("engine", kv_tokens=20))
    with pytest.raises(InvalidRequest, match=r"of different engines .*crawler \(kv_tokens\)"):
        load_rows([one, two])
    other = requests("lcas", 0.1, machine="h200")
    assert load_rows([one, write(tmp_path / "two", other, spec_of("engine", kv_tokens=20))])


def test_what_no_table_has_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = [
        msgspec.structs.replace(row, ttft_s=None, end_s=None, failed="no room")
        for row in requests("fcfs", 0.1)
    ]
    broken = requests("lcas", 0.1, source="engine")
    path = write(tmp_path / "rows", [*requests(None, 0.4), *failed, *broken])
    assert main([str(path), "--out", str(tmp_path / "report")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "report" / "index.html").read_text()
    for text in (
        "Left out: 20 rows of cells that were broken off.",
        "fcfs at 1 QPS, where none of 20 requests was answered (no room).",
    ):
        assert text in printed
        assert text in page


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"gone\.jsonl: No such file"):
        load_rows([tmp_path / "gone.jsonl"])


def test_timelines() -> None:
    stream, worker = request_timeline(EVENTS), worker_timeline(EVENTS)
    assert stream is not None
    assert worker is not None
    assert "q1" in stream.caption
    (axes,) = stream.figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["pass", "first token", "chunk"]
    (axes,) = worker.figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["decode", "q1"]
    assert request_timeline([]) is None
    assert worker_timeline([e for e in EVENTS if e.worker is None]) is None


def test_the_same_rows_give_the_same_files(tmp_path: Path) -> None:
    rows = load_rows([write(tmp_path / "rows", [*ROWS, *EVENTS])])
    one, two = (list(files_of(rows, 0.3, [], [])) for _ in range(2))
    assert one == two
    names = {file.name.rpartition("/")[2] for file in one}
    assert names == {
        "index.html",
        *(f"{table}.{kind}" for table in TABLES for kind in ("md", "csv")),
        *(f"{figure}.{kind}" for figure in FIGURES for kind in ("svg", "png")),
    }


TABLES = ("ttft", "published", "percentiles", "throughput", "goodput", "counters")
FIGURES = (
    *("ttft-ccdf", "ttft-qps", "completion", "invalidated-ccdf"),
    *("timeline-stream", "timeline-worker"),
)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    engine = requests("fcfs", 0.1, source="engine", machine="2 <cores>")
    path = write(tmp_path / "rows", [*ROWS, *EVENTS, *engine, end(engine)])
    out = tmp_path / "report"
    assert main([str(path), "--out", str(out), "--goodput", "ttft:250"]) == 0
    page = (out / "index.html").read_text()
    assert not re.search(r'(?:src|href)="(?!#)', page.replace("xlink:href", "href"))
    assert "2 &lt;cores&gt;" in page
    assert '<span class="mark engine">measured</span>' in page
    assert '<span class="mark simulator">simulated</span>' in page
    assert "within 250 ms" in page
    assert "recompute-swap" not in page
    assert "computed again" in page  # the profile that the rows name
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_has_the_simulator_against_the_engine(tmp_path: Path) -> None:
    engine = requests("fcfs", 0.1, source="engine", machine="2 <cores>")
    path = write(tmp_path / "rows", [*ROWS, *engine, end(engine)])
    assert main([str(path), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "crawler: the simulator against the engine" in page
    assert "Simulated on h200-tp2, measured on 2 &lt;cores&gt;" in page
    folder = tmp_path / "report" / "against-engine-crawler-h200-tp2-2-cores"
    assert {file.name for file in folder.iterdir()} == {"against-engine.md", "against-engine.csv"}


def test_the_folder_that_is_written_without_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows", ROWS[:20])
    monkeypatch.chdir(tmp_path)
    assert main([str(path)]) == 0
    assert (tmp_path / "report" / "index.html").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", [msgspec.structs.replace(row) for row in ROWS[:20]])
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="--out"):
        main([str(path), "--out", str(tmp_path / "file")])
