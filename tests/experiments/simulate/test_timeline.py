from __future__ import annotations

from experiments.request_row import WINDOW_S
from experiments.simulate.timeline import Happened, window


def test_a_window_has_all_of_the_requests_in_it() -> None:
    before, inside, after = 5.0, 15.0, 10.0 + WINDOW_S
    events = [
        Happened("end", after, query_id="a"),
        Happened("chunk", before, query_id="a"),
        Happened("pass", inside, query_id="a", worker="w"),
        Happened("chunk", before, query_id="gone"),
        Happened("end", after, query_id="to come"),
        Happened("decode", before, worker="w"),
        Happened("decode", inside, worker="w"),
        Happened("decode", after, worker="w"),
    ]
    kept = window(events, 10.0)
    assert [(event.what, event.t_s) for event in kept] == [
        ("chunk", before),
        ("pass", inside),
        ("decode", inside),
        ("end", after),
    ]
