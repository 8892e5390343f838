from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_stream.policy.cost import Copying, Decode, Prefill
from sglang_stream.policy.fit import fit_copying, fit_decode, fit_prefill

NEW = (16, 64, 256, 1024, 4096)
CACHED = (0, 512, 2048, 8192, 30000)
GRID = [(new, cached) for new in NEW for cached in CACHED]

prefills = st.builds(
    Prefill,
    st.floats(1e-4, 1e-1),
    st.floats(1e-6, 1e-3),
    st.floats(1e-11, 1e-7),
)
copyings = st.builds(Copying, st.floats(1e-5, 1e-1), st.floats(1e-8, 1e-4))
seconds = st.floats(1e-6, 1e3)


def forwards(curve: Prefill) -> list[tuple[int, int, float]]:
    return [(new, cached, curve.seconds(new, cached)) for new, cached in GRID]


@given(prefills)
def test_a_known_prefill_curve_is_found(curve: Prefill) -> None:
    fitted, error = fit_prefill(forwards(curve))
    assert error < 1e-6
    for new, cached in [*GRID, (8192, 0), (1, 60000)]:
        assert fitted.seconds(new, cached) == pytest.approx(curve.seconds(new, cached), rel=1e-4)


@given(copyings)
def test_a_known_line_of_copies_is_found(curve: Copying) -> None:
    fitted, error = fit_copying([(tokens, curve.seconds(tokens)) for tokens in NEW])
    assert error < 1e-6
    for tokens in (*NEW, 1, 100_000):
        assert fitted.seconds(tokens) == pytest.approx(curve.seconds(tokens), rel=1e-4)


@given(prefills, st.integers(0, 1000))
def test_noise_and_a_few_forwards_that_were_held_up_change_little(
    curve: Prefill, seed: int
) -> None:
    rng = random.Random(seed)
    samples = [(n, c, s * rng.lognormvariate(0, 0.05)) for n, c, s in forwards(curve) * 3]
    for i in rng.sample(range(len(samples)), 4):
        new, cached, s = samples[i]
        samples[i] = (new, cached, 20 * s)
    fitted, error = fit_prefill(samples)
    assert error < 0.1
    for new, cached in GRID:
        assert fitted.seconds(new, cached) == pytest.approx(curve.seconds(new, cached), rel=0.25)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**5), st.integers(0, 10**5), seconds),
        min_size=4,
        max_size=64,
        unique_by=lambda sample: sample[:2],
    )
)
def test_no_coefficient_is_negative_and_a_token_costs_something(
    samples: list[tuple[int, int, float]],
) -> None:
    fitted, error = fit_prefill(samples)
    assert min(fitted.base_s, fitted.per_token_s, fitted.per_pair_s) >= 0
    assert fitted.seconds(1) > 0
    assert error >= 0


@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), seconds),
        min_size=4,
        max_size=64,
        unique_by=lambda sample: sample[0],
    )
)
def test_no_coefficient_of_copies_is_negative(samples: list[tuple[int, float]]) -> None:
    fitted, error = fit_copying(samples)
    assert min(fitted.base_s, fitted.per_token_s) >= 0
    assert fitted.seconds(1) > 0
    assert error >= 0


@given(
    st.lists(seconds, min_size=len(GRID), max_size=len(GRID)),
    st.tuples(*[st.floats(0, 2)] * 3),
    st.tuples(*[st.sampled_from([0, 1e-9, 1e-6, 1e-3])] * 3),
)
def test_no_other_curve_is_nearer(
    measured: list[float], times: tuple[float, ...], more: tuple[float, ...]
) -> None:
    samples = [(*at, s) for at, s in zip(GRID, measured, strict=True)]
    fitted, _ = fit_prefill(samples)
    coefficients = (fitted.base_s, fitted.per_token_s, fitted.per_pair_s)
    other = Prefill(*(c * t + m for c, t, m in zip(coefficients, times, more, strict=True)))
    assert loss(fitted, samples) <= loss(other, samples) * (1 + 1e-9)


def loss(curve: Prefill, samples: list[tuple[int, int, float]]) -> float:
    return sum((curve.seconds(new, cached) / s - 1) ** 2 for new, cached, s in samples)


def test_equal_passes_cost_by_the_token() -> None:
    """Of passes that are all of one size, what they have in common is not taken for a base, which
    would make their tokens free."""
    curve = Prefill(0.01, 1e-4, 1e-8)
    samples = [(512, cached, curve.seconds(512, cached)) for cached in range(0, 8192, 512)]
    fitted, error = fit_prefill(samples)
    assert fitted.base_s == 0
    assert fitted.seconds(512, 4096) == pytest.approx(curve.seconds(512, 4096))
    assert error < 1e-6
    line, _ = fit_copying([(tokens, 0.01 + tokens * 1e-6) for tokens in (1000, 1001, 1002, 1003)])
    assert line.base_s == 0


@pytest.mark.parametrize("bad", [(0, 0, 1.0), (10, 0, 0.0), (10, 0, -1.0), (10, 0, float("inf"))])
def test_what_is_no_measurement_is_refused(bad: tuple[int, int, float]) -> None:
    good = [(16, 0, 0.1), (64, 0, 0.2), (256, 0, 0.3), (1024, 0, 0.4)]
    with pytest.raises(ValueError, match="no measurement"):
        fit_prefill([*good, bad])
    with pytest.raises(ValueError, match="no measurement"):
        fit_copying([(bad[0], bad[2])] + [(tokens, s) for tokens, _, s in good])


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="3 forwards of 3 sizes"):
        fit_prefill([(16, 0, 0.1), (64, 0, 0.2), (256, 0, 0.3)])
    with pytest.raises(ValueError, match="5 copies of 1 sizes"):
        fit_copying([(16, 0.1)] * 5)


decodes = st.builds(Decode, st.floats(1e-4, 1e-1), st.floats(1e-6, 1e-2), st.floats(1e-10, 1e-6))


@given(decodes)
def test_a_known_plane_of_decode_steps_is_found(curve: Decode) -> None:
    steps = [(n, n * each) for n in (1, 4, 8, 32) for each in (64, 2048, 8192)]
    fitted, error = fit_decode([(n, context, curve.seconds(n, context)) for n, context in steps])
    assert error < 1e-6
    for n, context in steps:
        assert fitted.seconds(n, context) == pytest.approx(curve.seconds(n, context), rel=1e-4)
