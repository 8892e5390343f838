"""The workers of a router: which there are, which are ready, and which one takes what."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import time
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import httpx

from router.breaker import BreakerSettings
from router.description import WorkerInfo
from router.identity import worker_tag
from router.metrics import RouterMetrics
from router.placement import WorkerView, choose_decode, choose_prefill
from router.prompts import PromptBuilder
from router.tokenizer import load_model_texts
from router.worker import Worker
from sglang_stream.config import RouterConfig, WorkerAddress
from sglang_stream.errors import InvalidRequest, StreamNotFound, WorkerUnavailable
from sglang_stream.messages import Role, pack_tokens, prefix_blocks

logger = logging.getLogger(__name__)

_POLL_S = 0.05


@dataclass(frozen=True)
class Model:
    """The model that all workers serve. `context_len`: prompt and answer together, in tokens."""

    name: str
    context_len: int
    prompts: PromptBuilder


class Cluster:
    """The workers by URL. `run` must be running; `on_ready` hears of each that becomes ready,
    `on_lost` of each that stops being it."""

    def __init__(
        self,
        config: RouterConfig,
        http: httpx.AsyncClient,
        metrics: RouterMetrics,
        on_ready: Callable[[Worker], None],
        on_lost: Callable[[Worker], None],
    ) -> None:
        self._config = config
        self._http = http
        self._metrics = metrics
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._started_s = time.monotonic()
        self._model: Model | None = None
        self._model_of: dict[str, Any] = {}
        self._loading = asyncio.Lock()
        self._turns = {"prefill": 0, "decode": 0}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.workers: dict[str, Worker] = {}
        for address in config.workers:
            self._create(address)

    async def run(self) -> None:
        """Watches all workers, for ever."""
        for worker in self.workers.values():
            self._watch(worker)
        try:
            await asyncio.Event().wait()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def add(self, address: WorkerAddress) -> Worker:
        """Takes another worker, which is used once it is ready, or takes back one that is draining.
        Raises InvalidRequest."""
        known = self.workers.get(address.url.rstrip("/"))
        if known is not None and known.draining:
            known.draining = False
            return known
        if known is not None:
            raise InvalidRequest(f"there is a worker at {address.url} already", param="url")
        worker = self._create(address)
        self._watch(worker)
        return worker

    def named(self, worker_id: str) -> Worker:
        """The worker of that id. Raises StreamNotFound."""
        worker = next((w for w in self.workers.values() if worker_tag(w.url) == worker_id), None)
        if worker is None:
            raise StreamNotFound(f"there is no worker {worker_id}: GET /workers lists them")
        return worker

    async def remove(self, worker: Worker) -> None:
        """Lets go of a worker at once; what it holds is moved."""
        del self.workers[worker.url]
        task = self._tasks.pop(worker.url)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def ready(self, *roles: Role, besides: Collection[Worker] = ()) -> list[Worker]:
        """The workers of these roles that can be given work now; those in `besides` only if there
        is no other."""
        workers = self.workers.values()
        found = [w for w in workers if w.usable and not w.draining and w.role in roles]
        return [w for w in found if w not in besides] or found

    def keeps(self, worker: Worker, failed: Collection[Worker] = ()) -> bool:
        """Whether streams stay on a worker that holds them: it is neither draining nor among the
        `failed`, or there is no better one."""
        if not worker.draining and worker not in failed:
            return True
        others = self.ready("unified", "prefill", besides=failed)
        return not any(w not in failed for w in others)

    def states(self) -> list[tuple[str, str]]:
        """Role and state of each worker."""
        return [
            (w.role, "lost" if not w.ready else "draining" if w.draining else "ready")
            for w in self.workers.values()
        ]

    @property
    def is_single(self) -> bool:
        """Whether there is no other worker to try a failed call on."""
        return len(self.workers) <= 1

    def holders(self) -> list[Worker]:
        """The workers that may hold open streams."""
        return [w for w in self.workers.values() if w.ready and w.role != "decode"]

    def decoders(self) -> list[Worker]:
        """The workers that may give the answers of streams whose prompt another one computed."""
        return [w for w in self.workers.values() if w.ready and w.role == "decode"]

    def check_all_asked(self) -> None:
        """Raises WorkerUnavailable while a worker may still be reached for the first time: what
        is not known yet may be there."""
        started_ago_s = time.monotonic() - self._started_s
        for worker in self.workers.values():
            if not worker.reached and started_ago_s < self._config.worker_wait_s:
                raise WorkerUnavailable(worker.reason, retry_after=1)

    def check_ready(self) -> None:
        """Raises WorkerUnavailable unless a stream could be opened and generated now."""
        holders = self.ready("unified", "prefill")
        if not holders:
            raise WorkerUnavailable(self._reasons() or "there are no workers", retry_after=1)
        if all(w.role == "prefill" for w in holders) and not self.ready("decode"):
            raise WorkerUnavailable(self._reasons() or "there is no decode worker", retry_after=1)

    def _reasons(self) -> str:
        """Why workers are not given work."""
        workers = self.workers.values()
        return "; ".join(w.reason for w in workers if not w.ready or w.draining)

    @property
    def model(self) -> Model:
        """What is served. Raises WorkerUnavailable before the first worker was found."""
        if self._model is None:
            self.check_ready()
            raise WorkerUnavailable("no worker has been ready yet", retry_after=1)
        return self._model

    # --- placement ----------------------------------------------------------------------------

    def place_stream(
        self, tokens: array[int], namespace: str | None, failed: Collection[Worker] = ()
    ) -> Worker:
        """The worker for a new stream that begins with `tokens`, none of the `failed` if there is
        another. Raises WorkerUnavailable."""
        self.check_ready()
        candidates = self.ready("unified", "prefill", besides=failed)
        blocks = prefix_blocks(pack_tokens(tokens), namespace)
        views = [_view(w, w.load.shared_tokens(blocks)) for w in candidates]
        turn = self._turn("prefill")
        choice = choose_prefill(self._config.placement, views, len(tokens), turn)
        return self._placed(candidates, choice.name, "prefill", choice.reason)

    async def place_decode(self, need: int, failed: Collection[Worker] = ()) -> Worker:
        """The worker that is to decode `need` tokens of KV, waited for if none is ready now; none
        of the `failed` if there is another.

        Raises WorkerUnavailable.
        """
        candidates = await self._some_ready("decode", besides=failed)
        views = [_view(w, 0) for w in candidates]
        choice = choose_decode(self._config.placement, views, need, self._turn("decode"))
        return self._placed(candidates, choice.name, "decode", choice.reason)

    async def place_request(self, failed: Collection[Worker]) -> tuple[Worker, Worker | None]:
        """For an ordinary call: who answers it, and who computes its prompt if that is another
        worker; none of the `failed` if there are others. Raises WorkerUnavailable."""
        holder = self.place_stream(array("i"), None, failed)
        if holder.role == "unified":
            return holder, None
        return await self.place_decode(1, failed), holder

    async def place_replay(self, stream_id: str, epoch: int, failed: Collection[Worker]) -> Worker:
        """The worker to which a stream moves, waited for if none is ready now; none of the
        `failed` if there is another.

        All routers that see the same workers choose the same one (rendezvous hashing), so two of
        them that replay a stream at the same time do not make two streams of it. Raises
        WorkerUnavailable.
        """
        candidates = await self._some_ready("unified", "prefill", besides=failed)

        def score(worker: Worker) -> bytes:
            return hashlib.blake2b(f"{stream_id} {epoch} {worker.url}".encode()).digest()

        return self._placed(candidates, max(candidates, key=score).url, "prefill", "replay")

    async def _some_ready(self, *roles: Role, besides: Collection[Worker]) -> list[Worker]:
        deadline = asyncio.get_running_loop().time() + self._config.worker_wait_s
        while not (found := self.ready(*roles, besides=besides)):
            if asyncio.get_running_loop().time() > deadline:
                reasons = self._reasons() or f"there is no {' or '.join(roles)} worker"
                raise WorkerUnavailable(reasons, retry_after=1)
            await asyncio.sleep(_POLL_S)
        return found

    def _turn(self, role: str) -> int:
        self._turns[role] += 1
        return self._turns[role]

    def _placed(self, candidates: list[Worker], url: str, role: str, reason: str) -> Worker:
        worker = next(w for w in candidates if w.url == url)
        worker.placed += 1
        self._metrics.placements.labels(role, reason).inc()
        return worker

    # --- finding ------------------------------------------------------------------------------

    def _create(self, address: WorkerAddress) -> Worker:
        worker = Worker(
            address.url,
            self._http,
            self._accept,
            self._on_ready,
            self._on_lost,
            role=address.role,
            bootstrap_port=address.bootstrap_port,
            secret=self._config.secret,
            breaker=BreakerSettings(
                self._config.cb_failure_threshold,
                self._config.cb_success_threshold,
                self._config.cb_timeout_duration_secs,
                self._config.cb_window_duration_secs,
            ),
        )
        self.workers[worker.url] = worker
        return worker

    def _watch(self, worker: Worker) -> None:
        self._tasks[worker.url] = asyncio.create_task(worker.run())

    async def _accept(self, worker: Worker, info: WorkerInfo) -> None:
        """Takes a worker that answers. Raises WorkerUnavailable if it does not fit the others."""
        async with self._loading:
            others = [w for w in self.workers.values() if w.ready and w is not worker]
            wanted = {"model": info.model, "vocab_size": info.vocab_size}
            if self._model is None or (self._model_of != wanted and not others):
                texts = await asyncio.to_thread(load_model_texts, info.server)
                prompts = PromptBuilder(texts, info.vocab_size, self._config.max_chunk_bytes)
                # What was loaded by now stays: the collector need not walk it again and again.
                gc.collect()
                gc.freeze()
                self._model = Model(info.model, info.context_len, prompts)
                self._model_of = wanted
            elif self._model_of != wanted:
                raise WorkerUnavailable(
                    f"the worker at {worker.url} serves {info.model}, the others "
                    f"{self._model.name}: one router serves one model"
                )


def described(worker: Worker) -> dict[str, Any]:
    """A worker in the answer to GET /workers."""
    load = worker.load.latest
    fields: dict[str, Any] = {
        "id": worker_tag(worker.url),
        "url": worker.url,
        "role": worker.role,
        "healthy": worker.ready,
        "draining": worker.draining,
        "circuit": worker.breaker.state(time.monotonic()),
    }
    if not worker.ready:
        return fields | {"reason": worker.reason}
    return fields | {
        "model": worker.info.model,
        "pid": worker.info.pid,
        "load": {
            "running": load.running,
            "queued": load.queued,
            "open_streams": load.open_streams,
            "todo_tokens": load.todo_tokens,
            "free_tokens": load.free_tokens,
            "held_tokens": load.held_tokens,
            "kv_tokens": worker.info.kv_tokens,
            "tokens_per_s": round(load.tokens_per_s),
        },
    }


def _view(worker: Worker, shared_tokens: int) -> WorkerView:
    load = worker.load.latest
    return WorkerView(
        name=worker.url,
        todo_tokens=load.todo_tokens,
        tokens_per_s=load.tokens_per_s,
        free_tokens=load.free_tokens,
        held_tokens=load.held_tokens,
        requests=load.running + load.queued + worker.placed,
        streams=load.open_streams + worker.placed,
        shared_tokens=shared_tokens,
    )
