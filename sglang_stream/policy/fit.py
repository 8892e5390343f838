"""The curves of `cost` from measurements: non-negative least squares of the relative error.

Each sample counts by its relative error, so small forwards are fitted as well as large ones, and
one that was held up counts the less the slower it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import median

from sglang_stream.policy.cost import Copying, Decode, Prefill

_FEWEST = 4  # samples
_SPREAD = 1.5  # the largest over the smallest size, for a base to be told from the tokens' work
_DEPENDENT = 1e-7  # what is left of a column of length 1 that the others make up

Vector = list[float]


def fit_prefill(samples: Sequence[tuple[int, int, float]]) -> tuple[Prefill, float]:
    """The curve through forwards of `(new, cached, seconds)`, and its median relative error.

    Where all forwards have about the same number of new tokens, their base cannot be told from
    their work and counts as work. Raises ValueError for fewer than 4 forwards, or only equal ones.
    """
    _require(len({(new, cached) for new, cached, _ in samples}), len(samples), "forwards")
    _require_positive((new, seconds) for new, _, seconds in samples)
    base, per_token, per_pair = _fit(
        [[1.0, new, new * (cached + new / 2)] for new, cached, _ in samples],
        [seconds for _, _, seconds in samples],
        with_base=_spread([new for new, _, _ in samples]),
    )
    curve = Prefill(base, per_token, per_pair)
    return curve, _error((curve.seconds(new, cached), s) for new, cached, s in samples)


def fit_copying(samples: Sequence[tuple[int, float]]) -> tuple[Copying, float]:
    """The line through copies of `(tokens, seconds)`, and its median relative error.

    As `fit_prefill`, with copies in place of forwards.
    """
    _require(len({tokens for tokens, _ in samples}), len(samples), "copies")
    _require_positive(samples)
    base, per_token = _fit(
        [[1.0, tokens] for tokens, _ in samples],
        [seconds for _, seconds in samples],
        with_base=_spread([tokens for tokens, _ in samples]),
    )
    curve = Copying(base, per_token)
    return curve, _error((curve.seconds(tokens), s) for tokens, s in samples)


def fit_decode(samples: Sequence[tuple[int, int, float]]) -> tuple[Decode, float]:
    """The plane through decode steps of `(requests, context, seconds)`, and its median relative
    error.

    As `fit_prefill`, with steps in place of forwards and requests in place of new tokens.
    """
    _require(len({(requests, context) for requests, context, _ in samples}), len(samples), "steps")
    _require_positive((requests, seconds) for requests, _, seconds in samples)
    base, per_request, per_context_token = _fit(
        [[1.0, requests, context] for requests, context, _ in samples],
        [seconds for _, _, seconds in samples],
        with_base=_spread([requests for requests, _, _ in samples]),
    )
    curve = Decode(base, per_request, per_context_token)
    return curve, _error((curve.seconds(n, context), s) for n, context, s in samples)


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float], *, with_base: bool) -> Vector:
    """Coefficients of at least 0 of the columns of `rows`, the first of which is the base.

    The best solution is the unbounded one of the columns that it gives more than 0: every set of
    columns is tried.
    """
    columns = [
        [row[i] / s for row, s in zip(rows, seconds, strict=True)] for i in range(len(rows[0]))
    ]
    best, least = [0.0] * len(columns), math.inf
    for chosen in _subsets(range(0 if with_base else 1, len(columns))):
        solution = _least_squares([columns[i] for i in chosen])
        if solution is None or min(solution) <= 0:
            continue
        found = [0.0] * len(columns)
        for i, coefficient in zip(chosen, solution, strict=True):
            found[i] = coefficient
        loss = _loss(columns, found)
        if loss < least:
            best, least = found, loss
    return best


def _subsets(columns: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for size in range(1, len(columns) + 1):
        yield from combinations(columns, size)


def _least_squares(columns: Sequence[Vector]) -> Vector | None:
    """The x for which the sum of `columns` times x is nearest to 1 everywhere; None if they depend
    on each other.

    By orthogonal columns (modified Gram-Schmidt): columns = basis times an upper triangle.
    """
    basis: list[Vector] = []
    triangle: list[Vector] = []  # triangle[j]: column j's parts along the basis, then its length
    for column in columns:
        length = _norm(column)
        rest, parts = column, []
        for direction in basis:
            part = _dot(direction, rest)
            parts.append(part)
            rest = [r - part * d for r, d in zip(rest, direction, strict=True)]
        left = _norm(rest)
        if left <= _DEPENDENT * length:
            return None
        basis.append([r / left for r in rest])
        triangle.append([*parts, left])
    solution = [math.fsum(direction) for direction in basis]
    for j in reversed(range(len(basis))):
        solution[j] /= triangle[j][j]
        for i in range(j):
            solution[i] -= triangle[j][i] * solution[j]
    return solution


def _loss(columns: Sequence[Vector], coefficients: Vector) -> float:
    """The sum of the squared relative errors."""
    fitted = (_dot(row, coefficients) for row in zip(*columns, strict=True))
    return math.fsum((value - 1) ** 2 for value in fitted)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def _norm(vector: Sequence[float]) -> float:
    return math.sqrt(_dot(vector, vector))


def _spread(sizes: Sequence[int]) -> bool:
    return max(sizes) >= _SPREAD * min(sizes)


def _error(pairs: Iterator[tuple[float, float]]) -> float:
    """The median relative error of (fitted, measured)."""
    return median(abs(fitted - measured) / measured for fitted, measured in pairs)


def _require(different: int, count: int, what: str) -> None:
    if count < _FEWEST or different < 2:
        raise ValueError(
            f"too little to fit: {count} {what} of {different} sizes, where {_FEWEST} of 2 are "
            "needed"
        )


def _require_positive(samples: Sequence[tuple[int, float]] | Iterator[tuple[int, float]]) -> None:
    for count, seconds in samples:
        if count <= 0 or not 0 < seconds < math.inf:
            raise ValueError(f"{count} in {seconds} s is no measurement")
