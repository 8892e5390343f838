from __future__ import annotations

import pytest

from experiments.calibrate.derived import MACHINES, Machine, Model, derive, in_passes
from sglang_stream.config import load_profile


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_what_comes_with_the_package_is_what_is_derived(machine: Machine) -> None:
    assert load_profile(machine.name) == derive(machine, Model())


def test_the_model_has_the_parameters_that_its_name_promises() -> None:
    model = Model()
    assert model.weight_bytes / 2 == pytest.approx(8.03e9, rel=0.001)
    assert model.kv_bytes == 131072


def test_two_h200_prefill_as_fast_as_was_published() -> None:
    """Stream2LLM's crawler at its lowest rate, without streaming: P50 0.1164 s, P95 0.8366 s."""
    prefill = load_profile("h200-tp2").prefill.value
    assert in_passes(prefill, 5749) == pytest.approx(0.1164, rel=0.1)
    assert in_passes(prefill, 28372) == pytest.approx(0.8366, rel=0.1)
