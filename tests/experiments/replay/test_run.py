"""The command against a small local server, and once on the real engine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from starlette.applications import Starlette

from experiments.replay.run import INTERRUPTED, main
from experiments.report.load import load_rows
from experiments.rows import read_rows
from experiments.server import default_model
from retrieval_clients.traces import Trace, TraceDocument, TraceStep, write_trace
from sglang_stream.errors import InvalidRequest, WorkerUnavailable
from tests.experiments.replay.fake_server import FakeServer
from tests.sglang_stream.sdk.fake_router import serving

WARM_UPS = 6


def replay(spec: Path, out: Path, *more: str) -> int:
    return main([str(spec), "--out", str(out), *more])


def kinds(out: Path) -> list[str]:
    return [row.get("kind", "manifest") for row in read_rows(out)]


def test_rows_and_a_table(
    server: FakeServer, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    assert replay(spec, out, "--base-url", server.url, "--machine", "a test") == 0
    head = read_rows(out)[0]
    assert head["machine"] == "a test"
    assert head["spec"]["name"] == "small"
    cell = ["request"] * 6 + ["cell"]
    assert kinds(out) == ["manifest", *cell, *cell]
    printed = capsys.readouterr().out
    assert "small, measured on a test" in printed
    assert "1000 ms" in " ".join(printed.split())
    assert "100%" in printed
    rows = load_rows([out]).requests
    assert {(row.mode, row.stream_policy) for row in rows} == {
        ("waiting", None),
        ("streaming", "srpf"),
    }


def test_complete_cells_are_kept(server: FakeServer, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    replay(spec, out, "--base-url", server.url)
    before, asked = out.read_text(), server.asked
    assert replay(spec, out, "--base-url", server.url) == 0
    assert (out.read_text(), server.asked) == (before, asked)
    spec.write_text(spec.read_text().replace("[50.0]", "[50.0, 40.0]"))
    assert replay(spec, out, "--base-url", server.url) == 0
    assert out.read_text().startswith(before)
    assert kinds(out).count("cell") == 4
    assert kinds(out).count("request") == 24


def test_a_server_that_dies_in_mid_run(
    server: FakeServer, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    server.dies_at = 2 * WARM_UPS + 6 + 4
    with pytest.raises(WorkerUnavailable, match="does not answer any more"):
        replay(spec, out, "--base-url", server.url)
    assert "1 of 2 cells are complete" in capsys.readouterr().out
    assert kinds(out).count("cell") == 1
    server.dies_at, server.dead, server.streams = None, False, {}
    assert replay(spec, out, "--base-url", server.url) == 0
    rows = load_rows([out])
    assert len(rows.requests) == 12
    assert rows.broken_off == 0


def test_ctrl_c(
    server: FakeServer, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    at = 2 * WARM_UPS + 6 + 3
    server.on_answer = lambda n: os.kill(os.getpid(), signal.SIGINT) if n == at else None
    assert replay(spec, out, "--base-url", server.url) == INTERRUPTED
    assert "the same command goes on" in " ".join(capsys.readouterr().out.split())
    assert kinds(out).count("cell") == 1
    assert server.streams == {}
    assert replay(spec, out, "--base-url", server.url) == 0
    assert len(load_rows([out]).requests) == 12


def test_a_row_that_was_cut(server: FakeServer, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    replay(spec, out, "--base-url", server.url)
    out.write_text(out.read_text()[:-20])
    assert replay(spec, out, "--base-url", server.url) == 0
    assert len(load_rows([out]).requests) == 12


def test_other_conditions_want_another_file(server: FakeServer, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    replay(spec, out, "--base-url", server.url)
    spec.write_text(spec.read_text().replace("scale = 500", "scale = 400"))
    with pytest.raises(InvalidRequest, match=r"other conditions \(workload\.scale\)"):
        replay(spec, out, "--base-url", server.url)


def test_another_version_wants_another_file(
    server: FakeServer, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    replay(spec, out, "--base-url", server.url)
    monkeypatch.setattr("experiments.rows.source_commit", lambda: "another")
    with pytest.raises(InvalidRequest, match=r"other conditions \(commit\)"):
        replay(spec, out, "--base-url", server.url)


def test_a_start_that_failed_leaves_nothing_that_the_next_one_must_fit(
    server: FakeServer, spec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    with pytest.raises(WorkerUnavailable):
        replay(spec, out, "--base-url", "http://127.0.0.1:9")
    assert replay(spec, out, "--base-url", server.url) == 0
    assert kinds(out).count("manifest") == 1
    assert read_rows(out)[0]["conditions"]["base_url"] == server.url


def test_a_trace_is_mended_and_the_same_file_gone_on_with(
    server: FakeServer, spec: Path, tmp_path: Path
) -> None:
    traces = tmp_path / "traces.jsonl"
    step = TraceStep(0.0, (TraceDocument("a", "some words of a page"),))
    write_trace(traces, Trace("q0", "why?", "append", (step,)))
    traces.write_text(traces.read_text() + "{\n")
    write_trace(traces, Trace("q1", "who?", "append", (step,)))
    asked = 'queries = 2\ntrace = "traces.jsonl"'
    text = spec.read_text().replace("queries = 6", asked).replace("scale = 500", "scale = 1")
    spec.write_text(text)
    out = tmp_path / "rows.jsonl"
    command = ("--base-url", server.url, "--model-path", default_model())
    with pytest.raises(InvalidRequest, match="line 2"):
        replay(spec, out, *command)
    spec.write_text(text.replace(asked, f'{asked}\non_bad = "skip"'))
    assert replay(spec, out, *command) == 0
    assert {row.query_id for row in load_rows([out]).requests} == {"q0", "q1"}


def test_a_server_of_another_policy(server: FakeServer, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    server.policy = "fcfs"
    with pytest.raises(InvalidRequest, match=r"serves streams by fcfs: cells\.policies has srpf"):
        replay(spec, out, "--base-url", server.url)
    assert server.asked == 0
    server.policy = "srpf"
    assert replay(spec, out, "--base-url", server.url) == 0
    assert read_rows(out)[0]["spec"]["engine"] is None


def test_a_server_that_is_no_router(spec: Path, tmp_path: Path) -> None:
    plain = Starlette(routes=[])
    with serving(plain) as url, pytest.raises(InvalidRequest, match="give the address of a router"):
        replay(spec, tmp_path / "rows.jsonl", "--base-url", url)


def test_a_quick_try(server: FakeServer, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    spec.write_text(spec.read_text() + "seeds = [3, 4]\n")
    small = ("--queries", "2", "--seeds", "1")
    assert replay(spec, out, "--base-url", server.url, *small) == 0
    rows = load_rows([out])
    assert [(cell.seed, cell.requests) for cell in rows.cells] == [(3, 2), (3, 2)]


def test_a_file_of_something_else(server: FakeServer, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("my notes\n")
    with pytest.raises(InvalidRequest, match=r"notes\.txt, line 1: this is no row"):
        replay(spec, out, "--base-url", server.url)
    assert out.read_text() == "my notes\n"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (('["srpf"]', '["srpf", "fcfs"]'), r"cells\.policies are flags of a server"),
        (("[cells]", '[cells]\nplacements = ["prefix", "round_robin"]'), "cells.placements"),
        (("queries = 6", 'queries = "many"'), r"spec\.toml: Expected `int`"),
        (("queries = 6", "queries = 6\ncolour = 1"), r"spec\.toml: .*colour"),
        (("queries = 6", "queries = "), r"spec\.toml: "),
        (("queries = 6", 'queries = 6\ntrace = "gone"'), "--model-path"),
    ],
)
def test_what_cannot_be_run(spec: Path, tmp_path: Path, change: tuple[str, str], what: str) -> None:
    spec.write_text(spec.read_text().replace(*change))
    with pytest.raises(InvalidRequest, match=what):
        replay(spec, tmp_path / "rows.jsonl", "--base-url", "http://127.0.0.1:9")


def test_a_missing_specification(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"gone\.toml: No such file"):
        replay(tmp_path / "gone.toml", tmp_path / "rows.jsonl")


def test_no_server_there(spec: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerUnavailable, match="no answer from http"):
        replay(spec, tmp_path / "rows.jsonl", "--base-url", "http://127.0.0.1:9")


def test_on_the_engine(spec: Path, tmp_path: Path) -> None:
    """Both modes, each with its server, with updates: what the rows say of them."""
    text = spec.read_text().replace('"crawler"', '"anns"').replace("scale = 500", "scale = 43")
    spec.write_text(text.replace("[50.0]", "[4.0]").replace("delay = 0.01", "delay = 0.3"))
    out = tmp_path / "rows.jsonl"
    assert replay(spec, out) == 0
    rows = load_rows([out])
    waiting = {row.query_id: row for row in rows.requests if row.mode == "waiting"}
    streaming = {row.query_id: row for row in rows.requests if row.mode == "streaming"}
    assert len(waiting) == len(streaming) == 6
    for name, row in streaming.items():
        assert row.failed is None
        assert row.prompt_tokens == waiting[name].prompt_tokens
        assert row.cached_tokens is not None
        assert row.ready_tokens
        assert waiting[name].cached_tokens == 0
    cells = {cell.mode: cell for cell in rows.cells}
    assert cells["waiting"].counted["passes"] == 0
    assert cells["streaming"].counted["passes"] > 0
