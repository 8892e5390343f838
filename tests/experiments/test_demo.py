from __future__ import annotations

from io import StringIO
from itertools import pairwise

from rich.console import Console

from experiments.demo.report import Row, ratio, table
from experiments.demo.scenarios import SEARCH_LISTS


def row(repeat: int, waiting: float, streaming: float, same: bool = True) -> Row:
    return Row(
        scenario="append",
        title="append: 12 pages",
        repeat=repeat,
        waiting_ttft_s=waiting,
        streaming_ttft_s=streaming,
        limit_ttft_s=streaming / 2,
        prompt_tokens=12_000,
        ready_tokens=11_000,
        changed_tokens=1_000,
        cached_tokens=0,
        same_tokens=same,
    )


def printed(rows: list[Row]) -> str:
    out = StringIO()
    Console(file=out, width=120).print(table(rows))
    return out.getvalue()


def test_the_table_shows_medians_worst_cases_and_their_ratio() -> None:
    rows = [row(1, 4.0, 0.5), row(2, 5.0, 0.4), row(3, 9.0, 0.7)]
    assert ratio(rows) == 10.0
    text = printed(rows)
    for figure in ("5.000 s (9.000 s)", "0.500 s (0.700 s)", "10.0 x", "12,000", "11,000"):
        assert figure in text
    assert "yes" in text


def test_pairs_that_differ_are_not_hidden() -> None:
    assert "NO: only 1 of 2" in printed([row(1, 1.0, 1.0), row(2, 1.0, 1.0, same=False)])


def test_the_search_changes_five_times_and_flips_back_once() -> None:
    assert len(SEARCH_LISTS) == 6
    assert all(a != b for a, b in pairwise(SEARCH_LISTS))
    assert SEARCH_LISTS[3] == SEARCH_LISTS[1]
    assert {len(ranks) for ranks in SEARCH_LISTS} == {8}
    assert all(len(set(ranks)) == 8 and max(ranks) < 12 for ranks in SEARCH_LISTS)
