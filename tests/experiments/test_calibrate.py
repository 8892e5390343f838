from __future__ import annotations

import io
from dataclasses import astuple
from pathlib import Path

import pytest
from rich.console import Console

from experiments.calibrate.fitting import copies, forwards, make_profile, pass_ms_for
from experiments.calibrate.measure import (
    count_cells,
    least_limit,
    pool_for_swaps,
    prefix_sizes,
    prompt_sizes,
    step_s,
    swap_sizes,
)
from experiments.calibrate.report import save_plot, table
from experiments.calibrate.run import main
from experiments.rows import Row, read_rows
from sglang_stream.config import Profile, load_profile
from sglang_stream.errors import EngineFailure, InvalidRequest
from sglang_stream.policy.cost import Copying, Decode, Prefill

PREFILL = Prefill(0.005, 1e-4, 1e-8)
OUT, BACK = Copying(0.001, 1e-6), Copying(0.002, 2e-6)
DECODE = Decode(0.004, 1e-3, 1e-7)


def measured(gpus: tuple[str, ...] = ()) -> list[Row]:
    """Three repeats on a machine with these curves; the second one was twice as slow."""
    rows: list[Row] = [
        {
            "bench": "manifest",
            "model": "small",
            "gpus": list(gpus),
            "cores": 2,
            "cpu": "some CPU",
        },
        {"what": "worker", "dtype": "float32", "kv_tokens": 5000, "kv_bytes_per_token": 3072.0},
    ]
    for repeat, slower in enumerate((1, 2, 1)):
        for new in prompt_sizes(1024):
            for cached in (0, *prefix_sizes(1024, 1)):
                seconds = PREFILL.seconds(new, cached) * slower
                cell = {"what": "prefill", "new": new, "cached": cached}
                rows.append({**cell, "seconds": seconds, "repeat": repeat})
        for size in swap_sizes(1024, 1):
            for what, curve in (("swap_out", OUT), ("swap_in", BACK)):
                tokens = size + repeat
                cell = {"what": what, "size": size, "tokens": tokens}
                rows.append({**cell, "seconds": curve.seconds(size + 1) * slower, "repeat": repeat})
        for requests in (1, 4, 8):
            for context in (64, 512):
                cell = {"what": "decode", "requests": requests, "context": requests * context}
                seconds = DECODE.seconds(requests, requests * context) * slower
                rows.append({**cell, "seconds": seconds, "repeat": repeat})
        for rested_s, seconds, forward in ((0.0, 0.03, 0.05), (0.5, 0.05, 0.04), (2.0, 0.08, 0.07)):
            row = {"what": "call", "rested_s": rested_s, "forward": forward * slower}
            rows.append({**row, "seconds": seconds * slower, "repeat": repeat})
    return rows


def fitted() -> Profile:
    return make_profile(measured(), "mine", "mine.samples.jsonl")


def test_the_curves_of_the_machine_are_found() -> None:
    profile = fitted()
    assert (profile.kind, profile.name) == ("measured", "mine")
    assert profile.samples == "mine.samples.jsonl"
    assert (profile.machine, profile.model) == ("2 cores of some CPU", "small")
    assert (profile.kv_tokens.value, profile.kv_bytes_per_token.value) == (5000, 3072)
    assert profile.pass_ms.value == 50
    assert profile.call is not None
    assert profile.call.value == pytest.approx(0.015)
    more = [profile.call_rest.value.seconds(rested_s) for rested_s in (0, 0.25, 0.5, 2, 9)]
    assert more == pytest.approx([0, 0.01, 0.02, 0.05, 0.05])
    # A forward that was shorter after a rest says that a rest costs nothing.
    more = [profile.forward_rest.value.seconds(rested_s) for rested_s in (0, 0.5, 1.25, 2, 9)]
    assert more == pytest.approx([0, 0, 0.01, 0.02, 0.02])
    for figure, curve in (
        (profile.prefill, PREFILL),
        (profile.swap_out, OUT),
        (profile.swap_in, BACK),
        (profile.decode, DECODE),
    ):
        assert astuple(figure.value) == pytest.approx(astuple(curve))
        assert figure.error == pytest.approx(0)
        assert "medians of" in figure.source


def test_gpus_are_named_and_counted() -> None:
    rows = measured(("NVIDIA H100", "NVIDIA H100"))
    assert make_profile(rows, "mine", "").machine == "2x NVIDIA H100"


