from __future__ import annotations

from collections.abc import Sequence

import pytest

from experiments.published import published_speed_up, published_ttft_s
from experiments.report.beside_published import beside_published
from experiments.report.measures import by_setting, measured
from experiments.report.table import Table
from experiments.request_row import RequestRow
from sglang_stream.config import Profile, load_profile
from tests.experiments.report.hand_made import requests


def table_of(rows: Sequence[RequestRow], profile: Profile | None = None) -> Table:
    ((setting, cells),) = by_setting(measured(rows)).items()
    return beside_published(setting, cells, "crawler", profile)


def lines_of(table: Table) -> dict[tuple[str, ...], dict[str, str]]:
    """By rate, policy and percentile."""
    return {line[:3]: dict(zip(table.headings[3:], line[3:], strict=True)) for line in table.rows}


def test_published_figures() -> None:
    assert published_ttft_s("crawler", 4.0)["waiting"] == (0.7521, 4.3418, 5.4011)
    assert published_ttft_s("crawler", 4.0)["fcfs"][1] == pytest.approx(4.3418 / 7.012)
    assert published_speed_up("anns", 0.5)["default"][0] == pytest.approx(0.2060 / 0.1297)
    assert published_ttft_s("crawler", 3.0) == published_speed_up("crawler", 3.0) == {}


def test_a_line_for_each_cell_and_percentile() -> None:
    rows = [*requests(None, 0.4), *requests("fcfs", 0.1), *requests(None, 0.4, qps=3.0)]
    lines = lines_of(table_of(rows))
    assert [name for _, name, _ in lines] == ["waiting"] * 3 + ["fcfs"] * 3
    assert lines["1", "fcfs", "P50"] == {
        "TTFT, s": "0.1475",
        "published, s": "0.0307",
        "ratio of s": "4.80",
        "over waiting": "4.000x",
        "published, x": "4.271x",
        "ratio of x": "0.94",
    }


def test_our_own_policies_beside_nothing() -> None:
    rows = [*requests(None, 0.4), *requests("srpf", 0.1), *requests("slack", 0.2)]
    lines = lines_of(table_of(rows))
    assert [name for _, name, _ in lines] == ["waiting"] * 3 + ["srpf"] * 3 + ["slack"] * 3
    slack = lines["1", "slack", "P95"]
    assert slack["over waiting"] == "2.000x"
    assert slack["published, s"] == ""


def test_the_lowest_and_the_highest_of_seeds() -> None:
    rows = [
        *requests(None, 0.4),
        *requests(None, 0.4, seed=1),
        *requests("fcfs", 0.1),
        *requests("fcfs", 0.2, seed=1),
        *requests("fcfs", 0.8, seed=2),
    ]
    fcfs = lines_of(table_of(rows))["1", "fcfs", "P50"]
    assert fcfs["seeds, s"] == "0.1475 to 1.1800"
    assert fcfs["seeds, x"] == "2.000x to 4.000x"  # nobody waited in the third


def test_agreement() -> None:
    kept = [*requests(None, 0.4), *requests("fcfs", 0.1), *requests("mcps", 0.15)]
    other = [*requests(None, 0.4), *requests("fcfs", 0.1), *requests("mcps", 0.05)]
    # Published at 1 QPS: fcfs 4.271x and 4.874x, mcps 4.317x and 2.927x; here fcfs 4x and 4x.
    note = table_of([*kept, *requests("srpf", 0.01)]).note
    assert "3 of 4 are within 25%" in note
    assert "1 of 1 are kept" in note
    note = table_of(other).note
    assert "2 of 4 are within 25%" in note
    assert "0 of 1 are kept" in note


def test_what_was_fitted_is_told() -> None:
    rows = requests(None, 0.4)
    fitted = table_of(rows, load_profile("h200-tp2")).note
    assert "Fitted in the profile h200-tp2, for all cells alike: prefill (" in fitted
    assert "without streaming at 0.5 to 4 queries a second" in fitted
    assert "; call (" in fitted
    assert "swap_in" not in fitted
    assert "Fitted" not in table_of(rows, load_profile("a40")).note
    assert "Fitted" not in table_of(rows).note
