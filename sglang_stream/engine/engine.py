"""Streams inside one SGLang scheduler: the steps that its loop makes for them.

    receive     chunk events join the requests that rank 0 pulls, so that all ranks see both
    handle      each event changes the table and is answered
    seal        a small `/generate` call becomes the stream's request
    schedule    passes join SGLang's batches as planned (`schedule.py`)
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
from sglang_stream.engine.channel import Channel, Expire, StreamEvent, Tick, refusal
from sglang_stream.engine.host import HostMemory, kv_bytes_per_token
from sglang_stream.engine.learn import CostLearner
from sglang_stream.engine.metrics import EngineMetrics
from sglang_stream.engine.passes import ticket_of
from sglang_stream.engine.reporter import Reporter
from sglang_stream.engine.roles import queued, role_of
from sglang_stream.engine.schedule import Scheduling
from sglang_stream.engine.seal import check_ordinary, refuse, seal, seal_call
from sglang_stream.engine.stream import Stream
from sglang_stream.engine.table import Limits, StreamTable
from sglang_stream.errors import (
    InvalidRequest,
    SequenceConflict,
    SequenceGap,
    StreamError,
    StreamMoved,
    StreamNotFound,
)
from sglang_stream.policy import CostModel

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
        self.role = role_of(scheduler)
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        self.table = StreamTable(
            holder,
            limits,
            metrics,
            policy=config.policy,
            invalidation=config.invalidation,
            host=HostMemory.for_pool(pool, config.host_memory_gb),
            page_size=scheduler.page_size,
        )
        self._next_expiry_s = 0.0
        self._sealed_at: dict[str, float] = {}
        self._welcome: m.Welcome | None = None
        self._reporter: Reporter | None = None
        self._learner: CostLearner | None = None
        if channel is not None:
            self._welcome = channel.welcome(
                self.role,
                context_len,
                limits.vocab_size,
                scheduler.page_size,
                scheduler.max_total_num_tokens,
            )
            self._learner = CostLearner(kv_bytes_per_token(pool))
            self._reporter = Reporter(scheduler, self.table, channel, self._learner)
        self.scheduling = Scheduling(scheduler, self.table, config, self._learner)
        if config.cost is not None:
            self.scheduling.learn(config.cost)

    # --- receive and handle -------------------------------------------------------------------

    def receive(self) -> list[StreamEvent | Expire | Tick]:
        """What has arrived since the last poll, and who has been idle for too long (rank 0)."""
        if self._channel is None or self._welcome is None or self._reporter is None:
            return []
        self._reporter.tick()
        events: list[StreamEvent | Expire | Tick] = [*self._channel.poll(self._welcome)]
        now = time.monotonic()
        if events or self.table.live:
            events.insert(0, Tick(now, self._new_cost()))
        if self.table.live and now >= self._next_expiry_s:
            self._next_expiry_s = now + _EXPIRY_INTERVAL_S
            expired = self.table.expired(now)
            if expired:
                events.append(Expire(tuple(expired)))
        return events

    def tick(self, tick: Tick) -> None:
        """The time and the costs by which all ranks decide."""
        self.table.tick(tick.now)
        if tick.cost is not None:
            self.scheduling.learn(tick.cost)

    def _new_cost(self) -> CostModel | None:
        if self._config.cost is not None or self._learner is None:
            return None
        return self._learner.fitted()

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

    def _apply(self, event: m.Event | m.Resync | m.Configure, now: float) -> m.Answer:
        if isinstance(event, m.Resync):
            return self._reporter.snapshot() if self._reporter else m.Snapshot(0, b"")
        if isinstance(event, m.Configure):
            return self._configure(event)
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

    def _configure(self, event: m.Configure) -> m.Accepted:
        self.settle()
        if self.table.live:
            raise InvalidRequest("this worker has streams: end them before you change the policy")
        self.scheduling.configure(event.policy, event.preemption, self.scheduling.cost)
        self.table.kv.configure(event.policy, event.invalidation)
        self._metrics.use(event.policy)
        return m.Accepted(0, 0)

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
                    self.table.kv.forget(stream)
                    continue
            self._sealed_at.pop(stream.rid or "", None)
            if request is not None and _was_refused(request) and not stream.aborted:
                self.table.reopen(stream)
            else:
                self.table.finish(stream)
        self._measure()

    # --- schedule -----------------------------------------------------------------------------

    def schedule(self, original: Any, running_batch: ScheduleBatch) -> Any:
        """Forms the next prefill batch, with passes where streams are open."""
        self.settle()
        if self.table.live:
            batch_plan = self.scheduling.form_batch(original, running_batch)
        else:
            batch_plan = original(self._scheduler, running_batch)
        batch = batch_plan.batch_to_run
        if self._reporter is not None and batch is not None:
            self._reporter.before_forward(batch)
        return batch_plan

    # --- finish -------------------------------------------------------------------------------

    def finish(self, requests: list[Req]) -> list[Req]:
        """Completes the passes among requests with output; returns the others."""
        if not self.table.live and not self.scheduling.running_passes:
            return requests
        others: list[Req] = []
        for request in requests:
            ticket = ticket_of(request)
            if ticket is None:
                others.append(request)
                self._first_token(request)
            elif request.finished() and not request.finished_output:
                request.finished_output = True
                self.scheduling.running_passes -= 1
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
        sent = tokens * sum(sizes) // self._scheduler.page_size
        if early:
            stream.usage.early_kv_bytes += sent
        else:
            stream.usage.late_kv_bytes += sent
        self._metrics.kv_sent.labels("early" if early else "late").inc(sent)

    def flush(self) -> None:
        """Before the cache is emptied: open streams keep their tokens and are computed anew."""
        self.scheduling.log_digest()
        self.table.kv.forget_kv()

    def state(self) -> dict[str, Any]:
        """What a router finds under `internal_states[0]["sglang_stream"]` of the server's info."""
        if self._channel is None:
            return {}
        state: dict[str, Any] = {
            "endpoint": self._channel.endpoint,
            "worker_id": self._channel.worker_id,
            "role": self.role,
        }
        if self._learner is not None:
            state["kv_bytes_per_token"] = self._learner.kv_bytes_per_token
            state["forwards"] = list(self._learner.forwards.alone)
            state["swap_outs"] = list(self._learner.swap_outs)
            state["swap_ins"] = list(self._learner.swap_ins)
        if self._config.served:
            state["pid"] = os.getppid()
        return state

    def _first_token(self, request: Req) -> None:
        sealed_at = self._sealed_at.pop(request.rid, None) if self._sealed_at else None
        if sealed_at is not None:
            self._metrics.ttft.observe(time.perf_counter() - sealed_at)

    def _measure(self) -> None:
        self._metrics.open.set(self.table.open_count)
        self._metrics.held.set(self.table.kv.held_tokens)


def _was_refused(request: Req) -> bool:
    """Whether SGLang found fault with the request itself, such as a grammar that is none."""
    reason = request.finished_reason
    return isinstance(reason, FINISH_ABORT) and reason.status_code == HTTPStatus.BAD_REQUEST
