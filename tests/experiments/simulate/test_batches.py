from __future__ import annotations

import pytest

from experiments.simulate.batches import Batches, Limits, Request
from experiments.simulate.holdings import Holdings, HostMemory
from experiments.simulate.pool import Node, Pool
from experiments.simulate.table import StreamTable
from experiments.workload.shapes import Document
from sglang_stream.policy import Copying, CostModel, Victim
from tests.experiments.simulate.loads import PREFILL

COST = CostModel(PREFILL, Copying(0.001, 1e-6), Copying(0.001, 1e-6))


@pytest.mark.parametrize(("rest", "holds"), [(300, False), (150, True)])
def test_kv_that_is_found_again_is_not_taken_from_a_prompt_that_is_computed(
    rest: int, holds: bool
) -> None:
    """1,000 tokens: 600 of a stream that was preempted and 200 of a prompt, with `rest` to come."""
    pool = Pool(1000)
    table = StreamTable(Holdings(pool, "fcfs", "soft", HostMemory(0), PREFILL))
    batches = Batches(pool, table, "fcfs", COST, Limits(rest, 2048, 10.0, "recompute"))
    stream = table.open("parked", "append", (Document("opening", 600),))
    pool.allocate(600)
    pool.insert(stream.root, stream.prompt, 600, 600)
    table.kv.hold(stream)
    table.kv.preempt(Victim(stream.id, swap=False))
    request = Request("request", Node(), (Document("prompt", 200 + rest),), 200 + rest, 1)
    pool.allocate(200)
    request.node = pool.insert(request.root, request.prompt, 200, 200)
    pool.lock(request.node)
    request.done = 200
    batches.chunked = request

    owners = [(part.owner, part.end) for part in batches.form().slices]
    assert (request, 200 + rest) in owners
    assert (stream.hold is not None) is holds


def test_an_update_shortens_what_a_copy_is_good_for_and_not_what_it_takes() -> None:
    pool = Pool(1000)
    host = HostMemory(1000)
    table = StreamTable(Holdings(pool, "fcfs", "soft", host, PREFILL))
    stay, go, come = Document("stay", 200), Document("go", 400), Document("come", 100)
    stream = table.open("copied", "update", (stay, go))
    pool.allocate(600)
    pool.insert(stream.root, stream.prompt, 600, 600)
    table.kv.hold(stream)
    table.kv.preempt(Victim(stream.id, swap=True))
    assert pool.make_free(pool.size)
    table.kv.replace(stream, (stay, come), 300, 200)
    assert (stream.saved, host.tokens) == (200, 600)
    assert table.kv.restore(stream.id).tokens == 200
    assert (stream.saved, stream.held, host.tokens) == (0, 200, 0)
