"""The figures of a report: pure functions from rows to matplotlib's."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from experiments.published import PublishedName, published_ttft_s
from experiments.report.load import Rows
from experiments.report.measures import Measured, Numbers, Setting, setting_of
from experiments.report.timelines import request_timeline, worker_timeline
from sglang_stream.config import Profile

_WIDTH = 9.0  # inches
_HEIGHT = 3.4
_POINTS = 300  # of a curve
_COLOURS = {
    "waiting": "#555555",
    "resend": "#a6761d",
    "default": "#e7298a",
    "fcfs": "#1b9e77",
    "lcas": "#7570b3",
    "mcps": "#d95f02",
    "srpf": "#1f78b4",
    "slack": "#66a61e",
}
_MANY_DECADES = (1.0, 2.0)
_TICKS = ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))  # times powers of ten, up to so many decades, above
_SWAPPED = (128, 1 << 17)  # tokens


class Drawing(NamedTuple):
    """`name`: of its files."""

    name: str
    caption: str
    figure: Figure


def drawings_of(setting: Setting, cells: Sequence[Measured], rows: Rows) -> Iterator[Drawing]:
    """All figures of cells that are compared with each other."""
    published = rows.published.get((setting.source, setting.machine, setting.workload))
    yield ttft_ccdf(setting, cells)
    if len({cell.how.qps for cell in cells}) > 1:
        yield ttft_against_qps(setting, cells, published)
    yield completion(setting, cells)
    invalidated = invalidated_ccdf(setting, cells)
    if invalidated is not None:
        yield invalidated
    own = [row for row in rows.events if setting_of(row) == setting]
    for draw in (request_timeline, worker_timeline):
        drawn = draw(own)
        if drawn is not None:
            yield Drawing(drawn.name, f"{drawn.caption}, {setting}", drawn.figure)


def ttft_ccdf(setting: Setting, cells: Sequence[Measured]) -> Drawing:
    """The share of requests that wait longer than a time, a panel for each rate."""
    figure, panels = _panels(cells)
    for axes, (qps, own) in zip(panels, _by_qps(cells).items(), strict=True):
        for cell in own:
            _ccdf(axes, cell.ttft_s, cell.how.name)
        _finish(axes, f"{qps:g} QPS", "TTFT, s", "share above", log="xy")
    _legend(figure, panels)
    return Drawing("ttft-ccdf", f"Share of requests whose TTFT is above a time, {setting}.", figure)


def ttft_against_qps(
    setting: Setting, cells: Sequence[Measured], published: PublishedName | None
) -> Drawing:
    """P50, P95 and P99 by rate; published ones as crosses."""
    percents = (50, 95, 99)
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    panels = list(figure.subplots(1, len(percents), sharey=True))
    for i, (axes, percent) in enumerate(zip(panels, percents, strict=True)):
        for name in dict.fromkeys(cell.how.name for cell in cells):
            own = [cell for cell in cells if cell.how.name == name]
            rates = [cell.how.qps for cell in own]
            values = [cell.ttft([percent])[0] for cell in own]
            axes.plot(rates, values, "o-", color=_colour(name), markersize=4, label=name)
            if published is not None:
                known = [(qps, published_ttft_s(published, qps).get(name)) for qps in rates]
                points = [(qps, of[i]) for qps, of in known if of is not None]
                axes.plot(
                    *zip(*points, strict=True) if points else ([], []), "x", color=_colour(name)
                )
        _finish(axes, f"P{percent}", "requests a second", "TTFT, s", log="xy")
        axes.xaxis.set_major_locator(FixedLocator(sorted({cell.how.qps for cell in cells})))
        axes.minorticks_off()
    _legend(figure, panels)
    crosses = " Crosses: published, on 2x H200." if published else ""
    return Drawing("ttft-qps", f"TTFT against the rate, {setting}.{crosses}", figure)


def completion(setting: Setting, cells: Sequence[Measured]) -> Drawing:
    """From arrival to the last token: boxes from P25 to P75, whiskers from P5 to P95."""
    figure, panels = _panels(cells)
    for axes, (qps, own) in zip(panels, _by_qps(cells).items(), strict=True):
        boxes = [
            dict(
                zip(
                    ("whislo", "q1", "med", "q3", "whishi"),
                    np.percentile(cell.completion_s, (5, 25, 50, 75, 95)),
                    strict=True,
                )
            )
            | {"fliers": [], "label": cell.how.name}
            for cell in own
        ]
        drawn = axes.bxp(
            boxes, patch_artist=True, showfliers=False, widths=0.6, medianprops={"color": "black"}
        )
        for patch, cell in zip(drawn["boxes"], own, strict=True):
            patch.set_facecolor(_colour(cell.how.name))
            patch.set_alpha(0.6)
        axes.tick_params(axis="x", rotation=45)
        _finish(axes, f"{qps:g} QPS", "", "completion, s")
    panels[0].set_ylim(bottom=0)
    return Drawing(
        "completion",
        "From arrival, before any retrieval, to the last token: P5, P25, P50, P75, P95, "
        f"{setting}.",
        figure,
    )


def invalidated_ccdf(setting: Setting, cells: Sequence[Measured]) -> Drawing | None:
    """Tokens computed in vain of a request; None where updates invalidated nothing."""
    streamed = [cell for cell in cells if cell.total("invalidated_tokens")]
    if not streamed:
        return None
    figure, panels = _panels(streamed)
    for axes, (qps, own) in zip(panels, _by_qps(streamed).items(), strict=True):
        for cell in own:
            values = [float(row.invalidated_tokens or 0) for row in cell.answered]
            _ccdf(axes, np.array(values), cell.how.name)
        _finish(axes, f"{qps:g} QPS", "invalidated tokens", "share above")
        axes.set_xscale("symlog", linthresh=10)
    _legend(figure, panels)
    return Drawing(
        "invalidated-ccdf",
        f"Share of requests with more invalidated tokens than so many, {setting}.",
        figure,
    )


def recompute_against_swap(profile: Profile) -> Drawing:
    """What a preempted stream costs each way, by the tokens that it holds."""
    figure = Figure(figsize=(_WIDTH * 0.6, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    tokens = np.geomspace(*_SWAPPED, 100).astype(int)
    cost = profile.cost
    again = [cost.prefill.seconds(int(n)) for n in tokens]
    copied = [cost.swap_out.seconds(int(n)) + cost.swap_in.seconds(int(n)) for n in tokens]
    axes.plot(tokens, again, color="#d95f02", label="computed again")
    axes.plot(tokens, copied, color="#1b9e77", label="copied out and back")
    _finish(axes, profile.name, "tokens held", "s", log="xy")
    axes.legend(frameon=False)
    return Drawing(
        f"recompute-swap-{profile.name}",
        f"What giving up a stream's KV costs by the profile {profile.name} ({profile.kind}): "
        f"{profile.model} on {profile.machine}.",
        figure,
    )


def _by_qps(cells: Sequence[Measured]) -> dict[float, list[Measured]]:
    rates = dict.fromkeys(cell.how.qps for cell in cells)
    return {qps: [cell for cell in cells if cell.how.qps == qps] for qps in rates}


def _panels(cells: Sequence[Measured]) -> tuple[Figure, list[Axes]]:
    """A panel for each rate, side by side."""
    count = len(_by_qps(cells))
    width = _WIDTH if count > 2 else _WIDTH * (0.35 + 0.3 * count)
    figure = Figure(figsize=(width, _HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=True)[0])


def _ccdf(axes: Axes, values: Numbers, name: str) -> None:
    """The share above each value, at points that are evenly spaced by ratio from 1 to the last."""
    ordered = np.sort(values)
    above = np.geomspace(1, len(ordered), min(len(ordered), _POINTS)).round().astype(int)
    places = np.unique(len(ordered) - above)
    axes.plot(
        ordered[places],
        1 - places / len(ordered),
        drawstyle="steps-post",
        color=_colour(name),
        label=name,
        linewidth=1.3,
    )


def _colour(name: str) -> str:
    return _COLOURS.get(name, "#000000")


def _finish(axes: Axes, title: str, x: str, y: str, *, log: str = "") -> None:
    """`log`: which axes are logarithmic, of "xy"; their ticks are plain numbers."""
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        if name in log:
            axes.set(**{f"{name}scale": "log"})
            low, high = axis.get_view_interval()
            decades = math.log10(high / low)
            axis.set_major_locator(LogLocator(subs=_TICKS[bisect(_MANY_DECADES, decades)]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.label_outer(remove_inner_ticks=False)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One for all panels, below them."""
    labels = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = len(labels) if len(panels) > 1 else 3
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower center", ncols=columns, frameon=False
    )
