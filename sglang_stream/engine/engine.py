"""Streams inside one SGLang scheduler: the steps that its loop makes for them.

    receive     chunk events join the requests that rank 0 pulls, so that all ranks see both
    handle      each event changes the table and is answered
    seal        a small `/generate` call becomes the stream's request
    schedule    victims are unlocked, passes join the batch behind the full requests
    finish      a pass's KV is held; a request that ended lets its stream go

Every step is deterministic in the events and SGLang's own state, so tensor-parallel ranks agree.
"""

from __future__ import annotations

import hmac
import os
import time
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch

from sglang_stream import messages as m
from sglang_stream.config import EngineConfig
from sglang_stream.engine.cache import Holder
from sglang_stream.engine.channel import Channel, Expire, StreamEvent, refusal
from sglang_stream.engine.metrics import EngineMetrics
from sglang_stream.engine.passes import build_pass, ticket_of
from sglang_stream.engine.reporter import Reporter
from sglang_stream.engine.roles import queued, role_of
from sglang_stream.engine.seal import check_ordinary, refuse, seal, seal_call
from sglang_stream.engine.table import Limits, Stream, StreamTable
from sglang_stream.errors import (
    SequenceConflict,
    SequenceGap,
    StreamError,
    StreamMoved,
    StreamNotFound,
)
from sglang_stream.policy import (
    Decision,
    FullView,
    PoolView,
    StreamView,
    choose_victims,
    plan,
    rank,
)

_CLIP_MAX_NEW = 4096  # SGLang reserves at most this many decode tokens for a request
_EXPIRY_INTERVAL_S = 0.25

# How refused events are counted.
_ODD = {
    SequenceGap.code: "gap",
    SequenceConflict.code: "conflict",
    StreamNotFound.code: "unknown",
    StreamMoved.code: "moved",
}


