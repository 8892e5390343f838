"""One trace of chunks, updates and seals, to the engine's own table, tree and scheduling and to the
simulator's counterparts: every iteration's decision is the same.

The engine's side is everything but SGLang's forward and its `PrefillAdder`: what the simulator
admits is computed on both sides. With a running engine the digest that `Scheduling.log_digest`
logs could be compared over a whole load; that needs events at iterations, not at times.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from experiments.simulate.batches import Batches, Limits, Request, Slice
from experiments.simulate.holdings import Holdings, HostMemory, Stream
from experiments.simulate.pool import Pool, Prompt
from experiments.simulate.table import StreamTable, tokens_of
from experiments.workload.shapes import Document
from sglang_stream import messages as m
from sglang_stream.config import EngineConfig
from sglang_stream.engine.cache import StreamRadixCache
from sglang_stream.engine.host import HostMemory as EngineHostMemory
from sglang_stream.engine.metrics import silent_metrics
from sglang_stream.engine.schedule import Scheduling
from sglang_stream.engine.table import Limits as TableLimits
from sglang_stream.engine.table import StreamTable as EngineTable
from sglang_stream.policy import (
    POLICIES,
    Copying,
    CostModel,
    Decision,
    Invalidation,
    Pass,
    PolicyName,
    Preemption,
    Prefill,
    View,
)

COST = CostModel(Prefill(0.002, 1e-4, 1e-8), Copying(1e-3, 1e-6), Copying(1e-3, 1e-6))
BATCH_TOKENS = 96
PASS_MS = 12.0
OPENING = Document("opening", 6)
QUESTION = Document("question", 4)


def ids_of(stream_id: str, prompt: Prompt) -> array[int]:
    """Tokens of documents; those of two documents, or of two streams, differ from the first on."""
    ids: array[int] = array("q")
    for document in prompt:
        rng = random.Random(f"{stream_id}/{document.id}")
        ids.extend(rng.choices(range(10**6), k=document.tokens))
    return ids


@dataclass
class EngineSide:
    """The engine's table, tree and scheduling without a scheduler."""

    policy: PolicyName
    invalidation: Invalidation
    preemption: Preemption
    pool: int
    host: int
    requests: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        content = torch.zeros((self.pool + 2, 1), dtype=torch.int64)
        buffers = SimpleNamespace(k_buffer=[content], v_buffer=[content.clone()])
        self.allocator = TokenToKVPoolAllocator(self.pool, torch.float32, "cpu", buffers, False)
        self.cache = StreamRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,  # type: ignore[arg-type]
                token_to_kv_pool_allocator=self.allocator,
                page_size=1,
            )
        )
        self.table = EngineTable(
            self.cache,
            TableLimits(prompt_tokens=10**6, vocab_size=10**6, streams=1000),
            silent_metrics(),
            policy=self.policy,
            invalidation=self.invalidation,
            host=EngineHostMemory(self.host),
        )
        self.scheduler = SimpleNamespace(
            page_size=1,
            policy=SimpleNamespace(policy=CacheAgnosticPolicy.FCFS),
            enable_priority_scheduling=False,
            waiting_queue=[],
            chunked_req=None,
            chunked_prefill_size=BATCH_TOKENS,
            get_num_allocatable_reqs=lambda running: 1000,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.cache,
            new_token_ratio_tracker=SimpleNamespace(current=1.0),
        )
        self.running = SimpleNamespace(reqs=[], is_empty=lambda: True)
        config = EngineConfig(policy=self.policy, preemption=self.preemption, pass_ms=PASS_MS)
        self.scheduling = Scheduling(self.scheduler, self.table, config, None)
        self.scheduling.learn(COST)

    def decide(self) -> tuple[Decision, list[str], int]:
        """What is planned, which full requests are left for the next iteration, and how many
        tokens this one has."""
        self.scheduling._place(self.scheduler.waiting_queue)
        full = self.scheduling._full_views(self.running)
        decision = self.scheduling._decide(full, self.running)
        later, stretched = self.scheduling._postpone(full)
        self.scheduler.waiting_queue += later
        return decision, [request.rid for request in later], stretched or BATCH_TOKENS

    def compute(self, decision: Decision, slices: list[Slice]) -> None:
        """Does what was decided, then what the simulator admits."""
        self.scheduling._apply(decision)
        list(self.scheduling._fitting(decision))
        matches = [self.start(part) for part in slices]
        slots = [self.allocate(part.end - part.start) for part in slices]
        for part, match, new in zip(slices, matches, slots, strict=True):
            self.end(part, match, new)

    def start(self, part: Slice) -> Any:
        name = part.owner.id
        ids = ids_of(name, part.prompt)[: max(part.end - 1, 0)]
        match = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(ids)))
        assert len(match.device_indices) == part.start
        self.cache.inc_lock_ref(match.last_device_node)
        if isinstance(part.owner, Stream):
            self.table.kv.started(self.table.live[name])
            return match
        request = self.requests[name]
        if request in self.scheduler.waiting_queue:
            self.scheduler.waiting_queue.remove(request)
            self.table.kv.forget(self.table.live[name])
        else:
            self.cache.dec_lock_ref(request.node)  # the one of its slice before
        return match

    def allocate(self, tokens: int) -> torch.Tensor:
        missing = tokens - self.allocator.available_size()
        if missing > 0:
            self.cache.evict(EvictParams(num_tokens=missing))
        slots = self.allocator.alloc(tokens)
        assert slots is not None
        return slots

    def end(self, part: Slice, match: Any, slots: torch.Tensor) -> None:
        name = part.owner.id
        ids = ids_of(name, part.prompt)[: part.end]
        values = torch.cat([match.device_indices, slots])
        self.cache.insert(InsertParams(key=RadixKey(ids), value=values))
        if isinstance(part.owner, Stream):
            self.cache.dec_lock_ref(match.last_device_node)
            self.table.pass_done(self.table.live[name], ids, part.start)
            return
        whole = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(ids)))
        request = self.requests[name]
        self.scheduler.chunked_req = None
        if part.end < part.owner.tokens:
            self.cache.inc_lock_ref(whole.last_device_node)
            request.node, request.prefix_indices = whole.last_device_node, range(part.end)
            self.scheduler.chunked_req = request
        else:
            self.table.finish(self.table.live[name])
        self.cache.dec_lock_ref(match.last_device_node)


