"""What the router does for each stream call, without HTTP.

    open --append|update--> ... --generate--> a Generation, read by `router.answers`

The worker decides whether an event is legal; the router puts prompts together, keeps the calls of
a stream in order, and knows who generates.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, suppress
from typing import Any

import httpx

from router.generation import Generation, Increments
from router.metrics import RouterMetrics
from router.prompts import PromptBuilder
from router.sampling import sampling_params
from router.schemas import ChunksBody, ContextBody, GenerateBody, OpenBody
from router.streams import Placement, Stream, Streams, unknown
from router.tokenizer import load_model_texts
from router.worker import Worker, WorkerEvent, WorkerInfo
from sglang_stream.config import RouterConfig
from sglang_stream.errors import (
    ContextLengthExceeded,
    GenerationStarted,
    Malformed,
    ModelNotFound,
    StreamError,
    StreamNotFound,
    StreamSealed,
    WorkerUnavailable,
)
from sglang_stream.messages import (
    Abort,
    Accepted,
    Append,
    Open,
    SealCall,
    Update,
    Usage,
    digest,
    pack_tokens,
)

logger = logging.getLogger(__name__)

_SWEEP_S = 1.0


class StreamService:
    """The streams of one router with one worker. `run` must be running for calls to succeed."""

    def __init__(
        self, config: RouterConfig, http: httpx.AsyncClient, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._prompts: PromptBuilder | None = None
        self._background: set[asyncio.Task[Any]] = set()
        self.streams = Streams(config.max_open_streams)
        self.worker = Worker(config.worker_url, http, self._adopt)
        metrics.watch_open_streams(self.streams.open_count)

    async def run(self) -> None:
        """Watches the worker and drops idle streams, for ever."""
        watching = asyncio.create_task(self.worker.run())
        try:
            while True:
                await asyncio.sleep(_SWEEP_S)
                for stream in self.streams.idle(time.monotonic()):
                    self._drop(stream)
        finally:
            for task in (watching, *self._background):
                task.cancel()
            await asyncio.gather(watching, *self._background, return_exceptions=True)

    # --- open, append, update -----------------------------------------------------------------

    async def open(self, body: OpenBody) -> Stream:
        """Opens a stream. Raises ModelNotFound, Malformed, LimitReached and the worker's errors."""
        info, prompts = self._ready()
        if body.model not in (None, info.model):
            raise ModelNotFound(
                f"The model '{body.model}' does not exist: this worker serves '{info.model}'",
                param="model",
            )
        idle_timeout_s = self._idle_timeout_s(body.idle_timeout_s)
        stream = Stream(
            mode=body.mode,
            model=info.model,
            worker_id=info.worker_id,
            opening=await prompts.opening(body),
            order=body.order or "relevance",
            idle_timeout_s=idle_timeout_s,
        )
        self.streams.add(stream)
        tokens = pack_tokens(stream.opening.tokens)
        try:
            answer = await self.worker.ask(Open(stream.id, stream.mode, tokens, idle_timeout_s))
        except WorkerUnavailable:
            self._drop(stream)  # the worker may have it although no answer came
            raise
        except StreamError:
            self.streams.forget(stream)
            raise
        stream.tokens = answer.tokens
        stream.touch()
        return stream

    async def append(self, stream_id: str, body: ChunksBody) -> Accepted:
        """Adds chunks. Raises StreamNotFound, Malformed, BodyTooLarge and the worker's errors."""
        stream = self.streams.get(stream_id)
        _, prompts = self._ready()
        async with stream.sending:
            ids = await prompts.chunks(body)
            packed = pack_tokens(ids)
            event = Append(stream.id, body.seq, packed, digest(packed))
            # Sent in this order; the answers need not be waited for one by one.
            asking = asyncio.create_task(self._tell(stream, event))
        answer = await asking
        stream.accepted(body.seq, ids, answer)
        self._metrics.chunks.inc()
        return answer

    async def update(self, stream_id: str, body: ContextBody) -> Accepted:
        """Replaces the context; raises as `append` does."""
        stream = self.streams.get(stream_id)
        _, prompts = self._ready()
        async with stream.sending:
            placement: Placement | None = None
            if body.documents is None:
                ids = prompts.context(body.input_ids or [])
            else:
                placement = stream.place(body.seq, body.documents)
                ids = await prompts.documents(placement.texts)
            packed = pack_tokens(ids)
            event = Update(stream.id, body.seq, packed, digest(packed))
            answer = await self._tell(stream, event)
            stream.accepted(body.seq, ids, answer, placement)
        self._metrics.chunks.inc()
        return answer

    # --- generate -----------------------------------------------------------------------------

    async def generate(
        self, stream_id: str, body: GenerateBody, arrived_s: float
    ) -> tuple[Stream, Generation, array[int]]:
        """Seals the stream and starts its generation, or finds the one that `request_id` started.

        Returns the ids after the context, too. Raises StreamNotFound, StreamSealed,
        GenerationStarted, Malformed, ContextLengthExceeded; the worker's refusal reaches the
        generation's readers and leaves the stream open.
        """
        stream = self.streams.get(stream_id)
        info, prompts = self._ready()
        async with stream.sending:
            tail = await prompts.tail(stream.opening, body)
            if stream.generation is not None:
                return stream, _joined(stream.generation, body.request_id, stream), tail
            if stream.state != "open":
                raise _sealed(stream)
            room = info.context_len - stream.tokens - len(tail)
            if room < (body.limit or 1):
                raise ContextLengthExceeded(
                    f"the prompt has {stream.tokens + len(tail)} tokens and {body.limit or 1} are "
                    f"to be generated, together over the model's {info.context_len}: at most "
                    f"{max(room, 0)} can be generated after this prompt",
                    param="max_tokens",
                )
            generation = Generation(
                body.request_id,
                arrived_s,
                Increments(info.incremental, bool(body.return_token_ids)),
                self._config.resume_grace_s,
                on_first_token=lambda ttft_s: self._first_token(stream, ttft_s),
                on_abandoned=lambda: self._abandoned(stream, generation),
            )
            stream.generation = generation
        params = sampling_params(body, prompts.defaults(stream.opening))
        seal = SealCall(stream.id, body.last_seq, tail.tolist())
        params["custom_params"] = seal.to_custom_params()
        request = {
            "rid": uuid.uuid4().hex,
            "input_ids": [0],
            "stream": True,
            "sampling_params": params,
        }
        generation.start(self._events(stream, request))
        return stream, generation, tail

    async def _events(self, stream: Stream, request: dict[str, Any]) -> AsyncIterator[WorkerEvent]:
        """The worker's events, with what they mean for the stream."""
        try:
            async with aclosing(self.worker.generate(request)) as events:  # type: ignore[type-var]
                async for event in events:
                    ended = event.meta_info.finish_reason is not None
                    stream.state = "finished" if ended else "sealed"
                    stream.touch()
                    yield event
        except StreamError:
            if stream.state != "finished":
                await self._after_failure(stream)
            raise

    async def _after_failure(self, stream: Stream) -> None:
        """Asks the worker what a failed generation left: a refused seal leaves the stream open."""
        try:
            status = await self.worker.status(stream.id)
        except StreamNotFound:
            self.streams.forget(stream)
            return
        except WorkerUnavailable:
            # Not known; the worker will tell when it is asked to seal again.
            if stream.state == "open":
                stream.generation = None
            return
        stream.state = status.state
        if status.state == "open":
            stream.generation = None

    async def _first_token(self, stream: Stream, ttft_s: float) -> Usage | None:
        self._metrics.ttft.observe(ttft_s)
        try:
            stream.usage = (await self.worker.status(stream.id)).usage
        except StreamError as e:
            logger.warning("no counters for stream %s: %s", stream.id, e.message)
            return None
        return stream.usage

    def _abandoned(self, stream: Stream, generation: Generation) -> None:
        """Nobody reads the generation any more."""
        if stream.generation is not generation:
            return  # its seal was refused and the stream went on without it
        stream.chunks.clear()
        if generation.ended:
            generation.stop(unknown(stream.id))
        else:
            self._abort(stream)

    # --- look, delete -------------------------------------------------------------------------

    async def refresh(self, stream_id: str) -> Stream:
        """The stream, as the worker sees it now. Raises StreamNotFound, WorkerUnavailable."""
        stream = self._present(stream_id)
        try:
            status = await self.worker.status(stream_id)
        except StreamNotFound:
            if stream.state == "finished":
                return stream
            self.streams.forget(stream)
            raise
        self._present(stream_id)  # its client may have left while the worker was asked
        stream.state, stream.usage = status.state, status.usage
        stream.seq, stream.tokens = status.seq, status.tokens
        stream.touch()
        return stream

    async def delete(self, stream_id: str) -> None:
        """Aborts the stream or its generation. Raises StreamNotFound, WorkerUnavailable."""
        stream = self.streams.get(stream_id)
        was_sealed = stream.state != "open"
        if stream.state == "aborted":
            self.streams.forget(stream)
            raise unknown(stream_id)
        if stream.generation is not None:
            stream.generation.stop(StreamNotFound(f"stream {stream_id} was deleted"))
        try:
            if stream.state != "finished":
                await self.worker.ask(Abort(stream_id))
        except StreamSealed:
            pass  # its generation has ended there, perhaps because its connection was closed here
        except StreamNotFound:
            if not was_sealed:
                self.streams.forget(stream)
                raise
        self.streams.forget(stream)

    # --- helpers ------------------------------------------------------------------------------

    async def _adopt(self, info: WorkerInfo) -> None:
        """Takes a worker that was found; streams of one before it are gone."""
        model = await asyncio.to_thread(load_model_texts, info.server)
        self._prompts = PromptBuilder(model, info.vocab_size, self._config.max_chunk_bytes)
        for stream in self.streams.of_other_workers(info.worker_id):
            self.streams.forget(stream)
            if stream.generation is not None:
                stream.generation.stop(unknown(stream.id))

    def _present(self, stream_id: str) -> Stream:
        """The stream. Raises StreamNotFound, also if its generation was given up."""
        stream = self.streams.get(stream_id)
        if stream.state == "aborted":
            raise unknown(stream_id)
        return stream

    def _ready(self) -> tuple[WorkerInfo, PromptBuilder]:
        info = self.worker.info
        assert self._prompts is not None
        return info, self._prompts

    async def _tell(self, stream: Stream, event: Append | Update) -> Accepted:
        try:
            return await self.worker.ask(event)
        except StreamNotFound:
            if stream.state in ("sealed", "finished"):
                raise _sealed(stream) from None
            self.streams.forget(stream)
            raise

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
        """Forgets a stream whose time is up, or that may or may not have opened."""
        self.streams.forget(stream)
        if stream.state == "open":
            self._in_background(self._abort_in_worker(stream))

    async def _abort_in_worker(self, stream: Stream) -> None:
        with suppress(StreamError):  # what is missed expires
            await self.worker.ask(Abort(stream.id))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _joined(generation: Generation, request_id: str | None, stream: Stream) -> Generation:
    """The running generation for a repeated call. Raises what forbids to join it."""
    if request_id is None or request_id != generation.request_id:
        raise _sealed(stream)
    if generation.delivered:
        raise GenerationStarted(
            "this generation has already sent tokens to a client: open a new stream"
        )
    if generation.error is not None:
        raise generation.error
    return generation


def _sealed(stream: Stream) -> StreamError:
    if stream.state == "aborted":
        return unknown(stream.id)
    return StreamSealed(f"stream {stream.id} is sealed: open a new one for more context")
