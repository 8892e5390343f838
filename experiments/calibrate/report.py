"""The measured cells against the fitted curves, as a table and as a plot: pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from experiments.calibrate.fitting import copies, forwards, rests, steps
from experiments.rows import Row
from sglang_stream.config import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (13.0, 4.2)  # inches


def table(rows: Sequence[Row], profile: Profile) -> Table:
    """A line for each cell, and for each curve its median error."""
    shown = Table(title=f"{profile.name}: measured (medians) against fitted, ms")
    shown.add_column("")
    for heading in ("measured", "fitted", "differ"):
        shown.add_column(heading, justify="right")
    parts = (
        ("prefill", profile.prefill.error, _prefill(rows, profile)),
        ("swap out", profile.swap_out.error, _copies(rows, "swap_out", profile)),
        ("swap in", profile.swap_in.error, _copies(rows, "swap_in", profile)),
        ("decode step", profile.decode.error, _decode(rows, profile)),
    )
    for name, error, cells in parts:
        shown.add_row(f"[bold]{name}[/]", "", "", f"[bold]{error or 0:.1%}[/] median")
        for what, measured, fitted in cells:
            shown.add_row(
                f"  {what}",
                f"{measured * 1e3:,.2f}",
                f"{fitted * 1e3:,.2f}",
                f"{fitted / measured - 1:+.1%}",
            )
        shown.add_section()
    for name, of in (("call, there and back", "seconds"), ("its forward", "forward")):
        shown.add_row(f"[bold]{name}[/]", "", "", "")
        for rested_s, measured in rests(rows, of):
            shown.add_row(f"  after {rested_s:g} s of rest", f"{measured * 1e3:,.2f}", "", "")
        shown.add_section()
    return shown


def _prefill(rows: Sequence[Row], profile: Profile) -> Iterator[tuple[str, float, float]]:
    for new, cached, seconds in forwards(rows):
        fitted = profile.prefill.value.seconds(new, cached)
        yield f"{new:,} new after {cached:,} cached", seconds, fitted


def _copies(rows: Sequence[Row], what: str, profile: Profile) -> Iterator[tuple[str, float, float]]:
    curve = profile.swap_out.value if what == "swap_out" else profile.swap_in.value
    for tokens, seconds in copies(rows, what):
        yield f"{tokens:,} tokens", seconds, curve.seconds(tokens)


def _decode(rows: Sequence[Row], profile: Profile) -> Iterator[tuple[str, float, float]]:
    for requests, context, seconds in steps(rows):
        fitted = profile.decode.value.seconds(requests, context)
        yield f"{requests} requests, {context:,} tokens", seconds, fitted


# --- the plot -------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], profile: Profile) -> Figure:
    """Prefill by cached tokens, swaps against prefill, decode: cells as dots, curves as lines.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.suptitle(f"{profile.name}: {profile.model}, {profile.dtype}, {profile.machine}")
    prefill, swaps, decode = figure.subplots(1, 3)
    _plot_prefill(prefill, rows, profile)
    _plot_swaps(swaps, rows, profile)
    _plot_decode(decode, rows, profile)
    return figure


def save_plot(rows: Sequence[Row], profile: Profile, path: Path) -> None:
    """Writes the plot, in the format that the path's ending names. Raises as `plot` does."""
    plot(rows, profile).savefig(path)


def _plot_prefill(axes: Axes, rows: Sequence[Row], profile: Profile) -> None:
    cells = forwards(rows)
    sizes = _between(new for new, _, _ in cells)
    for i, cached in enumerate(sorted({cached for _, cached, _ in cells})):
        own = [(new, s) for new, at, s in cells if at == cached]
        colour = f"C{i % 10}"
        _dots(axes, own, colour)
        fitted = [(new, profile.prefill.value.seconds(new, cached)) for new in sizes]
        _line(axes, fitted, colour, f"{cached:,} cached")
    _finish(axes, f"prefill ({profile.prefill.error or 0:.1%})", "new tokens")


def _plot_swaps(axes: Axes, rows: Sequence[Row], profile: Profile) -> None:
    out, back = copies(rows, "swap_out"), copies(rows, "swap_in")
    sizes = _between(tokens for tokens, _ in [*out, *back])
    for colour, name, cells, curve in (
        ("C0", f"out ({profile.swap_out.error or 0:.1%})", out, profile.swap_out.value),
        ("C1", f"back ({profile.swap_in.error or 0:.1%})", back, profile.swap_in.value),
    ):
        _dots(axes, cells, colour)
        _line(axes, [(n, curve.seconds(n)) for n in sizes], colour, name)
    again = [(n, profile.prefill.value.seconds(n)) for n in sizes]
    _line(axes, again, "C7", "computed again instead")
    _finish(axes, "swap", "tokens")


def _plot_decode(axes: Axes, rows: Sequence[Row], profile: Profile) -> None:
    cells = steps(rows)
    counts = sorted({requests for requests, _, _ in cells})
    for i, count in enumerate(counts):
        own = [(context, s) for requests, context, s in cells if requests == count]
        colour = f"C{i % 10}"
        _dots(axes, own, colour)
        contexts = _between(context for context, _ in own)
        fitted = [(n, profile.decode.value.seconds(count, n)) for n in contexts]
        _line(axes, fitted, colour, f"{count} at once")
    _finish(
        axes,
        f"decode step ({profile.decode.error or 0:.1%})",
        "tokens of context together",
        "linear",
    )


def _between(values: Iterator[int] | Sequence[int]) -> list[int]:
    """Points of a curve from the least value to the largest, evenly spaced by ratio."""
    known = list(values)
    low, high = min(known), max(known)
    return sorted({round(low * (high / low) ** (i / 40)) for i in range(41)})


def _dots(axes: Axes, cells: Sequence[tuple[int, float]], colour: str) -> None:
    axes.plot([x for x, _ in cells], [s * 1e3 for _, s in cells], "o", color=colour, markersize=4)


def _line(axes: Axes, points: Sequence[tuple[int, float]], colour: str, name: str) -> None:
    axes.plot([x for x, _ in points], [s * 1e3 for _, s in points], color=colour, label=name)


def _finish(axes: Axes, title: str, what: str, scale: Literal["log", "linear"] = "log") -> None:
    axes.set(title=title, xlabel=what, ylabel="ms", xscale=scale, yscale=scale)
    if scale == "log":
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter("")  # they would cover each other within a decade or two
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