class SimulatorSide:
    """The simulator's table and batches, without its clock."""

    def __init__(self, engine: EngineSide) -> None:
        self.pool = Pool(engine.pool)
        kv = Holdings(
            self.pool, engine.policy, engine.invalidation, HostMemory(engine.host), COST.prefill
        )
        self.table = StreamTable(kv)
        limits = Limits(BATCH_TOKENS, 2048, PASS_MS / 1000, engine.preemption)
        self.batches = Batches(self.pool, self.table, engine.policy, COST, limits)
        self.decision, self.later, self.tokens = Decision(), list[str](), BATCH_TOKENS
        decide, postpone = self.batches._decide, self.batches._postpone

        def decided(full: list[View]) -> Decision:
            self.decision = decide(full)
            return self.decision

        def postponed(full: list[View]) -> tuple[list[Request], int]:
            later, self.tokens = postpone(full)
            self.later = [request.id for request in later]
            return later, self.tokens

        self.batches._decide = decided  # type: ignore[method-assign]
        self.batches._postpone = postponed  # type: ignore[method-assign]

    def form(self) -> list[Slice]:
        self.decision, self.later, self.tokens = Decision(), [], BATCH_TOKENS
        return self.batches.form().slices

    def end(self, slices: list[Slice]) -> None:
        for part in slices:
            owner = part.owner
            node = self.pool.insert(owner.root, part.prompt, part.end, part.end - part.start)
            self.pool.lock(node)
            self.pool.unlock(part.node)
            if isinstance(owner, Stream):
                self.table.pass_done(owner, part.prompt, part.start, part.end, node)
                continue
            owner.node, owner.done = node, part.end
            if part.end == owner.tokens:
                self.pool.unlock(node)
                assert owner.stream is not None
                self.table.finish(owner.stream)


