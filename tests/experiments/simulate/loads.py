"""Small loads for the simulator's tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import strategies as st

from experiments.cells import Cell
from experiments.request_row import RequestRow
from experiments.simulate.rows import simulate
from experiments.spec import EngineSpec
from experiments.workload.shapes import Arrived, Document, Query, Step
from sglang_stream.config import Figure, Profile, load_profile
from sglang_stream.policy import Copying, Decode, PolicyName, Prefill

PREFILL = Prefill(0.01, 1e-4, 1e-8)
CALL_S = 0.002
POLICY_NAMES: tuple[PolicyName, ...] = ("default", "fcfs", "lcas", "mcps", "srpf", "slack")


def machine(kv_tokens: int = 100_000, call_s: float = CALL_S) -> Profile:
    """A slow machine of round figures."""
    known = load_profile("h200")
    copying = Copying(0.001, 1e-6)
    return Profile(
        "slow",
        "derived",
        "none",
        "none",
        "float32",
        pass_ms=Figure(100.0, "assumed"),
        kv_bytes_per_token=Figure(1024.0, "assumed"),
        kv_tokens=Figure(kv_tokens, "assumed"),
        prefill=Figure(PREFILL, "assumed"),
        swap_out=Figure(copying, "assumed"),
        swap_in=Figure(copying, known.swap_in.source),
        decode=Figure(Decode(0.005, 0.001, 1e-6), "assumed"),
        call=Figure(call_s, "assumed"),
    )


def streaming(policy: PolicyName = "fcfs") -> Cell:
    return Cell("streaming", policy, "stream_aware", 1.0, 0)


WAITING = Cell("waiting", None, "stream_aware", 1.0, 0)
RESEND = Cell("resend", None, "stream_aware", 1.0, 0)


def append_query(name: str, *chunks: tuple[float, int], question: int = 10) -> Query:
    """Chunks of so many tokens at those times."""
    steps = tuple(
        Step(at_s, (Document(f"{name}.{i}", tokens),)) for i, (at_s, tokens) in enumerate(chunks)
    )
    return Query(name, "append", steps, 5, question)


def simulated(
    profile: Profile, engine: EngineSpec, cell: Cell, load: Sequence[Arrived], output: int = 1
) -> list[RequestRow]:
    """The rows of requests."""
    rows = simulate(profile, engine, cell, load, output, "test")
    return [row for row in rows if isinstance(row, RequestRow)]


def random_load(seed: int, count: int, rate: float) -> list[Arrived]:
    """Append and update queries whose lists drop, add and exchange documents and flip back."""
    rng = random.Random(seed)
    load: list[Arrived] = []
    at_s = 0.0
    for number in range(count):
        at_s += rng.expovariate(rate)
        step_s, steps = 0.0, list[Step]()
        lists: list[tuple[Document, ...]] = []
        current = [Document(f"{number}.{i}", rng.randint(1, 400)) for i in range(5)]
        mode = rng.choice(("append", "update"))
        for step in range(rng.randint(1, 6)):
            step_s += rng.choice((0.0, rng.expovariate(2)))
            if mode == "append":
                documents = (Document(f"{number}:{step}", rng.randint(1, 900)),)
            else:
                i, j = rng.randrange(5), rng.randrange(5)
                current[i], current[j] = current[j], current[i]
                if rng.random() < 0.5:
                    current[i] = Document(f"{number}:{step}", rng.randint(1, 400))
                documents = rng.choice((tuple(current), *lists))
                lists.append(documents)
            steps.append(Step(step_s, documents))
        query = Query(str(number), mode, tuple(steps), rng.choice((0, 7)), rng.choice((0, 9)))
        load.append(Arrived(at_s, query))
    return load


engines = st.builds(
    EngineSpec,
    kv_tokens=st.sampled_from((7_000, 12_000, 60_000)),
    batch_tokens=st.sampled_from((64, 256, 2048)),
    pass_tokens=st.sampled_from((64, 2048)),
    page=st.sampled_from((1, 16)),
    preemption=st.sampled_from(("auto", "recompute", "swap", "off")),
    invalidation=st.sampled_from(("soft", "hard")),
    host_memory_gb=st.sampled_from((0.0, 0.004, 1.0)),
    client=st.sampled_from(("sdk", "direct")),
    prefill_workers=st.integers(1, 3),
    decode_workers=st.integers(0, 2),
)
