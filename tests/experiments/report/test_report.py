from __future__ import annotations

import csv
import re
from pathlib import Path

import msgspec
import pytest

from experiments.published import published_speed_up, published_ttft_s
from experiments.report.load import load_rows
from experiments.report.measures import by_setting, measured
from experiments.report.run import files_of, main
from experiments.report.tables import tables_of
from experiments.report.timelines import request_timeline, worker_timeline
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


def test_published_figures() -> None:
    assert published_ttft_s("crawler", 4.0)["waiting"] == (0.7521, 4.3418, 5.4011)
    assert published_ttft_s("crawler", 4.0)["fcfs"][1] == pytest.approx(4.3418 / 7.012)
    assert published_speed_up("anns", 0.5)["default"][0] == pytest.approx(0.2060 / 0.1297)
    assert published_ttft_s("crawler", 3.0) == published_speed_up("crawler", 3.0) == {}


def test_the_published_shape(tmp_path: Path) -> None:
    first, second = tables(write(tmp_path / "rows", ROWS))["ttft"]
    assert list(first) == ["QPS", "waiting, s", "streaming default, s", "fcfs", "srpf"]
    assert first["waiting, s"].startswith("0.5900 / ")
    assert first["streaming default, s"].startswith("0.2950 / ")
    assert first["fcfs"] == "4.000x / 4.000x / 4.000x"
    assert second["fcfs"] == ""


def test_beside_the_published_figures(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", ROWS)
    lines = path.read_text().splitlines()[1:]
    rows = load_rows([path])
    ((setting, cells),) = by_setting(measured(rows.requests)).items()
    found = {table.name: table for table in tables_of(setting, cells, rows, None)}["published"]
    assert [line[1] for line in found.rows] == ["waiting"] * 3 + ["fcfs"] * 3 + ["default"] * 3 + [
        "waiting"
    ] * 3
    fcfs = next(line for line in found.rows if line[:3] == ("1", "fcfs", "P50"))
    assert fcfs[3:] == ("0.1475", "0.0307", "4.80", "4.000x", "4.271x", "0.94")
    assert len(lines) == len(ROWS)


def test_agreement_with_the_published_figures(tmp_path: Path) -> None:
    kept = [*requests(None, 0.4), *requests("fcfs", 0.1), *requests("mcps", 0.15)]
    other = [*requests(None, 0.4), *requests("fcfs", 0.1), *requests("mcps", 0.05)]
    notes = [published_note(write(tmp_path / f"{i}", rows)) for i, rows in enumerate((kept, other))]
    # Published at 1 QPS: fcfs 4.271x and 4.874x, mcps 4.317x and 2.927x; here fcfs 4x and 4x.
    assert "3 of 4 are within 25%" in notes[0]
    assert "1 of 1 are kept" in notes[0]
    assert "2 of 4 are within 25%" in notes[1]
    assert "0 of 1 are kept" in notes[1]


def published_note(path: Path) -> str:
    rows = load_rows([path])
    ((setting, cells),) = by_setting(measured(rows.requests)).items()
    found = {table.name: table for table in tables_of(setting, cells, rows, None)}
    return found["published"].note


def test_rows_that_are_not_to_be_compared(tmp_path: Path) -> None:
    manifest = MANIFEST | {"spec": {"name": "cpu"}}
    assert "published" not in tables(write(tmp_path / "rows", ROWS, manifest))


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
    one, two = (list(files_of(rows, 0.3, [])) for _ in range(2))
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


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", [msgspec.structs.replace(row) for row in ROWS[:20]])
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="--out"):
        main([str(path), "--out", str(tmp_path / "file")])