class Both:
    """The same events to both sides. `lists`: the contexts that a stream had."""

    def __init__(self, engine: EngineSide, rng: random.Random) -> None:
        self.engine = engine
        self.simulator = SimulatorSide(engine)
        self._rng = rng
        self._opened = 0
        self._seq = 0
        self._lists: dict[str, list[Prompt]] = {}

    def random_event(self) -> None:
        is_open = [s for s in self.simulator.table.live.values() if not s.sealed]
        kind = self._rng.random()
        if kind < 0.25 or not is_open:
            self.open(self._rng.choice(("append", "update")))
        elif kind < 0.85:
            self.change(self._rng.choice(is_open))
        else:
            self.seal(self._rng.choice(is_open))

    def open(self, mode: m.Mode) -> None:
        self._opened += 1
        name = f"st-{self._opened}"
        self._lists[name] = []
        tokens = m.pack_tokens(ids_of(name, (OPENING,)))
        self.engine.table.open(m.Open(name, mode, tokens, 1e9), self.engine.table.now)
        self.simulator.table.open(name, mode, (OPENING,))

    def change(self, stream: Stream) -> None:
        self._seq += 1
        engine, simulator = self.engine.table, self.simulator.table
        seq = engine.live[stream.id].session.seq + 1
        new = Document(f"d{self._seq}", self._rng.randint(1, 60))
        if stream.mode == "append":
            raw = m.pack_tokens(ids_of(stream.id, (new,)))
            engine.append(m.Append(stream.id, seq, raw, m.digest(raw)), engine.now)
            simulator.append(stream, (new,))
            return
        lists = self._lists[stream.id]
        before = lists[-1] if lists else ()
        cut = self._rng.randint(0, len(before))
        changed = (*before[:cut], new, *before[cut + 1 :])[:5]
        documents = self._rng.choice((changed, changed, *lists[-2:]))
        lists.append(documents)
        raw = m.pack_tokens(ids_of(stream.id, documents))
        engine.update(m.Update(stream.id, seq, raw, m.digest(raw)), engine.now)
        simulator.update(stream, documents)

    def seal(self, stream: Stream) -> None:
        of_engine = self.engine.table.live[stream.id]
        prompt = (*stream.prompt, QUESTION)
        request = SimpleNamespace(
            rid=stream.id,
            origin_input_ids=self.engine.table.seal(of_engine, stream.id)
            + ids_of(stream.id, (QUESTION,)),
            output_ids=[],
            sampling_params=SimpleNamespace(max_new_tokens=1),
            prefix_indices=[],
        )
        of_engine.request = self.engine.requests[stream.id] = request
        self.engine.scheduler.waiting_queue.append(request)
        self.simulator.table.seal(stream)
        self.simulator.batches.queue.append(
            Request(stream.id, stream.root, prompt, tokens_of(prompt), 1, stream)
        )

    def evict(self) -> None:
        """Evicts all that nobody holds. Left to memory alone, the two would evict other parts of
        it: the engine's tree has a node for each pass, the simulator's for each document."""
        self.engine.cache.evict(EvictParams(num_tokens=self.engine.cache.evictable_size()))
        self.simulator.pool.make_free(self.simulator.pool.available)

    def iterate(self) -> Decision:
        """One iteration of both; returns what both decided."""
        now = self.engine.table.now + self._rng.choice((0.001, 0.02, 0.3))
        self.engine.table.now = self.simulator.table.now = now
        for _ in range(self._rng.randint(0, 4)):
            self.random_event()
        decision, later, tokens = self.engine.decide()
        slices = self.simulator.form()
        assert self.simulator.decision == decision
        assert (self.simulator.later, self.simulator.tokens) == (later, tokens)
        self.engine.compute(decision, slices)
        self.simulator.end(slices)
        self.check()
        return decision

    def check(self) -> None:
        engine, simulator = self.engine, self.simulator
        assert engine.table.kv.order.views == simulator.table.kv.order.views
        assert engine.table.kv.held_tokens == simulator.table.kv.held_tokens
        assert engine.cache.protected_size() == simulator.pool.protected
        for stream in simulator.table.live.values():
            told = engine.table.live[stream.id].usage
            mine = stream.usage
            for name in ("lcp_tokens", "invalidated_tokens", "computed_tokens", "ready_tokens"):
                assert getattr(told, name) == getattr(mine, name)
            assert told.recomputed_tokens == mine.recomputed_tokens
            assert told.preemptions == mine.preemptions


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("invalidation", ["soft", "hard"])
def test_both_decide_alike_with_room_for_all(
    policy: PolicyName, invalidation: Invalidation
) -> None:
    both = Both(EngineSide(policy, invalidation, "auto", 100_000, 0), random.Random(policy))
    decisions = [both.iterate() for _ in range(300)]
    assert sum(len(decision.passes) for decision in decisions) > 50


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("preemption", ["recompute", "swap", "off"])
def test_both_decide_alike_where_streams_take_each_others_kv(
    policy: PolicyName, preemption: Preemption
) -> None:
    engine = EngineSide(policy, "hard", preemption, 2000, 800)
    both = Both(engine, random.Random(policy))
    decisions = []
    for _ in range(300):
        both.evict()
        decisions.append(both.iterate())
    assert sum(len(decision.victims) for decision in decisions) > 10
    if preemption == "swap":
        assert sum(len(decision.restores) for decision in decisions) > 0


@pytest.mark.parametrize(
    ("spare", "fits"), [(0, []), (519, []), (520, []), (560, [40]), (900, [80])]
)
def test_kv_that_is_found_again_counts_as_if_it_were_computed(spare: int, fits: list[int]) -> None:
    engine = EngineSide("fcfs", "soft", "recompute", 1000, 0)
    ids = ids_of("a", (Document("page", 700),))
    engine.table.open(m.Open("a", "append", m.pack_tokens(ids), 1e9), 0.0)
    stream = engine.table.live["a"]
    engine.cache.insert(InsertParams(key=RadixKey(ids[:600]), value=engine.allocate(600)))
    decision = Decision(passes=(Pass("a", 80),), spare=spare)
    assert [tokens for _, tokens in engine.scheduling._fitting(decision)] == fits
    assert stream.held == (600 if spare >= 520 else 0)
    assert engine.cache.protected_size() == stream.held
