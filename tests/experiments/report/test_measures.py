from __future__ import annotations

import msgspec
import pytest

from experiments.report.measures import (
    by_setting,
    goodput_limit_s,
    measured,
    speed_up,
    times_sooner,
    times_sooner_by_seed,
    waiting_beside,
)
from sglang_stream.errors import InvalidRequest
from tests.experiments.report.hand_made import requests


def test_cells_are_over_all_seeds_and_apart_by_all_else() -> None:
    rows = [
        *requests(None, 0.4),
        *requests("fcfs", 0.1),
        *requests("fcfs", 0.1, seed=1),
        *requests("fcfs", 0.1, qps=2.0),
        *requests("fcfs", 0.1, source="engine"),
    ]
    cells = measured(rows)
    assert [(len(cell.rows), cell.seeds) for cell in cells] == [(20, 1), (40, 2), (20, 1), (20, 1)]
    assert [len(own) for own in by_setting(cells).values()] == [3, 1]


def test_percentiles_completion_and_rates() -> None:
    (cell,) = measured(requests(None, 0.4, count=5))
    assert cell.ttft([0, 50]) == pytest.approx([0.4, 0.56])
    assert cell.completion(0) == pytest.approx(8.4)
    assert cell.seconds == pytest.approx(4 + 8 + 0.72)
    assert cell.requests_per_s == pytest.approx(5 / 12.72)
    assert cell.tokens_per_s == pytest.approx(5 * 1001 / 12.72)


def test_the_seconds_of_seeds_add_up() -> None:
    one, two = requests(None, 0.4, count=5), requests(None, 0.4, count=5, seed=1)
    (cell,) = measured([*one, *two])
    assert cell.seconds == pytest.approx(2 * 12.72)


def test_refused_requests_count_against_goodput_only() -> None:
    rows = requests(None, 0.4, count=4)
    rows[3] = msgspec.structs.replace(rows[3], failed="no", ttft_s=None, end_s=None)
    (cell,) = measured(rows)
    assert cell.failed == 1
    assert cell.goodput(0.5) == (0.5, pytest.approx(2 / cell.seconds))
    assert len(cell.ttft_s) == 3


def test_a_cell_without_an_answer_is_none() -> None:
    rows = [msgspec.structs.replace(row, ttft_s=None) for row in requests(None, 0.4)]
    assert measured(rows) == []


def test_speed_up_is_over_the_requests_that_both_answered() -> None:
    slow = requests(None, 0.4)
    fast = [msgspec.structs.replace(row, ttft_s=None) for row in requests("fcfs", 0.1)]
    fast[:10] = requests("fcfs", 0.1)[:10]
    base, cell = measured([*slow, *fast])
    assert times_sooner(base, cell, (50, 95)) == pytest.approx([4, 4])
    (gain,) = speed_up(base, cell, (50,)) or ()
    assert (gain.low, gain.value, gain.high) == pytest.approx((4, 4, 4))


def test_no_request_in_common() -> None:
    base, cell = measured([*requests(None, 0.4), *requests("fcfs", 0.1, seed=3)])
    assert times_sooner(base, cell, (50,)) is None
    assert speed_up(base, cell, (50,)) is None


def test_seeds_apart() -> None:
    lost = [msgspec.structs.replace(row, ttft_s=None) for row in requests("fcfs", 0.1, seed=2)]
    rows = [*requests("fcfs", 0.2, seed=1), *requests("fcfs", 0.1), *lost]
    base, cell = measured([*requests(None, 0.4), *requests(None, 0.4, seed=1), *rows])
    assert list(cell.by_seed) == [0, 1]
    assert cell.ttft_by_seed([0]) == [pytest.approx((0.1, 0.2))]
    assert times_sooner_by_seed(base, cell, [50, 95]) == [pytest.approx((4, 2))] * 2
    (alone,) = measured(requests(None, 0.4, seed=7))
    assert times_sooner_by_seed(alone, cell, [50]) == []


def test_waiting_at_the_same_rate_in_the_same_setting() -> None:
    rows = [
        *requests(None, 0.4),
        *requests("fcfs", 0.1),
        *requests("fcfs", 0.1, qps=2.0),
        *requests("fcfs", 0.1, machine="other"),
    ]
    waiting, same, *others = measured(rows)
    cells = [waiting, same, *others]
    assert waiting_beside(same, cells) is waiting
    assert [waiting_beside(cell, cells) for cell in (waiting, *others)] == [None, None, None]


def test_objectives() -> None:
    assert goodput_limit_s("ttft:300") == pytest.approx(0.3)
    for text in ("300", "ttft:", "ttft:-1", "tpot:20", "ttft:nan"):
        with pytest.raises(InvalidRequest, match="--goodput"):
            goodput_limit_s(text)
