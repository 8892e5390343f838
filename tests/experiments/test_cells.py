from __future__ import annotations

from pathlib import Path

import pytest

from experiments.cells import Cell, Server, cells_of, require_one_server, server_of
from experiments.spec import CellsSpec, EngineSpec, load_spec
from sglang_stream.errors import InvalidRequest


def test_cells_of_a_server_are_together() -> None:
    spec = CellsSpec(
        modes=("waiting", "resend", "streaming"),
        policies=("fcfs", "default"),
        qps=(1.0, 2.0),
        seeds=(0, 1),
    )
    cells = cells_of(spec)
    assert len(set(cells)) == len(cells) == 2 * 2 * 4
    servers = [server_of(cell, spec).policy for cell in cells]
    assert servers == ["default"] * 12 + ["fcfs"] * 4
    assert {cell.policy for cell in cells if cell.mode != "streaming"} == {None}


def test_waiting_needs_no_server_of_its_own() -> None:
    spec = CellsSpec(policies=("slack", "fcfs"))
    assert [server_of(cell, spec).policy for cell in cells_of(spec)] == ["slack", "slack", "fcfs"]


def test_flags() -> None:
    engine = EngineSpec(kv_tokens=4000, decode_workers=1, flags=("--profile", "mine.json"))
    text = " ".join(Server("lcas", "prefix").flags(engine))
    assert text.startswith("--prefill-workers 1 --decode-workers 1 --stream-policy lcas")
    assert "--placement prefix" in text
    assert "--max-total-tokens 4000" in text
    assert "--stream-pass-ms" not in text
    assert text.endswith("--enable-metrics --profile mine.json")
    assert "--workers 2" in " ".join(Server("fcfs", "prefix").flags(EngineSpec(prefill_workers=2)))


def test_one_server_that_runs_already() -> None:
    waiting = Cell("waiting", None, "prefix", 1.0, 0)
    fcfs = Cell("streaming", "fcfs", "prefix", 1.0, 0)
    require_one_server([waiting, fcfs], "http://x")
    lcas = Cell("streaming", "lcas", "prefix", 1.0, 0)
    with pytest.raises(InvalidRequest, match=r"http://x: cells\.policies .* fcfs, lcas"):
        require_one_server([waiting, fcfs, lcas], "http://x")


def test_paths_begin_at_the_folder_of_the_specification(tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text('name = "x"\n[workload]\nkind = "crawler"\nqueries = 1\ntrace = "pages"\n')
    assert load_spec(path).workload.trace == tmp_path / "pages"
