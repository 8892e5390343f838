from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from experiments.request_row import RequestRow
from experiments.rows import read_rows
from experiments.simulate.run import main
from experiments.spec import load_spec
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


@pytest.mark.parametrize("kind", ["crawler", "anns"])
def test_a_specification_becomes_a_manifest_and_a_row_a_request(kind: str, tmp_path: Path) -> None:
    spec, out = tmp_path / "small.toml", tmp_path / "rows.jsonl"
    spec.write_text(SPEC.format(kind=kind))
    assert main([str(spec), "--profile", "h200-tp2", "--out", str(out)]) == 0
    first, *rows = read_rows(out)
    assert (first["bench"], first["profile"]) == ("manifest", "h200-tp2")
    requests = [msgspec.convert(row, RequestRow) for row in rows if row["kind"] == "request"]
    assert len(requests) == 2 * 4 * 20
    assert {(r.source, r.machine, r.workload) for r in requests} == {
        ("simulator", "h200-tp2", "small")
    }
    for request in requests:
        assert request.ttft_s is not None
        assert request.ttft_s > 0
    shown = json.dumps(rows)
    assert main([str(spec), "--profile", "h200-tp2", "--out", str(out)]) == 0
    assert json.dumps(read_rows(out)[1:]) == shown


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    spec, out = tmp_path / "small.toml", tmp_path / "rows.jsonl"
    spec.write_text(SPEC.format(kind="shop"))
    with pytest.raises(InvalidRequest, match=r"small\.toml.*kind"):
        main([str(spec), "--profile", "h200-tp2", "--out", str(out)])
    spec.write_text(SPEC.format(kind="anns"))
    with pytest.raises(InvalidRequest, match="--profile none"):
        main([str(spec), "--profile", "none", "--out", str(out)])


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.toml")), ids=lambda path: path.stem)
def test_specifications_that_come_with_us_can_be_read(path: Path) -> None:
    assert load_spec(path).name == path.stem
