from __future__ import annotations

from experiments.report.against_engine import Machines, against_engine
from experiments.report.measures import measured
from experiments.report.table import Table
from experiments.request_row import RequestRow
from tests.experiments.report.hand_made import requests

_ENGINE = {"source": "engine", "machine": "2 cores"}


def table_of(rows: list[RequestRow]) -> Table:
    ((machines, table),) = against_engine(measured(rows))
    assert machines == Machines("crawler", "h200-tp2", "2 cores")
    return table


def lines_of(rows: list[RequestRow]) -> list[dict[str, str]]:
    table = table_of(rows)
    return [dict(zip(table.headings, line, strict=True)) for line in table.rows]


def test_errors() -> None:
    rows = [*requests("fcfs", 0.11), *requests("fcfs", 0.1, **_ENGINE)]
    table = table_of(rows)
    assert table.headings == (
        *("QPS", "", "P50 measured, s", "P50 simulated, s", "P50 error"),
        *("P95 measured, s", "P95 simulated, s", "P95 error", "seeds", "answered"),
    )
    ((qps, name, *p50, _, _, p95_error, seeds, answered),) = table.rows
    assert (qps, name, p50) == ("1", "fcfs", ["0.1475", "0.1623", "+10.0%"])
    assert (p95_error, seeds, answered) == ("+10.0%", "1", "20")


def test_errors_of_seeds_that_both_have() -> None:
    rows = [
        *requests("fcfs", 0.09),
        *requests("fcfs", 0.13, seed=1),
        *requests("fcfs", 9.0, seed=2),
        *requests("fcfs", 0.1, **_ENGINE),
        *requests("fcfs", 0.1, seed=1, count=10, **_ENGINE),
    ]
    table = table_of(rows)
    (line,) = table.rows
    assert [line[table.headings.index("P50 error, seeds")], *line[-2:]] == [
        *("-10.0% to +32.2%", "2", "30 / 40"),
    ]


def test_no_seed_in_common() -> None:
    rows = [*requests("fcfs", 0.1, seed=1), *requests("fcfs", 0.1, **_ENGINE)]
    (line,) = lines_of(rows)
    assert (line["P50 error"], line["seeds"]) == ("+0.0%", "0")
    assert "P50 error, seeds" not in line


def test_how_many_are_near() -> None:
    rows = [
        *requests(None, 0.41),
        *requests("fcfs", 0.112),
        *requests("mcps", 0.2),
        *requests("lcas", 0.2),
        *requests(None, 0.4, **_ENGINE),
        *requests("fcfs", 0.1, **_ENGINE),
        *requests("mcps", 0.1, **_ENGINE),
        *requests("slack", 0.1, **_ENGINE),
    ]
    note = table_of(rows).note
    assert "Of 3 cells: P50 within 15% in 2, P50 within 10% in 1," in note
    assert "both within 15% in 2 and within 10% in 1." in note


def test_placement_is_told_where_it_varies() -> None:
    one = [*requests("fcfs", 0.1), *requests("fcfs", 0.1, **_ENGINE)]
    other = [
        *requests("fcfs", 0.2, placement="random"),
        *requests("fcfs", 0.1, **_ENGINE, placement="random"),
    ]
    assert "placement" not in lines_of(one)[0]
    lines = lines_of([*one, *other])
    assert [(line["placement"], line["P50 error"]) for line in lines] == [
        ("stream_aware", "+0.0%"),
        ("random", "+100.0%"),
    ]


def test_pairs_of_machines() -> None:
    rows = [
        *requests("fcfs", 0.1),
        *requests("fcfs", 0.1, machine="h200"),
        *requests("fcfs", 0.1, **_ENGINE),
        *requests("fcfs", 0.1, workload="anns"),
        *requests("fcfs", 0.1, **_ENGINE, workload="alone"),
        *requests("mcps", 0.1, workload="alone"),
    ]
    assert [machines for machines, _ in against_engine(measured(rows))] == [
        Machines("crawler", "h200-tp2", "2 cores"),
        Machines("crawler", "h200", "2 cores"),
    ]
