"""How open streams get into SGLang's prefill batches: views, the plan, and its application.

place     full requests are put in the order of the policy
decide    the planner sees them, all streams and the pool
apply     victims are unlocked or swapped out, copies come back from host memory
form      SGLang forms its batch from the full requests and the passes that were planned
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy

from sglang_stream.config import EngineConfig
from sglang_stream.engine.learn import CostLearner
from sglang_stream.engine.passes import build_pass, ticket_of
from sglang_stream.engine.stream import Stream
from sglang_stream.engine.table import StreamTable
from sglang_stream.policy import (
    POLICIES,
    Budget,
    CostModel,
    Decision,
    Pace,
    Planner,
    PolicyName,
    PoolView,
    Preemption,
    Prefill,
    Turns,
    Victim,
    View,
)

logger = logging.getLogger(__name__)

_CLIP_MAX_NEW = 4096  # SGLang reserves at most this many decode tokens for a request
_UNMEASURED_TOKENS = 512  # of the passes of an iteration, as long as no cost is known
_SHORTEST = 4  # a pass before an expected seal takes at least this part of the usual time


class Scheduling:
    """The passes of one scheduler. `running_passes`: those in the forward now."""

    def __init__(
        self,
        scheduler: Any,
        table: StreamTable,
        config: EngineConfig,
        learner: CostLearner | None,
    ) -> None:
        self._scheduler = scheduler
        self._table = table
        self._config = config
        self._learner = learner
        self._page = scheduler.page_size
        self.configure(config.policy, config.preemption, config.cost)
        self._passes_built = 0
        self._pace = Pace()
        self._turns = Turns()
        self._decisions = 0
        self._digest = hashlib.blake2b(digest_size=8)
        self.running_passes = 0

    def configure(self, policy: PolicyName, preemption: Preemption, cost: CostModel | None) -> None:
        """Plans so from now on."""
        self._planner = Planner(POLICIES[policy], preemption, cost)
        # Where SGLang was asked for an order of its own, passes find their place in that one.
        self._orders_requests = (
            policy != "default"
            and self._scheduler.policy.policy is CacheAgnosticPolicy.FCFS
            and not self._scheduler.enable_priority_scheduling
        )

    def learn(self, cost: CostModel) -> None:
        """Plans with these costs from now on."""
        self._planner.cost = cost
        self._table.kv.learn(cost.prefill)

    def form_batch(self, original: Any, running_batch: ScheduleBatch) -> Any:
        """The next prefill batch, with the passes that the plan allows."""
        scheduler = self._scheduler
        # SGLang sets this flag when locked KV kept a request out and would not look again.
        running_batch.batch_is_full = False
        self._drop_passes(running_batch)
        withheld = self._withhold()
        self._place(scheduler.waiting_queue)
        full = self._full_views(running_batch)
        decision = self._decide(full, running_batch)
        self._apply(decision)
        passes = self._build_passes(decision)
        later, stretched = self._postpone(full)
        scheduler.waiting_queue.extend(passes)
        chunked_prefill_size = scheduler.chunked_prefill_size
        scheduler.chunked_prefill_size = stretched or chunked_prefill_size
        try:
            batch_plan = original(scheduler, running_batch)
        finally:
            scheduler.chunked_prefill_size = chunked_prefill_size
        left_over = {id(r) for r in passes}
        scheduler.waiting_queue = (
            withheld + [r for r in scheduler.waiting_queue if id(r) not in left_over] + later
        )
        self._started(batch_plan.batch_to_run, running_batch)
        return batch_plan

    @property
    def cost(self) -> CostModel | None:
        return self._planner.cost

    @staticmethod
    def arrange(queue: list[Req]) -> None:
        """Puts passes before the full requests that come after them in the policy's order,
        whatever order SGLang gave those. Both kinds keep their order among themselves."""
        passes = [r for r in queue if ticket_of(r) is not None]
        if not passes:
            return
        passes.reverse()
        arranged: list[Req] = []
        for request in queue:
            if ticket_of(request) is not None:
                continue
            # One that has joined since `_place`, without a key, goes first.
            key = getattr(request, "stream_key", ())
            while passes and passes[-1].stream_key < key:
                arranged.append(passes.pop())
            arranged.append(request)
        queue[:] = arranged + passes[::-1]

    def make_room_to_decode(self, batch: ScheduleBatch) -> None:
        """Preempts streams if the next decode step would not fit, before SGLang retracts others."""
        if not self._table.kv.held_tokens:
            return
        deficit = batch.new_tokens_required_next_decode() - self._free_and_evictable()
        if deficit > 0:
            pool = self._pool_view(batch)
            self._preempt(self._planner.make_room(self._table.kv.order.views, deficit, pool))

    def log_digest(self) -> None:
        """Logs what was decided since the last time: the same on every tensor-parallel rank."""
        if self._decisions:
            logger.info(
                "sglang-stream: %d decisions, digest %s", self._decisions, self._digest.hexdigest()
            )
        self._decisions = 0
        self._digest = hashlib.blake2b(digest_size=8)

    # --- place --------------------------------------------------------------------------------

    def _place(self, queue: list[Req]) -> None:
        """Gives waiting full requests their keys, and their order."""
        streams = self._sealed()
        for request in queue:
            stream = streams.get(id(request))
            if stream is not None or not hasattr(request, "stream_key"):
                request.stream_key = self._table.kv.policy(self._full_view(request, stream))
        if self._orders_requests:
            queue.sort(key=lambda r: r.stream_key)

    def _sealed(self) -> dict[int, Stream]:
        """Sealed streams by the identity of their request."""
        table = self._table
        if len(table.live) == table.open_count:
            return {}
        return {id(s.request): s for s in table.live.values() if s.request is not None}

    def _full_view(self, request: Req, stream: Stream | None) -> View:
        table = self._table
        if not hasattr(request, "stream_arrival"):
            request.stream_arrival = table.arrive(), table.now
            self._pace.arrived(table.now)
        arrival, since_s = request.stream_arrival
        # A request that has been begun holds what it has computed; its stream does not any more.
        if stream is None or request is self._scheduler.chunked_req:
            held = len(request.prefix_indices)
        else:
            held = stream.held
        saved = 0 if stream is None else stream.saved
        tokens = len(request.origin_input_ids) + len(request.output_ids)
        left = request.sampling_params.max_new_tokens - len(request.output_ids)
        ready = max(held, saved)
        return View(
            id=request.rid if stream is None else stream.session.stream_id,
            arrival=arrival if stream is None else stream.arrival,
            tokens=tokens,
            held=held,
            full=True,
            latest=arrival if stream is None else stream.latest,
            saved=saved,
            reserve=min(max(left, 0), _CLIP_MAX_NEW) + 2 * self._page,
            since_s=since_s if stream is None else stream.since_s,
            work_s=table.kv.prefill.work_s(max(0, tokens - ready), ready),
        )

    # --- decide -------------------------------------------------------------------------------

    def _decide(self, full: list[View], running_batch: ScheduleBatch) -> Decision:
        table = self._table
        if not full and not table.kv.to_compute:
            return Decision()
        decision = self._planner.plan(
            full, table.kv.order.views, self._pool_view(running_batch), self._budget(running_batch)
        )
        if decision.victims or decision.restores or decision.passes:
            self._decisions += 1
            self._digest.update(repr(decision).encode())
        return decision

    def _full_views(self, running_batch: ScheduleBatch) -> list[View]:
        """The full requests that the next iteration could admit, in the order of the queue."""
        scheduler = self._scheduler
        slots = scheduler.get_num_allocatable_reqs(len(running_batch.reqs))
        budget = self._batch_tokens()
        streams = self._sealed()
        queue = scheduler.waiting_queue
        if scheduler.chunked_req is not None:
            queue = [scheduler.chunked_req, *queue]
        full: list[View] = []
        for request in queue:
            if len(full) >= slots or budget <= 0:
                break
            view = self._full_view(request, streams.get(id(request)))
            full.append(view)
            budget -= max(1, view.tokens - view.ready)
        return full

    def _batch_tokens(self) -> int:
        """Prompt tokens of one iteration."""
        scheduler = self._scheduler
        return scheduler.chunked_prefill_size or scheduler.max_prefill_tokens

    def _budget(self, running_batch: ScheduleBatch) -> Budget:
        """What passes may take of the next iteration."""
        if self._turns.decodes and not running_batch.is_empty():
            return Budget(0, 0.0, decoding=True)
        tokens = self._config.pass_tokens
        if self._planner.cost is None:
            tokens = min(tokens, _UNMEASURED_TOKENS)
        seconds = self._pass_s()
        due_s = self._table.next_due_s()
        if due_s is not None:
            seconds = min(seconds, max(seconds / _SHORTEST, due_s - self._table.now))
        return Budget(tokens, seconds, decoding=not running_batch.is_empty())

    def _pass_s(self) -> float:
        """How long an iteration with passes may take."""
        if self._config.pass_ms is not None:
            return self._config.pass_ms / 1000
        cost = self._planner.cost
        base_s = cost.prefill.base_s if cost is not None else 0.0
        return self._pace.iteration_s(base_s, self._table.now)

    def _pool_view(self, running_batch: ScheduleBatch) -> PoolView:
        """KV for full requests as SGLang's PrefillAdder counts it, and for open streams with
        everything set aside that the running requests may still decode."""
        reserve = sum(
            min(max(r.sampling_params.max_new_tokens - len(r.output_ids), 0), _CLIP_MAX_NEW)
            for r in running_batch.reqs
        )
        ratio = self._scheduler.new_token_ratio_tracker.current
        free = self._free_and_evictable()
        return PoolView(
            available=free - int(reserve * ratio),
            spare=free - reserve,
            page=self._page,
            host=self._table.kv.host.capacity,
        )

    def _free_and_evictable(self) -> int:
        scheduler = self._scheduler
        allocator = scheduler.token_to_kv_pool_allocator
        return int(allocator.available_size() + scheduler.tree_cache.evictable_size())

    # --- apply --------------------------------------------------------------------------------

    def _apply(self, decision: Decision) -> None:
        self._preempt(decision.victims)
        for stream_id in decision.restores:
            started = time.perf_counter()
            copied = self._table.kv.restore(stream_id)
            if copied and self._learner is not None:
                self._learner.swap_ins.append((copied, time.perf_counter() - started))

    def _preempt(self, victims: list[Victim] | tuple[Victim, ...]) -> None:
        for victim in victims:
            started = time.perf_counter()
            copied = self._table.kv.preempt(victim)
            if copied and self._learner is not None:
                self._learner.swap_outs.append((copied, time.perf_counter() - started))

    def _build_passes(self, decision: Decision) -> list[Req]:
        kv = self._table.kv
        passes: list[Req] = []
        for stream, tokens in self._fitting(decision):
            self._passes_built += 1
            request = build_pass(self._scheduler, stream, tokens, self._passes_built)
            request.stream_key = kv.policy(stream.view(self._page, kv.prefill))
            passes.append(request)
        return passes

    def _fitting(self, decision: Decision) -> Iterator[tuple[Stream, int]]:
        """The planned passes and their tokens at most. A stream that has lost its KV holds what is
        still in the tree, which counts as if it were computed: nobody else may take it then."""
        table, spare = self._table, decision.spare
        for chosen in decision.passes:
            stream = table.live[chosen.id]
            room = chosen.tokens + spare
            if stream.hold is None:
                before = self._free_and_evictable()
                table.kv.hold(stream)
                room -= before - self._free_and_evictable()
                if room < 0:
                    table.kv.let_go(stream)
                    continue
            tokens = min(chosen.tokens, room, stream.cacheable(self._page) - stream.held)
            tokens -= tokens % self._page
            spare = room - max(0, tokens)
            if tokens >= self._page:
                yield stream, tokens

    # --- form ---------------------------------------------------------------------------------

    @staticmethod
    def _drop_passes(running_batch: ScheduleBatch) -> None:
        """Keeps passes out of the decode step.

        With the overlap schedule a batch joins the running one before its results are known; a
        pass would be given a decode slot there that it never needs.
        """
        keep = [i for i, r in enumerate(running_batch.reqs) if ticket_of(r) is None]
        if len(keep) < len(running_batch.reqs):
            running_batch.filter_batch(keep_indices=keep)

    def _withhold(self) -> list[Req]:
        """Takes sealed requests whose last pass still runs out of the queue for one iteration.

        With the overlap schedule the KV of that pass reaches the tree only after the next batch
        was formed: admitted now, they would compute it again.
        """
        waiting = {key for key, stream in self._sealed().items() if stream.in_flight}
        if not waiting:
            return []
        queue = self._scheduler.waiting_queue
        self._scheduler.waiting_queue = [r for r in queue if id(r) not in waiting]
        return [r for r in queue if id(r) in waiting]

    def _postpone(self, full: list[View]) -> tuple[list[Req], int | None]:
        """Takes full requests that are not to share the next iteration out of the queue for it;
        and the chunked-prefill size of that one, None for the usual one.

        Ordinary requests among themselves are SGLang's to arrange.
        """
        if not self._sealed():
            return [], None
        scheduler = self._scheduler
        usual = self._batch_tokens()
        together, tokens = self._planner.together(full, usual)
        stretched = None
        if tokens > usual and scheduler.chunked_prefill_size is not None:
            stretched = tokens + together * (self._page - 1)  # each part is counted in whole pages
        elif together == len(full):
            return [], None
        kept = together - (scheduler.chunked_req is not None)
        later: list[Req] = scheduler.waiting_queue[kept:]
        scheduler.waiting_queue = scheduler.waiting_queue[:kept]
        return later, stretched

    def _started(self, batch: ScheduleBatch | None, running_batch: ScheduleBatch) -> None:
        """Without a prefill `batch` the running one decodes."""
        tickets = [t for r in batch.reqs if (t := ticket_of(r))] if batch is not None else []
        for ticket in tickets:
            self._table.kv.started(ticket.stream)
        self.running_passes += len(tickets)
        passes_s: float | None = None
        if batch is not None and len(tickets) == len(batch.reqs):
            passes_s = 0.0 if self.cost is None else self._predicted_s(batch, self.cost.prefill)
        decodes = batch is None and not running_batch.is_empty()
        self._turns.began(self._table.now, decodes, passes_s)

    @staticmethod
    def _predicted_s(batch: ScheduleBatch, prefill: Prefill) -> float:
        slices = zip(batch.extend_lens, batch.prefix_lens, strict=True)
        return prefill.base_s + sum(prefill.work_s(*lengths) for lengths in slices)
