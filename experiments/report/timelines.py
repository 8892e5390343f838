"""What happened to one request, and on one worker, drawn from event rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.request_row import WINDOW_S, EventName, EventRow

_WIDTH = 9.0  # inches
_SPANS: dict[EventName, str] = {
    "pass": "#1b9e77",
    "prefill": "#7570b3",
    "decode": "#bbbbbb",
    "restore": "#66a61e",
}
_MOMENTS: dict[EventName, tuple[str, str]] = {
    "chunk": ("|", "#d95f02"),
    "preempt": ("v", "#e7298a"),
    "seal": ("s", "#1f78b4"),
    "first_token": ("*", "#000000"),
    "end": ("|", "#000000"),
}
_ROWS = 14  # streams of a worker's timeline


class Timeline(NamedTuple):
    name: str
    caption: str
    figure: Figure


def request_timeline(events: Sequence[EventRow]) -> Timeline | None:
    """The streamed request with the most events; None without a streamed one."""
    streamed = [row for row in events if row.mode == "streaming" and row.query_id is not None]
    if not streamed:
        return None
    known = Counter(_request_of(row) for row in streamed)
    chosen = max(known, key=lambda key: (known[key], str(key)))
    own = [row for row in streamed if _request_of(row) == chosen]
    lines: list[EventName] = [
        what for what in (*_MOMENTS, *_SPANS) if any(row.what == what for row in own)
    ]
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.32 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, what in enumerate(reversed(lines)):
        _draw(axes, [row for row in own if row.what == what], what, place)
    axes.set_yticks(range(len(lines)), [what.replace("_", " ") for what in reversed(lines)])
    _finish(axes)
    first = own[0]
    return Timeline(
        "timeline-stream",
        f"One stream ({first.query_id}, {first.stream_policy}, {first.qps:g} QPS)",
        figure,
    )


def worker_timeline(events: Sequence[EventRow]) -> Timeline | None:
    """A worker's busiest seconds, a line for each stream; None if no row names a worker."""
    on_workers = [row for row in events if row.worker is not None and row.mode == "streaming"]
    if not on_workers:
        return None
    known = Counter(_worker_of(row) for row in on_workers)
    chosen = max(known, key=lambda key: (known[key], str(key)))
    there = sorted((row for row in on_workers if _worker_of(row) == chosen), key=lambda r: r.t_s)
    begins = _busiest(there)
    there = [row for row in there if begins <= row.t_s < begins + WINDOW_S]
    streams = dict.fromkeys(_request_of(row) for row in there if row.query_id is not None)
    lines = list(streams)[:_ROWS]
    own = [*there, *(row for row in events if row.worker is None and _request_of(row) in lines)]
    own = [row for row in own if begins <= row.t_s < begins + WINDOW_S]
    figure = Figure(figsize=(_WIDTH, 1.0 + 0.26 * (len(lines) + 1)), layout="constrained")
    axes = figure.subplots()
    for place, request in enumerate(reversed(lines)):
        for what in (*_SPANS, *_MOMENTS):
            _draw(
                axes, [r for r in own if _request_of(r) == request and r.what == what], what, place
            )
    _draw(axes, [r for r in own if r.query_id is None and r.what == "decode"], "decode", -1)
    labels = ["decode", *(str(request[-1]) for request in reversed(lines))]
    axes.set_yticks(range(-1, len(lines)), labels, fontsize="small")
    for what, colour in _SPANS.items():
        axes.plot([], [], color=colour, linewidth=6, label=what)
    for what, (marker, colour) in _MOMENTS.items():
        axes.plot([], [], marker, color=colour, label=what.replace("_", " "))
    figure.legend(loc="outside lower center", ncols=9, frameon=False, fontsize="small")
    _finish(axes)
    first = there[0]
    return Timeline(
        "timeline-worker",
        f"The worker {first.worker} ({first.stream_policy}, {first.qps:g} QPS), its first "
        f"{len(lines)} streams in {WINDOW_S:g} s",
        figure,
    )


def _request_of(row: EventRow) -> tuple[str | float | None, ...]:
    return row.stream_policy, row.qps, row.seed, row.query_id


def _worker_of(row: EventRow) -> tuple[str | float | None, ...]:
    return row.stream_policy, row.qps, row.seed, row.worker


def _busiest(rows: Sequence[EventRow]) -> float:
    """When the window with the most of these rows (in order) begins."""
    best, begins, end = 0, rows[0].t_s, 0
    for start, row in enumerate(rows):
        while end < len(rows) and rows[end].t_s < row.t_s + WINDOW_S:
            end += 1
        if end - start > best:
            best, begins = end - start, row.t_s
    return begins


def _draw(axes: Axes, rows: Sequence[EventRow], what: EventName, place: int) -> None:
    if what in _SPANS:
        axes.broken_barh(
            [(row.t_s, row.seconds) for row in rows], (place - 0.3, 0.6), color=_SPANS[what]
        )
        return
    marker, colour = _MOMENTS[what]
    size = 10 if marker == "|" else 6
    axes.plot([row.t_s for row in rows], [place] * len(rows), marker, color=colour, markersize=size)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("seconds after the load began")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