class StreamEngine:
    """The stream support of one scheduler process; `channel` is None except on rank 0."""

    def __init__(
        self,
        scheduler: Any,
        holder: Holder,
        config: EngineConfig,
        channel: Channel | None,
        metrics: EngineMetrics,
    ) -> None:
        context_len = scheduler.model_config.context_len
        limits = Limits(
            prompt_tokens=min(config.max_prompt_tokens or context_len, context_len),
            vocab_size=scheduler.model_config.vocab_size,
            streams=config.max_streams,
        )
        self._scheduler = scheduler
        self._config = config
        self._channel = channel
        self._metrics = metrics
        self._page = scheduler.page_size
        self.role = role_of(scheduler)
        self.table = StreamTable(holder, limits, metrics)
        self._passes_built = 0
        self._running_passes = 0
        self._decode_is_due = False
        self._next_expiry_s = 0.0
        self._sealed_at: dict[str, float] = {}
        self._welcome: m.Welcome | None = None
        self._reporter: Reporter | None = None
        if channel is not None:
            pool = scheduler.max_total_num_tokens
            self._welcome = channel.welcome(
                self.role, context_len, limits.vocab_size, self._page, pool
            )
            self._reporter = Reporter(scheduler, self.table, channel)

    # --- receive and handle -------------------------------------------------------------------

    def receive(self) -> list[StreamEvent | Expire]:
        """What has arrived since the last poll, and who has been idle for too long (rank 0)."""
        if self._channel is None or self._welcome is None or self._reporter is None:
            return []
        self._reporter.tick()
        events: list[StreamEvent | Expire] = [*self._channel.poll(self._welcome)]
        now = time.monotonic()
        if self.table.live and now >= self._next_expiry_s:
            self._next_expiry_s = now + _EXPIRY_INTERVAL_S
            expired = self.table.expired(now)
            if expired:
                events.append(Expire(tuple(expired)))
        return events

    def handle(self, received: StreamEvent) -> None:
        """Applies one event and answers it."""
        answer: m.Answer
        try:
            answer = self._apply(received.event, received.now)
        except StreamError as e:
            self._metrics.odd.labels(_ODD.get(e.code, "refused")).inc()
            answer = refusal(e)
        if self._channel is not None:
            self._channel.answer(received.peer, received.call_id, answer)
        self._measure()

    def expire(self, expired: Expire) -> None:
        """Drops the streams that rank 0 found idle, unless an event or a seal came first."""
        for stream_id in expired.stream_ids:
            stream = self.table.live.get(stream_id)
            if stream is not None and stream.session.state == "open":
                self.table.drop(stream)
        self._measure()

    def _apply(self, event: m.Event | m.Resync, now: float) -> m.Answer:
        if isinstance(event, m.Resync):
            return self._reporter.snapshot() if self._reporter else m.Snapshot(0, b"")
        self._check_owner(event)
        if isinstance(event, m.Open | m.Append | m.Update | m.Abort):
            self._check_epoch(event)
        match event:
            case m.Open():
                return self.table.open(event, now)
            case m.Append():
                return self.table.append(event, now)
            case m.Update():
                return self.table.update(event, now)
            case m.Abort():
                return self._abort(self.table.get(event.stream_id))
            case m.Query():
                self.settle()  # a refusal that the sender has seen must show
                return self.table.status(event.stream_id)
            case m.Fetch():
                return self.table.copy(self.table.get(event.stream_id), event.since)

    def before_sleep(self) -> None:
        """The scheduler is about to sleep: rank 0 tells its routers what has changed."""
        if self._reporter is not None:
            self._reporter.before_sleep()

    def _check_owner(self, event: m.Event) -> None:
        owner = self.table.owner(event.stream_id)
        if owner is None or event.owner is None:
            return
        if not hmac.compare_digest(owner, event.owner):
            self._metrics.odd.labels("foreign").inc()
            raise StreamNotFound(f"stream {event.stream_id} is unknown or has expired")

    def _check_epoch(self, event: m.Open | m.Append | m.Update | m.Abort) -> None:
        """Drops a copy that is older than what the sender knows of. Raises StreamMoved for a
        sender who knows of an older one."""
        stream = self.table.live.get(event.stream_id)
        if stream is None or event.epoch == stream.epoch:
            return
        if event.epoch < stream.epoch:
            raise StreamMoved(
                f"stream {event.stream_id} has moved (epoch {stream.epoch}, not {event.epoch}): "
                "fetch it again"
            )
        if stream.rid is not None:
            self._scheduler.abort_request(AbortReq(rid=stream.rid))
        self.table.drop(stream)

    def _abort(self, stream: Stream) -> m.Accepted:
        accepted = m.Accepted(stream.session.seq, len(stream.tokens))
        if stream.session.state == "open":
            self.table.drop(stream)
        else:
            stream.aborted = True
            self._scheduler.abort_request(AbortReq(rid=stream.rid))
            self.settle()
        return accepted

    # --- seal ---------------------------------------------------------------------------------

    def generate(self, original: Any, request: TokenizedGenerateReqInput) -> None:
        """Handles a `/generate` call: an ordinary one as SGLang does, a seal by its stream."""
        try:
            call = seal_call(request)
            if call is None:
                check_ordinary(request, self._scheduler.model_config.vocab_size)
                original(self._scheduler, request)
                return
            stream = seal(self.table, call, request, self._scheduler)
        except StreamError as e:
            refuse(self._scheduler, request, e)
            return
        self._sealed_at[request.rid] = time.perf_counter()
        self._with_whole_context(original, request)
        stream.request = self._find_request(request.rid)
        self.settle()

    def _with_whole_context(self, original: Any, request: TokenizedGenerateReqInput) -> None:
        """Runs SGLang's handler with the limits that `seal` has checked.

        SGLang keeps a margin of a few tokens below the context length and clips requests to it
        without a word; the KV of a request never needs that margin.
        """
        scheduler = self._scheduler
        limits = scheduler.max_req_len, scheduler.max_req_input_len
        context_len = scheduler.model_config.context_len
        scheduler.max_req_len, scheduler.max_req_input_len = context_len + 1, context_len + 1
        try:
            original(scheduler, request)
        finally:
            scheduler.max_req_len, scheduler.max_req_input_len = limits

    def _find_request(self, rid: str) -> Req | None:
        return next((r for r in queued(self._scheduler) if r.rid == rid), None)

    def settle(self) -> None:
        """Lets go of sealed streams whose request has its own lock, has ended or has vanished.

        SGLang ends a request in many places (queue limits, time-outs, aborts); rather than hooking
        each one, the request itself is looked at.
        """
        if len(self.table.live) == self.table.open_count:
            return
        sealed = [s for s in self.table.live.values() if s.session.state == "sealed"]
        waiting = {id(r) for r in queued(self._scheduler)}
        for stream in sealed:
            request = stream.request
            if request is not None and not request.finished():
                if id(request) in waiting:
                    continue
                if request.req_pool_idx is not None:
                    self.table.release(stream)
                    continue
            self._sealed_at.pop(stream.rid or "", None)
            if request is not None and _was_refused(request) and not stream.aborted:
                self.table.reopen(stream)
            else:
                self.table.finish(stream)
        self._measure()

    # --- schedule -----------------------------------------------------------------------------

    def schedule(self, original: Any, running_batch: ScheduleBatch) -> Any:
        """Forms the next prefill batch with the passes that the plan allows."""
        batch_plan = self._schedule(original, running_batch)
        batch = batch_plan.batch_to_run
        if self._reporter is not None and batch is not None:
            self._reporter.before_forward(batch.extend_num_tokens or 0)
        return batch_plan

    def _schedule(self, original: Any, running_batch: ScheduleBatch) -> Any:
        self.settle()
        if not self.table.live:
            return original(self._scheduler, running_batch)
        scheduler = self._scheduler
        # SGLang sets this flag when locked KV kept a request out and would not look again.
        running_batch.batch_is_full = False
        self._drop_passes(running_batch)
        withheld = self._withhold()
        decision = self._decide(running_batch)
        for stream_id in decision.victims:
            self.table.preempt(self.table.live[stream_id])
        passes = self._build_passes(decision)
        scheduler.waiting_queue.extend(passes)
        batch_plan = original(scheduler, running_batch)
        left_over = {id(r) for r in passes}
        scheduler.waiting_queue = withheld + [
            r for r in scheduler.waiting_queue if id(r) not in left_over
        ]
        self._started(batch_plan.batch_to_run)
        return batch_plan

    def make_room_to_decode(self, batch: ScheduleBatch) -> None:
        """Unlocks victims if the next decode step would not fit, before SGLang retracts anybody."""
        if not self.table.held_tokens:
            return
        need = batch.new_tokens_required_next_decode()
        deficit = need - self._free_and_evictable()
        if deficit > 0:
            for stream_id in choose_victims(rank(self._views()), deficit):
                self.table.preempt(self.table.live[stream_id])

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
        waiting = {
            id(s.request) for s in self.table.live.values() if s.in_flight and s.request is not None
        }
        if not waiting:
            return []
        queue = self._scheduler.waiting_queue
        self._scheduler.waiting_queue = [r for r in queue if id(r) not in waiting]
        return [r for r in queue if id(r) in waiting]

    def _decide(self, running_batch: ScheduleBatch) -> Decision:
        full = self._full_views(running_batch)
        if not full and not self._wants_pass():
            return Decision()
        # After an iteration of passes alone the running requests decode once: they are full.
        if self._decode_is_due and not running_batch.is_empty():
            budget = 0
        else:
            budget = self._config.pass_tokens
        return plan(
            full,
            self._views(),
            self._pool_view(running_batch),
            pass_tokens=budget,
            page_size=self._page,
        )

    def _wants_pass(self) -> bool:
        """Whether any stream has something to compute; idle ones must not cost each decode step."""
        return any(
            s.held < s.cacheable(self._page) and not s.in_flight and s.session.state == "open"
            for s in self.table.live.values()
        )

    def _views(self) -> list[StreamView]:
        views = (s.view(self._page) for s in self.table.live.values() if not s.in_flight)
        return [v for v in views if v.held or v.missing]

    def _full_views(self, running_batch: ScheduleBatch) -> list[FullView]:
        """The full requests that the next iteration could admit, in SGLang's order."""
        scheduler = self._scheduler
        slots = scheduler.get_num_allocatable_reqs(len(running_batch.reqs))
        budget = scheduler.chunked_prefill_size or scheduler.max_prefill_tokens
        held = {id(s.request): s.held for s in self.table.live.values() if s.request is not None}
        queue = scheduler.waiting_queue
        if scheduler.chunked_req is not None:
            queue = [scheduler.chunked_req, *queue]
        full: list[FullView] = []
        for request in queue:
            if len(full) >= slots or budget <= 0:
                break
            known = held.get(id(request), len(request.prefix_indices))
            extend = len(request.origin_input_ids) + len(request.output_ids) - known
            left = request.sampling_params.max_new_tokens - len(request.output_ids)
            full.append(FullView(extend, min(max(left, 0), _CLIP_MAX_NEW) + 2 * self._page))
            budget -= extend
        return full

    def _pool_view(self, running_batch: ScheduleBatch) -> PoolView:
        """KV for full requests as SGLang's PrefillAdder counts it, and for open streams with
        everything set aside that the running requests may still decode."""
        reserve = sum(
            min(max(r.sampling_params.max_new_tokens - len(r.output_ids), 0), _CLIP_MAX_NEW)
            for r in running_batch.reqs
        )
        ratio = self._scheduler.new_token_ratio_tracker.current
        free = self._free_and_evictable()
        return PoolView(available=free - int(reserve * ratio), spare=free - reserve)

    def _free_and_evictable(self) -> int:
        scheduler = self._scheduler
        allocator = scheduler.token_to_kv_pool_allocator
        return int(allocator.available_size() + scheduler.tree_cache.evictable_size())

    def _build_passes(self, decision: Decision) -> list[Req]:
        passes: list[Req] = []
        for chosen in decision.passes:
            stream = self.table.live[chosen.stream_id]
            if stream.hold is None:
                self.table.hold_cached(stream)
                if stream.held >= stream.cacheable(self._page):
                    continue
            self._passes_built += 1
            passes.append(build_pass(self._scheduler, stream, chosen.tokens, self._passes_built))
        return passes

    def _started(self, batch: ScheduleBatch | None) -> None:
        tickets = [t for r in batch.reqs if (t := ticket_of(r))] if batch is not None else []
        for ticket in tickets:
            ticket.stream.in_flight = True
        self._running_passes += len(tickets)
        self._decode_is_due = (
            bool(tickets) and batch is not None and len(tickets) == len(batch.reqs)
        )

    # --- finish -------------------------------------------------------------------------------

    def finish(self, requests: list[Req]) -> list[Req]:
        """Completes the passes among requests with output; returns the others."""
        if not self.table.live and not self._running_passes:
            return requests
        others: list[Req] = []
        for request in requests:
            ticket = ticket_of(request)
            if ticket is None:
                others.append(request)
                self._first_token(request)
            elif request.finished() and not request.finished_output:
                request.finished_output = True
                self._running_passes -= 1
                self.table.pass_done(ticket.stream, ticket.ids, ticket.start)
                self._metrics.passes.inc()
                self._metrics.pass_tokens.inc(len(ticket.ids) - ticket.start)
        if self.role == "decode":
            self.settle()  # there `schedule` is never called
        self._measure()
        return others

    def kv_sent(self, request: Req, tokens: int, *, early: bool) -> None:
        """`tokens` of a request's KV are on their way to its decode worker."""
        stream = next((s for s in self.table.live.values() if s.request is request), None)
        if stream is None or not tokens:
            return
        sizes = self._scheduler.disagg_prefill_bootstrap_queue.kv_manager.kv_args.kv_item_lens
        sent = tokens * sum(sizes) // self._page
        if early:
            stream.usage.early_kv_bytes += sent
        else:
            stream.usage.late_kv_bytes += sent
        self._metrics.kv_sent.labels("early" if early else "late").inc(sent)

    def flush(self) -> None:
        """Before the cache is emptied: open streams keep their tokens and are computed anew."""
        self.table.forget_kv()

    def state(self) -> dict[str, Any]:
        """What a router finds under `internal_states[0]["sglang_stream"]` of the server's info."""
        if self._channel is None:
            return {}
        state: dict[str, Any] = {
            "endpoint": self._channel.endpoint,
            "worker_id": self._channel.worker_id,
            "role": self.role,
        }
        if self._config.served:
            state["pid"] = os.getppid()
        return state

    def _first_token(self, request: Req) -> None:
        sealed_at = self._sealed_at.pop(request.rid, None) if self._sealed_at else None
        if sealed_at is not None:
            self._metrics.ttft.observe(time.perf_counter() - sealed_at)

    def _measure(self) -> None:
        self._metrics.open.set(self.table.open_count)
        self._metrics.held.set(self.table.held_tokens)


def _was_refused(request: Req) -> bool:
    """Whether SGLang found fault with the request itself, such as a grammar that is none."""
    reason = request.finished_reason
    return isinstance(reason, FINISH_ABORT) and reason.status_code == HTTPStatus.BAD_REQUEST
