"""The attempts that make up one generation: retried, continued elsewhere, or given up.

attempt --ends--> done
   | worker lost, or a failure that another worker may not have
   |-- before the first event: the stream is opened anew with its chunks, and sealed again
   `-- after it: a new stream with the whole prompt and the tokens kept (`increments`)

A worker that has failed is not asked again for the same generation if there is another one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from secrets import token_hex
from typing import Any

import msgspec

from router.backoff import RetryBudget, RetryPolicy
from router.cluster import Cluster
from router.events import WorkerEvent
from router.generation import Generation
from router.legs import generate_apart
from router.metrics import RouterMetrics
from router.moves import Moves
from router.streams import Stream, Streams
from router.worker import Worker
from sglang_stream.errors import (
    EngineFailure,
    InvalidRequest,
    LimitReached,
    SequenceConflict,
    SequenceGap,
    StreamError,
    StreamMoved,
    StreamNotFound,
    TooLarge,
    WorkerUnavailable,
)
from sglang_stream.messages import Accepted, Query, SealCall, Usage

logger = logging.getLogger(__name__)

_REFUSALS = (InvalidRequest, LimitReached, TooLarge)


class Attempts:
    """Generates for the streams of one router. `in_background` runs what nobody waits for."""

    def __init__(
        self,
        cluster: Cluster,
        streams: Streams,
        moves: Moves,
        metrics: RouterMetrics,
        retries: RetryPolicy,
        budget: RetryBudget,
        in_background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._cluster = cluster
        self._streams = streams
        self._moves = moves
        self._metrics = metrics
        self._retries = retries
        self._budget = budget
        self._in_background = in_background

    async def events(
        self,
        stream: Stream,
        generation: Generation,
        params: dict[str, Any],
        last_seq: int | None,
        sending: asyncio.Task[Accepted] | None = None,
    ) -> AsyncIterator[WorkerEvent]:
        """The workers' events, over as many attempts as it takes, and what they mean for the
        stream. `sending`: the last chunks, whose answer is still to come."""
        events = self._events(stream, generation, params, last_seq, sending)
        try:
            async with aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    yield event
        finally:
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _events(
        self,
        stream: Stream,
        generation: Generation,
        params: dict[str, Any],
        last_seq: int | None,
        sending: asyncio.Task[Accepted] | None,
    ) -> AsyncIterator[WorkerEvent]:
        now, again = params, False
        failed: set[Worker] = set()
        for attempt in itertools.count():
            try:
                if again and stream.state != "open":
                    now = generation.increments.resume(params, self._cluster.model.prompts.is_whole)
                    await self._moves.reopen(stream, self._whole(stream, generation), failed)
                    seal = SealCall(stream.id)  # the tail has gone with the prompt
                else:
                    if again:
                        await self._moves.again(stream, failed)
                    seal = self._seal(stream, last_seq)
                events = self._attempt(stream, generation, now, seal, failed)
                async with aclosing(events):  # type: ignore[type-var]
                    async for event in events:
                        ended = event.meta_info.finish_reason is not None
                        stream.state = "finished" if ended else "sealed"
                        stream.touch()
                        yield event
                return
            except (WorkerUnavailable, EngineFailure) as e:
                if stream.state == "finished":
                    raise
                if attempt == self._retries.max_retries or not self._may_try_again(e):
                    await self._after_failure(stream)
                    raise
                again = True
                if sending is not None:  # what was sent goes along to wherever the stream goes on
                    sending.cancel()
                    sending = None
                logger.warning("stream %s: %s; trying again", stream.id, e.message)
                await asyncio.sleep(self._retries.delay_s(attempt + 1, random.random))
            except (SequenceGap, SequenceConflict):
                if sending is not None:  # the seal was there before, or they were refused
                    await self._arrived(stream, sending)
                    sending, again = None, False
                    continue
                if last_seq is not None or attempt == self._retries.max_retries:
                    await self._after_failure(stream)
                    raise
                again = False
                await self._moves.sync(stream)
            except (StreamNotFound, StreamMoved):
                last = generation.begun or attempt == self._retries.max_retries
                if last or not await self._is_elsewhere(stream):
                    await self._after_failure(stream)
                    raise
                again = False
            except StreamError as e:
                await self._after_failure(stream)
                if isinstance(e, _REFUSALS) and not generation.begun:
                    await self._unseal(stream)
                raise

    async def _arrived(self, stream: Stream, sending: asyncio.Task[Accepted]) -> None:
        """Returns when the last chunks were accepted. If they are refused they are forgotten, and
        the worker's error is raised."""
        try:
            await asyncio.shield(sending)
        except StreamError:
            stream.forget_chunks()
            with suppress(StreamError):
                await self._moves.refresh(stream)
            await self._after_failure(stream)
            raise

    @staticmethod
    def _seal(stream: Stream, last_seq: int | None) -> SealCall:
        """The seal of just the tokens that are known here, which a decode worker is told of."""
        assert stream.tail is not None
        last_seq = stream.known_seq if last_seq is None else last_seq
        return SealCall(stream.id, last_seq, stream.tail.tolist())

    async def _attempt(
        self,
        stream: Stream,
        generation: Generation,
        params: dict[str, Any],
        seal: SealCall,
        failed: set[Worker],
    ) -> AsyncIterator[WorkerEvent]:
        """One attempt: on the worker that holds the stream, and on a decode worker if that one
        only computes prompts. Who fails joins `failed`."""
        worker = await self._moves.ensure(stream)
        seal = msgspec.structs.replace(seal, epoch=stream.epoch)
        request = {
            "rid": token_hex(16),
            "input_ids": [0],
            "stream": True,
            "sampling_params": {**params, "custom_params": seal.to_custom_params()},
        }
        if worker.role == "unified":
            attempt = worker.generate(request, failed)
        else:
            prompt = self._whole(stream, generation)
            need = len(prompt) + (params["max_new_tokens"] or 1)
            decode = await self._cluster.place_decode(need, failed)
            self._metrics.migrations.inc()
            attempt = generate_apart(
                worker,
                decode,
                stream.id,
                request,
                prompt,
                stream.owner,
                failed,
                self._in_background,
            )
        async with aclosing(attempt) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    @staticmethod
    def _whole(stream: Stream, generation: Generation) -> array[int]:
        """All ids of the prompt, with those of the answer that are kept."""
        context = stream.context()
        if context is None or stream.tail is None:
            raise EngineFailure(f"not all tokens of stream {stream.id} are known here: ask again")
        return context + stream.tail + array("i", generation.increments.kept)

    def _may_try_again(self, error: StreamError) -> bool:
        """Whether another attempt can help and may be made.

        A lost worker's generations always go on elsewhere; a failure of a worker that lives counts
        against the budget, and the only worker is not asked again.
        """
        if isinstance(error, WorkerUnavailable):
            return True
        return not self._cluster.is_single and self._budget.may_retry(time.monotonic())

    async def _is_elsewhere(self, stream: Stream) -> bool:
        """Whether another router has moved the stream, which can then be sealed there."""
        epoch = stream.epoch
        try:
            await self._moves.refresh(stream)
        except StreamError:
            return False
        return stream.state == "open" and stream.epoch > epoch

    async def _after_failure(self, stream: Stream) -> None:
        """Asks the worker what a failed generation left: a refused seal leaves the stream open."""
        if stream.worker is None:
            if stream.state == "open":
                stream.generation = None
            return
        try:
            status = await stream.worker.status(Query(stream.id, stream.owner))
        except StreamNotFound:
            self._streams.forget(stream)
            return
        except WorkerUnavailable:
            # Not known; the worker will tell when it is asked to seal again.
            if stream.state == "open":
                stream.generation = None
            return
        stream.state = status.state
        if status.state == "open":
            stream.generation = None

    async def _unseal(self, stream: Stream) -> None:
        """Leaves a stream open whose request a decode worker has refused: its prefill worker has
        sealed it by then."""
        worker = stream.worker
        if worker is None or worker.role != "prefill" or stream.state not in ("sealed", "finished"):
            return
        try:
            await self._moves.again(stream)
        except StreamError as e:
            logger.warning("stream %s could not be left open: %s", stream.id, e.message)
        else:
            stream.generation = None

    async def first_token(self, stream: Stream, ttft_s: float) -> Usage | None:
        """Notes the time of the first token; the stream's counters, None if they are not told."""
        self._metrics.ttft.observe(ttft_s)
        if stream.worker is None:
            return None
        try:
            stream.usage = (await stream.worker.status(Query(stream.id, stream.owner))).usage
        except StreamError as e:
            logger.warning("no counters for stream %s: %s", stream.id, e.message)
            return None
        return stream.usage
