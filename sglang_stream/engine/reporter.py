"""What a worker tells its routers of its own accord: how busy it is and what it has cached.

A report leaves when something changed, at most every REPORT_INTERVAL_S, and before each forward
that will keep the scheduler from answering for longer than LONG_FORWARD_S: a router that hears
nothing until then knows that the worker computes and does not hang.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec
from sglang.srt.managers.schedule_batch import ScheduleBatch

from sglang_stream import messages as m
from sglang_stream.engine.cache import StreamRadixCache
from sglang_stream.engine.channel import Channel
from sglang_stream.engine.learn import CostLearner
from sglang_stream.engine.roles import queued
from sglang_stream.engine.table import StreamTable

REPORT_INTERVAL_S = 0.1
LONG_FORWARD_S = 0.2
_MARGIN = 2.0  # forwards of the same size differ by this much, attention over a long prefix aside
_UNKNOWN_S_PER_TOKEN = 0.005  # before the first forward
_MEASURED_TOKENS = 64  # a smaller forward says little of the speed
_SMOOTHING = 0.3
_SPEEDS = 15  # forwards whose median is the speed: the first ones after a start are far slower


@dataclass(frozen=True)
class _Forward:
    """A prefill iteration that has begun; `cached`: see `learn.Forwards`."""

    tokens: int
    cached: int
    alone: bool
    started_s: float


class Reporter:
    """The reports of rank 0."""

    def __init__(
        self, scheduler: Any, table: StreamTable, channel: Channel, learner: CostLearner
    ) -> None:
        self._scheduler = scheduler
        self._learner = learner
        self._table = table
        self._channel = channel
        cache = scheduler.tree_cache
        self._cache = cache if isinstance(cache, StreamRadixCache) else None
        self._seq = 0
        self._next_s = 0.0
        self._last: m.Report | None = None
        self._s_per_token = 0.0  # of the slow forwards
        self._speeds: deque[float] = deque(maxlen=_SPEEDS)
        self._forward: _Forward | None = None

    def before_forward(self, batch: ScheduleBatch) -> None:
        """The scheduler is about to compute the prompt tokens of `batch` in one iteration."""
        now = time.monotonic()
        tokens = batch.extend_num_tokens or 0
        self._forward = _Forward(tokens, _cached(batch), len(batch.reqs) == 1, now)
        busy_s = _MARGIN * tokens * (self._s_per_token or _UNKNOWN_S_PER_TOKEN)
        if busy_s > LONG_FORWARD_S and self._channel.has_routers:
            self._send(busy_s, now)

    def tick(self) -> None:
        """Once in each round of the scheduler's loop."""
        now = time.monotonic()
        if self._forward is not None:
            forward, self._forward = self._forward, None
            tokens, seconds = forward.tokens, now - forward.started_s
            if tokens > 0:
                self._learner.forward(tokens, forward.cached, seconds, alone=forward.alone)
            if tokens >= _MEASURED_TOKENS:
                measured = seconds / tokens
                before = self._s_per_token or measured
                # Quick to see that forwards take longer, slow to forget it.
                weight = 1.0 if measured > before else _SMOOTHING
                self._s_per_token = before + weight * (measured - before)
                self._speeds.append(1 / measured)
        if now >= self._next_s:
            if self._channel.has_routers:
                self._send(0.0, now)
            elif self._cache is not None:
                self._cache.take_block_changes()  # a router that comes asks for all of them

    def before_sleep(self) -> None:
        """The scheduler is about to sleep: what has changed is told now, not when it wakes up."""
        if self._channel.has_routers:
            self._send(0.0, time.monotonic())

    def snapshot(self) -> m.Snapshot:
        """All that is cached, as of the last report, which who asks may not have heard."""
        self._last = None
        self._send(0.0, time.monotonic())
        blocks = self._cache.blocks if self._cache is not None else ()
        return m.Snapshot(self._seq, b"".join(blocks))

    def _send(self, busy_s: float, now: float) -> None:
        report = self._report(busy_s)
        self._next_s = now + REPORT_INTERVAL_S
        if self._last is not None and _same(report, self._last):
            return
        self._seq += 1
        self._last = report
        self._channel.report(report)

    def _report(self, busy_s: float) -> m.Report:
        scheduler = self._scheduler
        cached: list[bytes] = []
        evicted: list[bytes] = []
        if self._cache is not None:
            changes = self._cache.take_block_changes()
            cached, evicted = changes.cached, changes.evicted
        waiting = list(queued(scheduler))
        streams = self._table.live.values()
        todo = sum(len(s.tokens) - s.held for s in streams if s.session.state == "open")
        todo += sum(len(r.origin_input_ids) - len(r.prefix_indices) for r in waiting)
        free = scheduler.token_to_kv_pool_allocator.available_size()
        return m.Report(
            seq=self._seq + 1,
            busy_s=busy_s,
            free_tokens=int(free + scheduler.tree_cache.evictable_size()),
            held_tokens=self._table.kv.held_tokens,
            todo_tokens=todo,
            running=len(scheduler.running_batch.reqs),
            queued=len(waiting),
            open_streams=self._table.open_count,
            tokens_per_s=median(self._speeds) if self._speeds else 0.0,
            cached=b"".join(cached),
            evicted=b"".join(evicted),
        )


def _cached(batch: ScheduleBatch) -> int:
    pairs = sum(
        new * (prefix + new / 2)
        for new, prefix in zip(batch.extend_lens, batch.prefix_lens, strict=True)
    )
    new = sum(batch.extend_lens)
    return max(0, round(pairs / new - new / 2)) if new else 0


def _same(a: m.Report, b: m.Report) -> bool:
    """Whether `a` says nothing new after `b`."""
    b = msgspec.structs.replace(b, seq=a.seq, tokens_per_s=a.tokens_per_s, cached=b"", evicted=b"")
    return a == b
