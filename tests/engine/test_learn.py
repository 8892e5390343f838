import pytest

from sglang_stream.engine.learn import CostLearner
from sglang_stream.policy import Prefill

CURVE = Prefill(base_s=0.02, per_token_s=0.0006, per_pair_s=5e-8)


def learn(learner: CostLearner, new: int, count: int) -> None:
    for i in range(count):
        learner.forward(new, i * new, CURVE.seconds(new, i * new), alone=True)


@pytest.mark.parametrize(("before", "since"), [(512, 64), (64, 512)])
def test_the_base_stays_known_while_all_forwards_are_of_one_size(before: int, since: int) -> None:
    learner = CostLearner(3072)
    learn(learner, before, 20)
    learn(learner, since, 300)
    cost = learner.fitted()
    assert cost is not None
    assert cost.prefill.base_s == pytest.approx(CURVE.base_s, rel=1e-3)
    assert cost.prefill.seconds(since) == pytest.approx(CURVE.seconds(since), rel=1e-3)


def test_a_machine_that_has_become_slower_is_followed() -> None:
    learner = CostLearner(3072)
    for factor in (1, 2):
        for i in range(20):
            for new in (64, 512):
                learner.forward(new, i * 64, factor * CURVE.seconds(new, i * 64), alone=False)
    cost = learner.fitted()
    assert cost is not None
    assert cost.prefill.seconds(512) == pytest.approx(2 * CURVE.seconds(512), rel=1e-3)


def test_nothing_new_is_fitted_before_enough_was_seen() -> None:
    learner = CostLearner(3072)
    learn(learner, 64, 15)
    assert learner.fitted() is None
    learn(learner, 512, 1)
    assert learner.fitted() is not None
    assert learner.fitted() is None
