"""The profile of a machine from what was measured on it: pure functions of rows.

A row tells by `what` of which kind it is, and by `repeat` of which measurement of its cell:

    worker     dtype, kv_tokens, kv_bytes_per_token
    prefill    new, cached, seconds          one forward of one request
    call       rested_s, forward, seconds    a request after a rest: its forward, and beyond it
    swap_out   size, tokens, seconds         KV of a stream to host memory
    swap_in    size, tokens, seconds         and back
    decode     requests, context, seconds    between two tokens of concurrent requests
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, TypeVar

from experiments.rows import Row, machine_of
from sglang_stream.config import Figure, Profile
from sglang_stream.errors import EngineFailure
from sglang_stream.policy.cost import Rest
from sglang_stream.policy.fit import fit_copying, fit_decode, fit_prefill

_PASS_MS = 50.0
PASS_MS_SOURCE = "ten times the prefill's base, and 50 ms at least"

S = TypeVar("S")
T = TypeVar("T")


def pass_ms_for(base_s: float) -> float:
    """How long a pass should be, as the engine chooses it without a profile: a tenth of it at most
    is the base."""
    return round(max(_PASS_MS, 10 * base_s * 1e3), 1)


def forwards(rows: Sequence[Row]) -> list[tuple[int, int, float]]:
    """Prefill, by cells in order: new and cached tokens, median seconds."""
    return [(new, cached, s) for (new, cached), s in _medians(rows, "prefill", "new", "cached")]


def copies(rows: Sequence[Row], what: str) -> list[tuple[int, float]]:
    """`swap_out` or `swap_in`, by sizes in order: medians of tokens and seconds."""
    tokens = _medians(rows, what, "size", of="tokens")
    seconds = _medians(rows, what, "size")
    return [(round(n), s) for (_, n), (_, s) in zip(tokens, seconds, strict=True)]


def steps(rows: Sequence[Row]) -> list[tuple[int, int, float]]:
    """Decode, by cells in order: requests, tokens of their context together, median seconds."""
    cells = _medians(rows, "decode", "requests", "context")
    return [(requests, context, s) for (requests, context), s in cells]


def rests(rows: Sequence[Row], of: str) -> list[tuple[float, float]]:
    """Requests by the rest before them, in order: seconds of rest, and the median of `of`."""
    return [(rested_s, value) for (rested_s,), value in _medians(rows, "call", "rested_s", of=of)]


def make_profile(rows: Sequence[Row], name: str, samples: str) -> Profile:
    """The profile of the machine that `rows` were measured on, a manifest among them.

    `samples`: the rows' file. Raises EngineFailure where a curve has too few measurements.
    """
    manifest = next(row for row in rows if row.get("bench") == "manifest")
    worker = next(row for row in rows if row.get("what") == "worker")
    prefill = _fitted(fit_prefill, forwards(rows), "forwards with one request each")
    calls = rests(rows, "seconds")
    return Profile(
        name=name,
        kind="measured",
        machine=machine_of(manifest),
        model=manifest["model"],
        dtype=worker["dtype"],
        pass_ms=Figure(pass_ms_for(prefill.value.base_s), PASS_MS_SOURCE),
        kv_bytes_per_token=Figure(worker["kv_bytes_per_token"], "told by the worker"),
        kv_tokens=Figure(worker["kv_tokens"], "told by the worker"),
        prefill=prefill,
        swap_out=_fitted(fit_copying, copies(rows, "swap_out"), "swaps out"),
        swap_in=_fitted(fit_copying, copies(rows, "swap_in"), "swaps in"),
        decode=_fitted(fit_decode, steps(rows), "decode steps, seen by the client"),
        call=Figure(
            calls[0][1] / 2,
            "half of what requests that came without a rest took beyond their forwards, the median",
        ),
        call_rest=_rest(calls, "what requests took beyond their forwards"),
        forward_rest=_rest(rests(rows, "forward"), "forwards"),
        samples=samples,
    )


def _rest(cells: Sequence[tuple[float, float]], what: str) -> Figure[Rest]:
    without_s = cells[0][1]
    points = tuple((rested_s, max(0.0, seconds - without_s)) for rested_s, seconds in cells)
    return Figure(Rest(points), f"medians of {what} after a rest, less the one after none")


def _medians(
    rows: Sequence[Row], what: str, *keys: str, of: str = "seconds"
) -> list[tuple[list[Any], float]]:
    """The values of `keys` in order, each with the median of `of`."""
    cells: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row.get("what") == what:
            cells[tuple(row[key] for key in keys)].append(row[of])
    return [(list(cell), median(values)) for cell, values in sorted(cells.items())]


def _fitted(
    fit: Callable[[Sequence[S]], tuple[T, float]], cells: Sequence[S], what: str
) -> Figure[T]:
    try:
        curve, error = fit(cells)
    except ValueError as e:
        raise EngineFailure(f"{what}: {e}; give more --max-tokens") from e
    return Figure(curve, f"fitted to the medians of {len(cells)} cells: {what}", round(error, 4))
