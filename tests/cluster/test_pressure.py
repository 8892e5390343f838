"""Streams that do not fit into the prefill worker's KV pool, with workers apart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.cluster.calls import append, cold, generate, opened, tokens, update
from tests.cluster.processes import running_cluster
from tests.end_to_end.server import metric

STREAMS = 40
POOL = 3900  # the streams have four times as many tokens
ANSWER = 6


def contexts(i: int) -> list[list[int]]:
    """The context of stream `i` after each call; every other one appends."""
    parts = [tokens(f"part {i} {n}", 130) for n in range(3)]
    if i % 2:
        return [[t for part in parts[:n] for t in part] for n in (1, 2, 3)]
    return [[t for n in order for t in parts[n]] for order in ((0, 1), (0, 2, 1), (0, 1, 2))]


@pytest.mark.long
@pytest.mark.parametrize(
    ("policy", "preemption"),
    [("srpf", "swap"), ("fcfs", "recompute"), ("mcps", "auto"), ("slack", "swap")],
)
def test_more_streams_than_the_prefill_worker_can_hold(
    tmp_path: Path, policy: str, preemption: str
) -> None:
    flags = ("--stream-policy", policy, "--preemption", preemption)
    with running_cluster(
        tmp_path, ["prefill", "decode"], *flags, "--max-total-tokens", str(POOL)
    ) as cluster:
        url = cluster.routers[0].url
        with httpx.Client(base_url=url, timeout=300) as http:
            ids = [opened(http, "append" if i % 2 else "update", []) for i in range(STREAMS)]
            for seq in (1, 2, 3):
                for i, stream in enumerate(ids):
                    context = contexts(i)
                    if i % 2:
                        append(http, stream, seq, context[seq - 1][130 * (seq - 1) :])
                    else:
                        update(http, stream, seq, context[seq - 1])

        def answer(i: int) -> tuple[list[int], list[int]]:
            with httpx.Client(base_url=url, timeout=300) as client:
                got = generate(client, ids[i], [7, i + 300], ANSWER, last_seq=3).ids
                return got, cold(client, [*contexts(i)[-1], 7, i + 300], ANSWER).ids

        with ThreadPoolExecutor(8) as pool:
            for got, expected in pool.map(answer, range(STREAMS)):
                assert got == expected
        cluster.flush()
        page = httpx.get(f"{cluster.of_role('prefill')[0].url}/metrics").text
        assert metric(page, "sglang_stream_preemptions_total") > 0
        for worker in cluster.workers:
            worker.assert_quiet()
