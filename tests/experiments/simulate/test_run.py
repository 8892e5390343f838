from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cells import Cell
from experiments.report.load import load_rows
from experiments.report.timelines import request_timeline, worker_timeline
from experiments.rows import read_rows
from experiments.server import default_model
from experiments.simulate.run import INTERRUPTED, drawn_of, main
from experiments.spec import load_spec
from experiments.tokens import ModelTokenizer
from retrieval_clients.traces import Trace, TraceDocument, TraceStep, write_trace
from sglang_stream.errors import InvalidRequest

SPECS = Path(__file__).parents[3] / "experiments" / "specs"

SPEC = """
name = "small"
[workload]
kind = "{kind}"
queries = 20
[cells]
modes = ["waiting", "streaming", "resend"]
policies = ["fcfs", "slack"]
qps = [1.0, 3.0]
[engine]
kv_tokens = 400000
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SPEC.format(kind="anns"))
    return path


@pytest.mark.parametrize("kind", ["crawler", "anns"])
def test_a_specification_becomes_a_manifest_and_the_rows_of_cells(
    kind: str, spec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    spec.write_text(SPEC.format(kind=kind))
    assert main([str(spec), "--profile", "h200-tp2", "--out", str(out)]) == 0
    first, *plain = read_rows(out)
    assert (first["bench"], first["profile"]) == ("manifest", "h200-tp2")
    rows = load_rows([out])
    assert len(rows.requests) == 2 * 4 * 20
    assert [(cell.requests, cell.failed) for cell in rows.cells] == [(20, 0)] * 2 * 4
    assert rows.events == []
    assert {(r.source, r.machine, r.workload) for r in rows.requests} == {
        ("simulator", "h200-tp2", "small")
    }
    for request in rows.requests:
        assert request.ttft_s is not None
        assert request.ttft_s > 0
    shown = json.dumps(plain)
    assert main([str(spec), "--profile", "h200-tp2", "--out", str(out)]) == 0
    assert json.dumps(read_rows(out)[1:]) == shown


def test_requests_that_do_not_fit_are_counted(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec.write_text(SPEC.format(kind="crawler").replace("400000", "9000"))
    out = tmp_path / "rows.jsonl"
    assert main([str(spec), "--profile", "h200-tp2", "--out", str(out)]) == 0
    rows = load_rows([out])
    failed = sum(cell.failed for cell in rows.cells)
    assert 0 < failed == sum(row.failed is not None for row in rows.requests)
    assert f"{failed} of 160 requests were not answered" in capsys.readouterr().out


def test_whose_tokens_a_trace_is_counted_in(spec: Path, tmp_path: Path) -> None:
    step = TraceStep(0.5, (TraceDocument("a", "some words of a page"),))
    write_trace(tmp_path / "traces.jsonl", Trace("q0", "why?", "update", (step,)))
    spec.write_text(spec.read_text().replace("queries = 20", 'queries = 1\ntrace = "traces.jsonl"'))
    tokens: list[int | None] = []
    for model in ((), ("--model-path", default_model())):
        out = tmp_path / "rows.jsonl"
        assert main([str(spec), "--profile", "h200-tp2", "--out", str(out), *model]) == 0
        assert read_rows(out)[0]["tokens_by"] == (model[1] if model else "characters")
        tokens.append(load_rows([out]).requests[0].prompt_tokens)
    tokenize = ModelTokenizer(default_model())
    assert tokens == [5 + 1, len(tokenize("some words of a page")) + len(tokenize("why?"))]


def test_events_of_one_cell(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert main([str(spec), "--profile", "h200-tp2", "--out", str(out), "--events"]) == 0
    events = load_rows([out]).events
    assert {(row.mode, row.stream_policy, row.qps) for row in events} == {
        ("streaming", "slack", 3.0)
    }
    assert request_timeline(events) is not None
    assert worker_timeline(events) is not None


def test_which_cell_has_events() -> None:
    cells = [
        Cell(mode, policy, "stream_aware", qps, seed)
        for mode, policy in (("waiting", None), ("streaming", "fcfs"), ("streaming", "lcas"))
        for qps in (1.0, 2.0)
        for seed in (7, 3)
    ]
    assert drawn_of(cells) == Cell("streaming", "fcfs", "stream_aware", 2.0, 7)
    usual = Cell("streaming", "slack", "stream_aware", 2.0, 7)
    assert drawn_of([*cells, usual]) == usual
    assert drawn_of(cells[:4]) is None


def test_without_out_the_file_has_the_name_of_the_specification(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(spec), "--profile", "h200-tp2"]) == 0
    assert len(load_rows([Path(".cache/simulate/small.jsonl")]).cells) == 2 * 4


def test_what_is_wrong_is_named(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    with pytest.raises(InvalidRequest, match="--profile none"):
        main([str(spec), "--profile", "none", "--out", str(out)])
    for other, what in ((tmp_path, "is a folder"), (spec / "rows.jsonl", "--out .*rows.jsonl")):
        with pytest.raises(InvalidRequest, match=what):
            main([str(spec), "--profile", "h200-tp2", "--out", str(other)])
    spec.write_text(SPEC.format(kind="shop"))
    with pytest.raises(InvalidRequest, match=r"small\.toml.*kind"):
        main([str(spec), "--profile", "h200-tp2", "--out", str(out)])


def test_ctrl_c_ends_with_one_line_and_leaves_what_was_there(spec: Path, tmp_path: Path) -> None:
    """The signal goes to all processes of the command, as from a terminal."""
    out, part = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.part"
    out.write_text("complete\n")
    seeds = ", ".join(map(str, range(1000)))
    spec.write_text(spec.read_text().replace("[cells]", f"[cells]\nseeds = [{seeds}]"))
    code = "import sys; from experiments.simulate.run import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(spec), "--profile", "h200-tp2", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"COLUMNS": "300"},
    )
    while not part.exists() or part.read_text().count("\n") < 50:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    shown, told = process.communicate(timeout=30)
    assert (process.returncode, told.strip()) == (INTERRUPTED, "")
    assert shown == f"Stopped: nothing was written to {out}\n"
    assert out.read_text() == "complete\n"
    assert not part.exists()


def test_what_goes_wrong_in_a_cell_leaves_what_was_there(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("complete\n")
    spec.write_text(spec.read_text().replace("queries = 20", 'queries = 20\narrivals = "gone"'))
    with pytest.raises(InvalidRequest, match="gone"):
        main([str(spec), "--profile", "h200-tp2", "--out", str(out)])
    assert [path.name for path in tmp_path.glob("rows*")] == ["rows.jsonl"]
    assert out.read_text() == "complete\n"


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.toml")), ids=lambda path: path.stem)
def test_specifications_that_come_with_us_can_be_read(path: Path) -> None:
    assert load_spec(path).name == path.stem
