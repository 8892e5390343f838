"""What happens to requests and on workers, and the part of it that a report draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from experiments.request_row import WINDOW_S, EventName


class Happened(NamedTuple):
    """An `EventRow` without the keys of its load."""

    what: EventName
    t_s: float
    seconds: float = 0.0
    tokens: int = 0
    query_id: str | None = None
    worker: str | None = None


def window(events: Sequence[Happened], begins_s: float) -> list[Happened]:
    """What happened within WINDOW_S from then on, and all else of the requests that something
    happened to, in the order of time."""

    def is_inside(event: Happened) -> bool:
        return begins_s <= event.t_s < begins_s + WINDOW_S

    requests = {event.query_id for event in events if is_inside(event)} - {None}
    kept = [event for event in events if event.query_id in requests or is_inside(event)]
    return sorted(kept, key=lambda event: event.t_s)
