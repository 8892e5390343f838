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


def test_a_prompt_in_several_iterations_pays_the_base_of_each() -> None:
    prefill = load_profile("h200-tp2").prefill.value
    assert in_passes(prefill, 5000) == pytest.approx(prefill.seconds(5000) + 2 * prefill.base_s)
