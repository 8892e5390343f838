"""What the router does for each stream call, without HTTP.

    open --append|update--> ... --generate--> a Generation, read by `router.answers`

The worker decides whether an event is legal; the router puts prompts together, keeps the calls of
a stream in order, knows who generates, and sees to it that no stream is lost with its worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx

from router.attempts import Attempts
from router.auth import Caller
from router.backoff import RetryBudget, RetryPolicy
from router.chunks import Chunks
from router.cluster import Cluster
from router.draining import Draining
from router.generation import Generation
from router.identity import StreamIds
from router.increments import Increments
from router.legs import end_answer
from router.logs import log_context
from router.metrics import RouterMetrics
from router.moves import Moves
from router.sampling import sampling_params
from router.schemas import GenerateBody, OpenBody
from router.streams import Stream, Streams, sealed, unknown
from router.worker import Worker
from sglang_stream.config import RouterConfig
from sglang_stream.errors import (
    ContextLengthExceeded,
    GenerationStarted,
    LimitReached,
    Malformed,
    ModelNotFound,
    StreamError,
    StreamNotFound,
    StreamSealed,
    WorkerUnavailable,
)
from sglang_stream.messages import Abort, Accepted, Open, Query, Status, pack_tokens

logger = logging.getLogger(__name__)

_SWEEP_S = 1.0
_GLANCE_S = 1.0
_TRIES = 4


class StreamService:
    """The streams of one router. `run` must be running for calls to succeed.

    `caller` of each method says whose streams may be seen.
    """

    def __init__(
        self, config: RouterConfig, http: httpx.AsyncClient, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._background: set[asyncio.Task[Any]] = set()
        self._ids = StreamIds(config.secret)
        self.streams = Streams(config.max_open_streams, int(config.stream_buffer_gb * 2**30))
        self.cluster = Cluster(config, http, metrics, self._worker_ready, self._worker_lost)
        self.retries = RetryPolicy(
            config.retry_max_retries,
            config.retry_initial_backoff_ms,
            config.retry_max_backoff_ms,
            config.retry_backoff_multiplier,
            config.retry_jitter_factor,
        )
        self.budget = RetryBudget()
        self._moves = Moves(self.cluster, self.streams, self._ids, metrics, self._in_background)
        self._attempts = Attempts(
            self.cluster,
            self.streams,
            self._moves,
            metrics,
            self.retries,
            self.budget,
            self._in_background,
        )
        self.chunks = Chunks(self.cluster, self.streams, self._moves, metrics, self._in_background)
        self.draining = Draining(self.cluster, self.streams, self._moves, self._in_background)
        metrics.watch(self.streams.open_count, self.cluster.states)

    async def run(self) -> None:
        """Watches the workers and drops idle streams, for ever."""
        watching = asyncio.create_task(self.cluster.run())
        try:
            while True:
                await asyncio.sleep(_SWEEP_S)
                for stream in self.streams.idle(time.monotonic()):
                    # The worker has a clock of its own, which the calls through another router
                    # keep going.
                    self.streams.forget(stream)
        finally:
            for task in (watching, *self._background):
                task.cancel()
            await asyncio.gather(watching, *self._background, return_exceptions=True)

    # --- open ---------------------------------------------------------------------------------

    async def open(self, body: OpenBody, caller: Caller) -> Stream:
        """Opens a stream. Raises ModelNotFound, Malformed, LimitReached and the worker's errors."""
        model = self.cluster.model
        if body.model not in (None, model.name):
            raise ModelNotFound(
                f"The model '{body.model}' does not exist: this server has '{model.name}'",
                param="model",
            )
        idle_timeout_s = self._idle_timeout_s(body.idle_timeout_s)
        self.streams.check_room()
        opening = await model.prompts.opening(body)
        for attempt in range(_TRIES):
            worker = self.cluster.place_stream(opening.tokens, caller.namespace)
            stream = Stream(
                id=self._ids.new(worker.url),
                mode=body.mode,
                model=model.name,
                opening=opening,
                order=body.order or "relevance",
                idle_timeout_s=idle_timeout_s,
                worker=worker,
                owner=caller.owner,
                namespace=caller.namespace,
            )
            self.streams.check_room()
            self.streams.add(stream)
            try:
                with log_context(stream_id=stream.id):
                    return await self._open_at(worker, stream)
            except WorkerUnavailable:
                self._drop(stream)  # the worker may have it although no answer came
                if worker.ready or attempt == _TRIES - 1:
                    raise
            except LimitReached:
                self.streams.forget(stream)
                if len(self.cluster.holders()) <= attempt + 1:
                    raise
            except StreamError:
                self.streams.forget(stream)
                raise
        raise AssertionError("the last try returns or raises")

    @staticmethod
    async def _open_at(worker: Worker, stream: Stream) -> Stream:
        answer = await worker.ask(
            Open(
                stream.id,
                stream.mode,
                pack_tokens(stream.opening.tokens),
                stream.idle_timeout_s,
                stream.epoch,
                stream.owner,
                stream.namespace,
                stream.memo(),
            )
        )
        stream.tokens = answer.tokens
        stream.touch()
        return stream

    # --- generate -----------------------------------------------------------------------------

    async def generate(
        self, stream_id: str, body: GenerateBody, caller: Caller, arrived_s: float
    ) -> tuple[Stream, Generation]:
        """Seals the stream and starts its generation, or finds the one that `request_id` started.

        Raises StreamNotFound, StreamSealed, GenerationStarted, Malformed, ContextLengthExceeded;
        the worker's refusal reaches the generation's readers and leaves the stream open.
        """
        stream = await self._moves.find(stream_id, caller)
        model = self.cluster.model
        async with stream.sending:
            tail = await model.prompts.tail(stream.opening, body)
            if stream.generation is not None:
                return stream, _joined(stream.generation, body.request_id, stream)
            if stream.state != "open":
                raise sealed(stream)
            worker = await self._moves.ensure(stream)
            sending = await self._last(stream, body, len(tail))
            if stream.context() is None or body.sealed_at not in (None, stream.known_seq):
                # Other routers have sent the rest. Without a number the seal tells (`Attempts`).
                await self._moves.sync(stream)
            self._check_room(stream.tokens + len(tail), body.limit)
            incremental = worker.info.incremental
            generation = Generation(
                body.request_id,
                arrived_s,
                Increments(incremental, bool(body.return_token_ids)),
                self._config.resume_grace_s,
                self._config.request_timeout_secs,
                on_first_token=lambda ttft_s: self._attempts.first_token(stream, ttft_s),
                on_abandoned=lambda: self._abandoned(stream, generation),
            )
            stream.generation, stream.tail = generation, tail
        self.budget.request(time.monotonic())
        params = sampling_params(body, model.prompts.defaults(stream.opening))
        generation.start(self._attempts.events(stream, generation, params, body.sealed_at, sending))
        return stream, generation

    async def _last(
        self, stream: Stream, body: GenerateBody, tail: int
    ) -> asyncio.Task[Accepted] | None:
        """Sends the chunks that came with the call. Where they surely are the next ones the seal
        follows at once, and the worker's answer is returned, still to come.

        Raises as `Chunks.append`, and ContextLengthExceeded before anything is sent.
        """
        if body.last is None:
            return None
        call = await self.chunks.prepare(stream, body.last.call(stream.mode))
        tokens = stream.tokens_with(call.seq, call.ids)
        if tokens is None:
            await self._moves.sync(stream)
            tokens = stream.tokens_with(call.seq, call.ids)
        if tokens is None or call.kind != stream.mode or tokens > self.cluster.model.context_len:
            await self.chunks.take(stream, call)
            return None
        self._check_room(tokens + tail, body.limit)
        sending = self.chunks.send(stream, replace(call, last=True))
        stream.accepted(call.seq, call.ids, Accepted(call.seq, tokens), call.placement)
        return sending

    def _check_room(self, tokens: int, limit: int | None) -> None:
        """Raises ContextLengthExceeded if no answer of `limit` tokens fits after the prompt."""
        context_len = self.cluster.model.context_len
        room = context_len - tokens
        if room < (limit or 1):
            raise ContextLengthExceeded(
                f"the prompt has {tokens} tokens and {limit or 1} are to be generated, together "
                f"over the model's {context_len}: at most {max(room, 0)} can be generated after "
                "this prompt",
                param="max_tokens",
            )

    def _abandoned(self, stream: Stream, generation: Generation) -> None:
        """Nobody reads the generation any more."""
        if stream.generation is not generation:
            return  # its seal was refused and the stream went on without it
        stream.forget_chunks()
        if generation.ended:
            generation.stop(unknown(stream.id))
        else:
            self._abort(stream)

    # --- look, delete -------------------------------------------------------------------------

    async def refresh(self, stream_id: str, caller: Caller) -> Stream:
        """The stream, as the worker sees it now. Raises StreamNotFound, WorkerUnavailable."""
        stream = _present(await self._moves.find(stream_id, caller))
        if stream.is_lost and (stream.generation is not None or stream.state == "finished"):
            return stream  # on its way to another worker, or done: not to be opened again
        worker = await self._moves.ensure(stream)
        try:
            status = await worker.status(Query(stream_id, stream.owner))
        except StreamNotFound:
            if stream.state == "finished":
                return stream
            try:
                await self._moves.refresh(stream)
            except StreamNotFound:
                self.streams.forget(stream)
                raise
            return await self.refresh(stream_id, caller)
        _present(stream)  # its client may have left while the worker was asked
        if stream.epoch == 0 or stream.generation is None:
            stream.seq, stream.tokens = status.seq, status.tokens
        _take_counters(stream, status)
        if stream.generation is None or stream.generation.ended or status.state == "sealed":
            stream.state = status.state  # a prefill worker has finished before the answer has
        stream.touch()
        return stream

    async def open_of(self, caller: Caller) -> list[Stream]:
        """The caller's open streams as their workers see them now, or as they were last known
        where a worker does not answer soon."""
        streams = list(self.streams.open_of(caller))

        async def look(stream: Stream) -> None:
            if stream.worker is not None:
                with suppress(StreamError, asyncio.TimeoutError):
                    asked = stream.worker.status(Query(stream.id, stream.owner))
                    _take_counters(stream, await asyncio.wait_for(asked, _GLANCE_S))

        await asyncio.gather(*(look(stream) for stream in streams))
        return [stream for stream in streams if stream.state == "open"]

    async def delete(self, stream_id: str, caller: Caller) -> None:
        """Aborts the stream or its generation, whichever router asked for it. Raises
        StreamNotFound, WorkerUnavailable."""
        missing: StreamNotFound | None = None
        try:
            await self._delete(await self._moves.find(stream_id, caller))
        except StreamNotFound as e:
            missing = e
        # Its prefill worker may be done with it while a decode worker still answers.
        owner = None if caller.admin else caller.owner
        if not await end_answer(self.cluster.decoders(), stream_id, owner) and missing is not None:
            raise missing

    async def _delete(self, stream: Stream) -> None:
        was_sealed = stream.state != "open"
        if stream.state == "aborted":
            self.streams.end(stream)
            raise unknown(stream.id)
        if stream.generation is not None:
            stream.generation.stop(StreamNotFound(f"stream {stream.id} was deleted"))
        try:
            if stream.state != "finished":
                await self._moves.abort(stream)
        except StreamSealed:
            pass  # its generation has ended there, perhaps because its connection was closed here
        except StreamNotFound:
            if not was_sealed:
                self.streams.end(stream)
                raise
        self.streams.end(stream)

    # --- workers ------------------------------------------------------------------------------

    def _worker_lost(self, worker: Worker) -> None:
        """Lets go of a worker; what it held is replayed at once rather than at its next call."""
        for stream in self.streams.held_by(worker):
            self._moves.left(stream, worker)
            stream.worker = None
            self._move_soon(stream)

    def _move_soon(self, stream: Stream) -> None:
        if stream.state == "open" and stream.generation is None:
            self._in_background(self._move(stream))

    async def _move(self, stream: Stream) -> None:
        with log_context(stream_id=stream.id):
            try:
                await self._moves.ensure(stream)
            except StreamError as e:
                logger.warning("stream %s could not be moved yet: %s", stream.id, e.message)

    def _worker_ready(self, worker: Worker) -> None:
        self._in_background(self._moves.clear_left(worker))
        for stream in self.streams.held_by(None):
            self._move_soon(stream)  # no worker was there for it before

    # --- helpers ------------------------------------------------------------------------------

    def _idle_timeout_s(self, wanted: float | None) -> float:
        longest = self._config.max_idle_timeout_s
        if wanted is not None and wanted > longest:
            raise Malformed(f"idle_timeout_s is at most {longest:g}", param="idle_timeout_s")
        return wanted or min(self._config.idle_timeout_s, longest)

    def _abort(self, stream: Stream) -> None:
        """Ends a generation here and in the worker; the record stays, for its 409 answers."""
        stream.state = "aborted"
        if stream.generation is not None:
            stream.generation.stop(unknown(stream.id))
        self._in_background(self._abort_in_worker(stream))

    def _drop(self, stream: Stream) -> None:
        """Forgets a stream that may or may not have opened."""
        self.streams.forget(stream)
        if stream.state == "open":
            self._in_background(self._abort_in_worker(stream))

    async def _abort_in_worker(self, stream: Stream) -> None:
        if stream.worker is None:
            return
        with suppress(StreamError):  # what is missed expires
            await stream.worker.ask(Abort(stream.id, stream.epoch, stream.owner))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _take_counters(stream: Stream, status: Status) -> None:
    stream.usage = status.usage
    stream.held, stream.saved, stream.priority = status.held, status.saved, status.place


def _present(stream: Stream) -> Stream:
    """The stream. Raises StreamNotFound if its generation was given up."""
    if stream.state == "aborted":
        raise unknown(stream.id)
    return stream


def _joined(generation: Generation, request_id: str | None, stream: Stream) -> Generation:
    """The running generation for a repeated call. Raises what forbids to join it."""
    if request_id is None or request_id != generation.request_id:
        raise sealed(stream)
    if generation.delivered:
        raise GenerationStarted(
            "this generation has already sent tokens to a client: open a new stream"
        )
    if generation.error is not None:
        raise generation.error
    return generation
