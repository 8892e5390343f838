"""Every policy, way of preemption and of invalidation gives right tokens under memory pressure.

One worker changes its ways between the loads. In `make test` each pair of settings is met once,
`make test-long` meets them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from sglang_stream.config import EngineConfig
from sglang_stream.errors import InvalidRequest
from sglang_stream.policy.types import Invalidation, PolicyName, Preemption
from tests.engine.pressure import POOL, Load
from tests.harness import Worker, running_worker, wait_until

POLICIES: list[PolicyName] = ["default", "fcfs", "lcas", "mcps", "srpf", "slack"]
PREEMPTIONS: list[Preemption] = ["recompute", "swap", "auto", "off"]
INVALIDATIONS: list[Invalidation] = ["soft", "hard"]


def combinations() -> list[object]:
    """All of them; those that the pairs do not need are long."""
    cases: list[object] = []
    for policy, preemption, invalidation in product(POLICIES, PREEMPTIONS, INVALIDATIONS):
        # Each policy with each preemption once, and invalidations in turn: a Latin square.
        turn = (POLICIES.index(policy) + PREEMPTIONS.index(preemption)) % 2
        needed = turn == INVALIDATIONS.index(invalidation)
        if preemption == "off":  # under which open streams have no order among themselves
            needed = (policy, invalidation) == ("fcfs", "soft")
        marks = () if needed else (pytest.mark.long,)
        cases.append(pytest.param(policy, preemption, invalidation, marks=marks))
    return cases


@pytest.fixture(scope="module")
def worker(log_dir: Path) -> Iterator[Worker]:
    flags = ("--max-total-tokens", str(POOL), "--context-length", "4000")
    config = EngineConfig(pass_tokens=256)
    with running_worker(log_dir / "policies.log", *flags, config=config) as running:
        yield running


@pytest.fixture(scope="module")
def load(worker: Worker) -> Load:
    return Load(worker)


@pytest.mark.parametrize(("policy", "preemption", "invalidation"), combinations())
def test_oracle_under_pressure(
    worker: Worker,
    load: Load,
    policy: PolicyName,
    preemption: Preemption,
    invalidation: Invalidation,
) -> None:
    worker.flush()
    worker.configure(policy, preemption, invalidation)
    label = f'{{policy="{policy}"'
    names = {
        "recomputes": f'preemptions_total{{kind="recompute",policy="{policy}"',
        "swaps": f'preemptions_total{{kind="swap",policy="{policy}"',
        "restored": f"restored_tokens_total{label}",
        "found": f"found_again_tokens_total{label}",
        "invalidated": f"invalidated_tokens_total{label}",
    }
    before = {name: worker.metric(line) for name, line in names.items()}
    assert load.run() == []
    worker.flush()
    worker.assert_healthy()
    seen = {name: worker.metric(line) - before[name] for name, line in names.items()}
    assert seen["recomputes"] + seen["swaps"] > 0
    assert seen["invalidated"] > 0
    match preemption:
        case "swap":
            assert seen["swaps"] > 0
            assert seen["restored"] > 0
        case "recompute":
            assert seen["swaps"] == 0
    if invalidation == "hard":
        assert seen["found"] == 0


def test_a_list_that_flips_back_finds_its_kv_again(worker: Worker) -> None:
    worker.flush()
    worker.configure("fcfs", "auto", "soft")
    before = worker.metric("found_again_tokens_total")
    stream = worker.open("update")
    documents = [[n] * 100 for n in (201, 202, 203)]
    for seq, order in enumerate(([0, 1, 2], [0, 2, 1], [0, 1, 2]), 1):
        worker.update(stream, seq, [t for d in order for t in documents[d]])
        wait_until(lambda: worker.status(stream).held == 300, 60, "the list computed")
    usage = worker.status(stream).usage
    assert usage.computed_tokens == 500
    assert worker.metric("found_again_tokens_total") - before == 200


def test_the_policy_stays_while_there_are_streams(worker: Worker) -> None:
    worker.open("append")
    with pytest.raises(InvalidRequest, match="end them"):
        worker.configure("lcas", "auto", "soft")


def test_a_swapped_stream_is_seen_to_be_swapped(worker: Worker) -> None:
    worker.flush()
    worker.configure("fcfs", "swap", "soft")
    stream = worker.open("append")
    worker.append(stream, 1, [7] * 1200)
    worker.idle(stream, 1200)
    status = worker.status(stream)
    assert (status.held, status.saved, status.place) == (1200, 0, 0)
    worker.cold([8] * 1800)
    status = worker.status(stream)
    assert (status.held, status.saved) == (0, 1200)
    assert worker.seal(stream, [9], last_seq=1).tokens == worker.cold([*[7] * 1200, 9]).tokens
    assert worker.status(stream).usage.computed_tokens == 1200
