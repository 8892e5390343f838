from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from experiments.bench import added, apart, rates
from experiments.bench.chat import workers_of
from experiments.bench.router import NAMES, table
from experiments.bench.run import main
from experiments.rows import Row, read_rows
from experiments.server import default_model, running_server
from sglang_stream.errors import InvalidRequest


def line_of(rows: Sequence[Row], what: str) -> str:
    file = io.StringIO()
    Console(file=file, width=160).print(table(rows))
    return next(line for line in file.getvalue().splitlines() if NAMES[what] in line)


def pairs(what: str, other: str, through_s: Sequence[float], other_s: Sequence[float]) -> list[Row]:
    return [
        {"bench": "router", "what": what, "pair": pair, "by": by, "seconds": seconds}
        for by, of in (("router", through_s), (other, other_s))
        for pair, seconds in enumerate(of)
    ]


@pytest.mark.parametrize(("what", "fine_s"), [("chunk", 0.9e-3), ("first token", 1.9e-3)])
def test_what_is_added(what: str, fine_s: float) -> None:
    """By pairs: a machine that is slow for both sides adds nothing."""
    past = [0.001, 0.5, 0.001]
    line = line_of(pairs(what, "worker", [s + fine_s for s in past], past), what)
    assert f"+{fine_s * 1e3:.2f}" in line
    assert "met" in line
    line = line_of(pairs(what, "worker", [s + fine_s + 2e-4 for s in past], past), what)
    assert "MISSED" in line


def test_pairs_that_are_not_complete_are_left_out() -> None:
    rows = pairs("chunk", "worker", [0.002, 0.002, 9.0], [0.001, 0.001])
    assert "+1.00" in line_of(rows, "chunk")


@pytest.mark.parametrize("form", rates.FORMS.values(), ids=list(rates.FORMS))
def test_rates(form: rates.Form) -> None:
    def rows(*speeds: float) -> list[Row]:
        return [
            {"bench": "router", "what": form.name, "chunks_per_s": speed, "tokens": 200.0}
            for speed in speeds
        ]

    assert "met" in line_of(rows(form.goal, form.goal + 1, 1), form.name)
    assert "MISSED" in line_of(rows(form.goal - 1, form.goal, 1), form.name)


@pytest.mark.parametrize(
    ("ours", "others", "shown"),
    [
        ([0.9] * 5, [1.0] * 5, "met"),
        ([1.1] * 5, [1.0] * 5, "MISSED"),
        ([0.9, 1.01, 1.2], [1.0] * 3, "within the noise"),
    ],
)
def test_chat(ours: list[float], others: list[float], shown: str) -> None:
    assert shown in line_of(pairs("chat", "sglang-router", ours, others), "chat")


def test_a_missing_router_is_told() -> None:
    rows = [{"bench": "router", "what": "chat", "absent": True}]
    assert "sglang-router is missing" in line_of(rows, "chat")


def test_bodies_of_ids_are_the_same_for_all_streams() -> None:
    bodies = [json.loads(body) for body in rates.id_bodies(0)]
    assert [body["seq"] for body in bodies] == [1]
    assert all(len(body["input_ids"]) == 50 * 200 for body in bodies)
    assert rates.id_bodies(0) == rates.id_bodies(0) != rates.id_bodies(1)


def test_no_two_texts_are_the_same() -> None:
    bodies = [body for seed in (0, 1) for body in rates.text_bodies(seed)]
    texts = [json.loads(body)["chunks"][0] for body in bodies]
    assert len(set(texts)) == len(texts)
    assert len(rates.random_text(random.Random(0), 12).split()) == 12


@pytest.mark.parametrize("streams", ["", "0", "one", "1,,8"])
def test_numbers_of_streams_must_be_positive(streams: str) -> None:
    with pytest.raises(InvalidRequest, match="--streams"):
        main(["lcp", f"--streams={streams}"])


@pytest.mark.long
def test_on_the_running_engine() -> None:
    """What needs one worker only, and the measure of workers apart against that one."""
    rows: list[Row] = []
    with running_server(default_model(), ["--dtype", "float32", "--enable-cache-report"]) as url:
        [worker] = workers_of(url)
        added.measure(url, worker.url, 2, 0, rows.append, lambda: None)
        asyncio.run(
            apart.measure(url, [256], [2], 1, 0, rows.append, lambda _: None, lambda _: None)
        )
    calls = [row for row in rows if row["bench"] == "router"]
    assert [(row["what"], row["by"]) for row in calls] == [
        (what, by)
        for what in ("chunk", "first token")
        for by in ("router", "worker", "worker", "router")
    ]
    answers = [row for row in rows if row["bench"] == "apart"]
    assert [(row["mode"], row["stream"]) for row in answers] == [
        (mode, stream) for mode in apart.MODES for stream in range(2)
    ]
    assert all(row["ttft_s"] > 0 and row["prompt_tokens"] == 272 for row in answers)
    assert [row["cached_tokens"] for row in answers[:2]] == [0, 0]
    for stream in range(2):
        assert len({tuple(row["tokens"]) for row in answers if row["stream"] == stream}) == 1


@pytest.mark.long
def test_on_running_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["router", "--pairs", "3", "--rounds", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = [row for row in read_rows(out) if row["bench"] == "router"]
    for what in ("chunk", "first token"):
        assert [row["by"] for row in rows if row["what"] == what] == [
            *("router", "worker", "worker", "router", "router", "worker")
        ]
    assert {row["what"] for row in rows} == set(NAMES)
    assert all(row["tokens"] == 200 for row in rows if row["what"] == "calls of 50")
    assert main(["--show", str(out)]) == 0
    assert capsys.readouterr().out == printed.partition("The rows are in")[0]