def test_too_few_cells_are_explained() -> None:
    rows = [row for row in measured() if row.get("what") != "swap_in" or row["size"] < 100]
    with pytest.raises(EngineFailure, match=r"swaps in: too little to fit.*--max-tokens"):
        make_profile(rows, "mine", "")


def test_repeats_of_a_cell_count_by_their_median() -> None:
    rows = [{"what": "prefill", "new": 8, "cached": 0, "seconds": s} for s in (1.0, 9.0, 2.0)]
    rows += [{"what": "swap_in", "size": 8, "tokens": 8 + s, "seconds": s} for s in (1, 3, 2)]
    assert forwards(rows) == [(8, 0, 2.0)]
    assert copies(rows, "swap_in") == [(10, 2)]
    assert copies(rows, "swap_out") == []


def test_a_pass_is_ten_times_its_base_or_50_ms() -> None:
    assert [pass_ms_for(base) for base in (0.0, 0.0054321, 0.03)] == [50, 54.3, 300]


@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("limit", [256, 1000, 8192, 32768])
def test_sizes_are_whole_pages_within_the_limit(limit: int, page: int) -> None:
    assert prompt_sizes(limit)[-1] == limit
    assert min(prompt_sizes(limit)) >= 16
    swaps = swap_sizes(limit, page)
    sizes = [*prefix_sizes(limit, page), *swaps]
    assert all(0 < size <= limit and size % page == 0 for size in sizes)
    pool = pool_for_swaps(limit, page)
    assert pool % page == 0
    assert pool > limit + 20 * page
    assert count_cells(limit, page) > 9
    assert (len(swaps) >= 4) == (limit >= least_limit(page))


def test_a_step_is_timed_while_all_decode() -> None:
    one = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    other = [1.5, 3.5, 5.5]
    assert step_s([one]) == 1
    assert step_s([one, other]) == 1  # 2 to 5 of one, 1.5 to 3.5 of the other
    with pytest.raises(EngineFailure, match="2 requests were not decoded together"):
        step_s([[0.0, 1.0], [2.0, 3.0]])


def test_the_table_has_each_cell_and_each_error() -> None:
    file = io.StringIO()
    Console(file=file, width=100).print(table(measured(), fitted()))
    shown = file.getvalue()
    for text in ("16 new after 768 cached", "1,024 new after 0", "swap out", "33 tokens"):
        assert text in shown
    assert "8 requests, 4,096 tokens" in shown
    assert shown.count("median") == 5  # four curves and the title
    assert shown.count("after 0.5 s of rest") == 2  # the call and its forward


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    save_plot(measured(), fitted(), tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.startswith("<?xml")
    assert drawn.count('<g id="axes_') == 3


def test_wrong_arguments_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidRequest, match=r"--out .*\.json"):
        main(["--out", str(tmp_path / "profile")])
    assert main(["--max-tokens", "1024"]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "--profile mine.json" in capsys.readouterr().out


@pytest.mark.long
def test_on_the_running_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole small run, with flags for SGLang: a profile that loads, its samples and its plot."""
    out = tmp_path / "deep" / "small.json"
    flags = ["--page-size", "4", "--max-running-requests", "16"]
    assert main(["--max-tokens", "512", "--repeats", "1", "--out", str(out), *flags]) == 0
    assert "8 requests" in capsys.readouterr().out
    profile = load_profile(str(out))
    assert (profile.name, profile.kind, profile.dtype) == ("small", "measured", "float32")
    assert profile.kv_bytes_per_token.value == pytest.approx(3072, rel=0.01)
    assert out.with_suffix(".svg").exists()
    assert profile.samples == "small.samples.jsonl"
    rows = read_rows(out.with_name(profile.samples))
    assert rows[0]["flags"][-4:] == flags
    cells = {(row["new"], row["cached"]) for row in rows if row.get("what") == "prefill"}
    assert {(32, 0), (128, 0), (512, 0), (32, 384), (128, 384)} <= cells
    assert profile.call is not None
    assert 0 < profile.call.value < 1
    for what in ("swap_out", "swap_in"):
        swapped = [(row["size"], row["tokens"]) for row in rows if row.get("what") == what]
        assert [size for size, _ in swapped] == swap_sizes(512, 4)
        assert all(0 <= size - tokens <= 64 for size, tokens in swapped)
