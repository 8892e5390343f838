from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.report.load import load_rows
from experiments.reproduce.run import SPECS, is_simulated, main, steps_of
from sglang_stream.errors import InvalidRequest

SPEC = """\
name = "NAME"
published = "crawler"

[workload]
kind = "crawler"
queries = 20

[cells]
policies = ["fcfs"]
"""


@pytest.fixture
def specs(tmp_path: Path) -> Path:
    folder = tmp_path / "specs"
    folder.mkdir()
    for name in ("a_cpu", "b_h200_tp2"):
        (folder / f"{name}.toml").write_text(SPEC.replace("NAME", name))
    return folder


def test_simulations_come_first(specs: Path, tmp_path: Path) -> None:
    steps = steps_of(specs, tmp_path)
    assert [(step.spec.stem, step.profile) for step in steps] == [
        ("b_h200_tp2", "h200-tp2"),
        ("a_cpu", None),
    ]
    assert steps[0].rows == tmp_path / "rows" / "b_h200_tp2.jsonl"


def test_ours_all_tell_how_they_are_run() -> None:
    assert steps_of(SPECS, Path())


def test_a_name_that_tells_nothing(specs: Path, tmp_path: Path) -> None:
    (specs / "c.toml").write_text(SPEC)
    with pytest.raises(InvalidRequest, match=r"c\.toml: end its name with _cpu"):
        steps_of(specs, tmp_path)


def test_simulated_and_reported_and_not_again(
    specs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("experiments.rows", "experiments.reproduce.run"):
        monkeypatch.setattr(f"{module}.source_commit", lambda: "abc")
    (specs / "a_cpu.toml").unlink()
    out = tmp_path / "out"
    command = ["--specs", str(specs), "--out", str(out)]
    assert main(command) == 0
    assert "b_h200_tp2" in (out / "index.html").read_text()
    assert {path.stem for path in out.glob("*/timeline-*.svg")} == {
        "timeline-stream",
        "timeline-worker",
    }
    (step,) = steps_of(specs, out)
    assert is_simulated(step)
    rows = step.rows.read_text()
    assert main(command) == 0
    assert step.rows.read_text() == rows
    with monkeypatch.context() as patch:
        patch.setattr("experiments.reproduce.run.source_commit", lambda: "another")
        assert not is_simulated(step)
    head, rest = rows.split("\n", 1)
    dirty = json.dumps(json.loads(head) | {"commit": "abc-dirty"})
    step.rows.write_text(f"{dirty}\n{rest}")
    with monkeypatch.context() as patch:
        patch.setattr("experiments.reproduce.run.source_commit", lambda: "abc-dirty")
        assert not is_simulated(step)
    step.spec.write_text(step.spec.read_text().replace("queries = 20", "queries = 10"))
    assert not is_simulated(step)
    assert main(command) == 0
    assert len(load_rows([step.rows]).requests) == 2 * 10
    step.rows.write_text(json.dumps({"spec": None}))
    assert not is_simulated(step)
