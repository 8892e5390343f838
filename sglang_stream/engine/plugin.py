"""SGLang loads this in each of its processes and it hooks stream support in.

Inert unless the environment variable `SGLANG_STREAM` is set (`sglang-stream worker` sets it).
SGLang logs and swallows the failures of plugins; a worker that runs without its stream support
would be worse than none, so everything is checked when the scheduler builds its prefix cache,
which is after all hooks were applied and before the worker reports to be ready.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import sglang
import zmq
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    default_radix_cache_factory,
    register_radix_cache_backend,
)
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_stream.config import ENGINE_VARIABLE, EngineConfig
from sglang_stream.engine.cache import NoHolds, StreamRadixCache
from sglang_stream.engine.channel import Channel, Expire, StreamEvent, Tick
from sglang_stream.engine.compat import check_server_args, check_version
from sglang_stream.engine.engine import StreamEngine
from sglang_stream.engine.metrics import EngineMetrics, silent_metrics
from sglang_stream.engine.passes import admit_pass, ticket_of
from sglang_stream.engine.schedule import Scheduling
from sglang_stream.engine.seal import in_order

CACHE_BACKEND = "sglang_stream"
_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_MANAGERS = "sglang.srt.managers"
_SCHEDULER = f"{_MANAGERS}.scheduler.Scheduler"
_COMPONENTS = f"{_MANAGERS}.scheduler_components"
_REST_MS = 20  # at most: news of a transfer ends it; a look without news takes about 2 ms


def activate() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    value = os.environ.get(ENGINE_VARIABLE)
    if not value:
        return
    check_version(sglang.__version__)
    StreamPlugin(EngineConfig.from_environment(value)).install()


class StreamPlugin:
    """The hooks of one process. `engine` exists in scheduler processes once they are set up."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._channel: Channel | None = None
        self._metrics = silent_metrics()
        self.engine: StreamEngine | None = None
        self._kv_moved: int | None = None
        self._hooks: list[tuple[str, Callable[..., Any], HookType]] = [
            (f"{_SERVER_ARGS}.__post_init__", self._choose_cache, HookType.BEFORE),
            (f"{_SERVER_ARGS}.check_server_args", self._check_args, HookType.BEFORE),
            (f"{_SCHEDULER}.init_ipc_channels", self._bind, HookType.AFTER),
            (f"{_SCHEDULER}.init_idle_sleeper", self._wake_on_events, HookType.AFTER),
            (
                "sglang.srt.disaggregation.common.conn.CommonKVManager.update_status",
                self._wake_on_kv,
                HookType.AFTER,
            ),
            (f"{_SCHEDULER}.init_request_dispatcher", self._start_engine, HookType.AFTER),
            (
                f"{_COMPONENTS}.request_receiver.SchedulerRequestReceiver._pull_raw_reqs",
                self._receive,
                HookType.AFTER,
            ),
            (
                f"{_MANAGERS}.tokenizer_manager.TokenizerManager._create_tokenized_object",
                self._refuse_huge_ids,
                HookType.AROUND,
            ),
            (f"{_SCHEDULER}.handle_generate_request", self._generate, HookType.AROUND),
            (f"{_SCHEDULER}.get_new_batch_prefill", self._schedule, HookType.AROUND),
            (
                f"{_MANAGERS}.schedule_policy.SchedulePolicy.calc_priority",
                self._arrange,
                HookType.AFTER,
            ),
            (
                f"{_MANAGERS}.schedule_policy.PrefillAdder.add_one_req",
                self._admit,
                HookType.AROUND,
            ),
            (
                f"{_MANAGERS}.schedule_batch.ScheduleBatch.check_decode_mem",
                self._before_decode,
                HookType.BEFORE,
            ),
            (
                f"{_COMPONENTS}.output_streamer.SchedulerOutputStreamer.stream_output",
                self._finish,
                HookType.AROUND,
            ),
            (f"{_SCHEDULER}.on_idle", self._idle, HookType.AROUND),
            (f"{_SCHEDULER}.send_kv_chunk", self._send_kv, HookType.AROUND),
            (f"{_SCHEDULER}.flush_cache", self._flush, HookType.AROUND),
            (f"{_SCHEDULER}.get_internal_state", self._tell_state, HookType.AFTER),
        ]

    def install(self) -> None:
        """Registers the hooks and the prefix cache; SGLang applies them right after."""
        register_radix_cache_backend(CACHE_BACKEND, self._build_cache)
        for target, hook, kind in self._hooks:
            HookRegistry.register(target, hook, kind)

    def _build_cache(self, context: TreeCacheBuildContext) -> BasePrefixCache:
        """The prefix cache of a scheduler; SGLang's own where its radix cache is disabled."""
        missing = [t for t, _, _ in self._hooks if not _is_hooked(t)]
        if missing:
            raise SystemExit(
                f"sglang-stream: hooks did not take effect on {', '.join(missing)}: "
                "see the errors above, or start without stream support"
            )
        if context.is_hybrid_swa or context.is_hybrid_ssm:
            raise SystemExit(
                "sglang-stream: models with sliding-window or state-space layers are not supported"
            )
        if context.disable_radix_cache:
            return default_radix_cache_factory(context)
        return StreamRadixCache(context.params)

    # --- start --------------------------------------------------------------------------------

    @staticmethod
    def _choose_cache(server_args: Any) -> None:
        if server_args.radix_cache_backend is None:
            server_args.radix_cache_backend = CACHE_BACKEND

    @staticmethod
    def _check_args(server_args: Any) -> None:
        check_server_args(server_args, CACHE_BACKEND)

    def _bind(self, _result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
        ps = scheduler.ps
        if ps.pp_rank == 0 and ps.attn_tp_rank == 0 and ps.attn_cp_rank == 0:
            self._metrics = EngineMetrics(self._config.policy)
            self._channel = Channel(self._config, self._metrics)

    def _wake_on_events(self, _result: None, scheduler: Any) -> None:
        if scheduler.idle_sleeper is None:
            return
        self._kv_moved = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        scheduler.idle_sleeper.poller.register(self._kv_moved, zmq.POLLIN)
        if self._channel is not None:
            self._channel.wake(scheduler.idle_sleeper.poller)

    def _wake_on_kv(self, _result: None, *_args: Any, **_kwargs: Any) -> None:
        """Called by the threads that hear how far a transfer is."""
        if self._kv_moved is not None:
            os.eventfd_write(self._kv_moved, 1)

    def _start_engine(self, _result: None, scheduler: Any) -> None:
        cache = scheduler.tree_cache
        holder = cache if isinstance(cache, StreamRadixCache) else NoHolds()
        engine = StreamEngine(scheduler, holder, self._config, self._channel, self._metrics)
        handlers = scheduler._request_dispatcher._mapping
        handlers[StreamEvent] = engine.handle
        handlers[Expire] = engine.expire
        handlers[Tick] = engine.tick
        self.engine = engine

    # --- the scheduler's loop -----------------------------------------------------------------

    def _idle(self, original: Any, scheduler: Any) -> None:
        """With `--sleep-on-idle`: reports the load before the scheduler sleeps, and has it rest
        for a moment also while it only waits for KV on its way, where SGLang's loop would take a
        core from those that compute."""
        sleeper = scheduler.idle_sleeper
        sleeps = sleeper is not None and scheduler.is_fully_idle()
        if sleeps and self.engine is not None:
            self.engine.before_sleep()
        original(scheduler)
        if sleeper is not None and not sleeps:
            sleeper.poller.poll(_REST_MS)
        if self._kv_moved is not None:
            # Only now: what is told from here on ends the next rest at once.
            with suppress(BlockingIOError):
                os.eventfd_read(self._kv_moved)

    def _receive(self, pulled: list[Any] | None, _receiver: Any) -> list[Any] | None:
        if pulled is None or self.engine is None:
            return pulled
        return in_order(pulled, self.engine.receive())

    @staticmethod
    def _refuse_huge_ids(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
        """Makes a fault of the caller, status 400, of what SGLang takes for one of its own."""
        try:
            return original(manager, *args, **kwargs)
        except OverflowError as e:
            raise ValueError(f"a token id is far above the vocabulary: {e}") from e

    def _generate(self, original: Any, scheduler: Any, request: Any) -> None:
        assert self.engine is not None
        self.engine.generate(original, request)

    def _schedule(self, original: Any, _scheduler: Any, running_batch: ScheduleBatch) -> Any:
        assert self.engine is not None
        return self.engine.schedule(original, running_batch)

    @staticmethod
    def _arrange(
        _result: None, _policy: Any, waiting_queue: list[Req], *_args: Any, **_kwargs: Any
    ) -> None:
        Scheduling.arrange(waiting_queue)

    @staticmethod
    def _admit(original: Any, adder: Any, request: Req, *args: Any, **kwargs: Any) -> Any:
        ticket = ticket_of(request)
        if ticket is None:
            return original(adder, request, *args, **kwargs)
        return admit_pass(original, adder, request, ticket, *args, **kwargs)

    def _before_decode(self, batch: ScheduleBatch, *_args: Any, **_kwargs: Any) -> None:
        assert self.engine is not None
        self.engine.scheduling.make_room_to_decode(batch)

    def _finish(
        self, original: Any, streamer: Any, requests: list[Req], *args: Any, **kwargs: Any
    ) -> None:
        assert self.engine is not None
        original(streamer, self.engine.finish(requests), *args, **kwargs)

    def _send_kv(
        self, original: Any, scheduler: Any, request: Req, last_chunk: bool = False, **kwargs: Any
    ) -> None:
        assert self.engine is not None
        start = request.start_send_idx
        original(scheduler, request, last_chunk=last_chunk, **kwargs)
        self.engine.kv_sent(request, request.start_send_idx - start, early=not last_chunk)

    def _flush(self, original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if self.engine is not None and scheduler.is_fully_idle():
            self.engine.flush()
        return original(scheduler, *args, **kwargs)

    def _tell_state(self, output: Any, _scheduler: Any, _request: Any) -> None:
        assert self.engine is not None
        output.internal_state["sglang_stream"] = self.engine.state()


def _is_hooked(target: str) -> bool:
    return hasattr(pkgutil.resolve_name(target), "__wrapped__")
