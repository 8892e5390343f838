"""The workers of a cell and the requests of a load, from their arrival to their answers.

    client --call--> placement --> prefill worker --KV--> decode worker --tokens--> client

Placement is the router's own (`router.placement`), by what workers are now rather than by their
last report. The KV of a slice is sent when it is computed, the first one's with all that was cached
before it, over a link that each prefill worker has and that is as fast as copies to host memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.cells import Cell
from experiments.simulate.batches import Limits, Request
from experiments.simulate.clients import Client, ResendClient, StreamingClient, WaitingClient
from experiments.simulate.decode import DecodeWorker
from experiments.simulate.events import Clock
from experiments.simulate.pool import Node, Prompt
from experiments.simulate.timeline import Happened
from experiments.simulate.worker import Worker, WorkerSettings
from experiments.spec import EngineSpec
from experiments.workload.shapes import Arrived
from router.placement import choose_decode, choose_prefill
from sglang_stream.config import Profile
from sglang_stream.policy import PolicyName

_GIB = 1 << 30


def settings_of(profile: Profile, engine: EngineSpec, policy: PolicyName | None) -> WorkerSettings:
    """A worker of the specification on that machine."""
    pass_s = engine.pass_ms / 1000 if engine.pass_ms is not None else None
    return WorkerSettings(
        cost=profile.cost,
        rest=profile.forward_rest.value,
        decode=profile.decode.value,
        kv_tokens=engine.kv_tokens or profile.kv_tokens.value,
        page=engine.page,
        policy=policy or "default",
        invalidation=engine.invalidation,
        host_tokens=int(engine.host_memory_gb * _GIB / profile.kv_bytes_per_token.value),
        limits=Limits(engine.batch_tokens, engine.pass_tokens, pass_s, engine.preemption),
        foresees=policy not in engine.compute_all,
    )


class Cluster:
    """The workers, and the clients that wait for an answer of them. `happened`: where prefill
    workers note what they do, None if nobody wants to know."""

    def __init__(
        self,
        profile: Profile,
        engine: EngineSpec,
        cell: Cell,
        happened: list[Happened] | None = None,
    ) -> None:
        self.clock = Clock()
        self.call_s = profile.call.value if profile.call is not None else 0.0
        self._call_rest = profile.call_rest.value
        self._last_call_s = -math.inf  # when a call for an answer came, or an answer left
        self.workers: list[Worker] = []
        self.decoders: list[DecodeWorker] = []
        self._cell = cell
        self._awaits_answers = engine.client == "sdk"
        self._copy = profile.swap_out.value
        self._links_free_s: dict[str, float] = {}
        self._clients: dict[Request, Client] = {}
        self._to: dict[Request, tuple[Worker, DecodeWorker]] = {}
        self._placed = 0
        self._sealed = 0
        settings = settings_of(profile, engine, cell.policy)
        self._room = settings.kv_tokens - 2 * settings.page
        for number in range(engine.prefill_workers):
            name = f"prefill-{number}"
            self.workers.append(
                Worker(
                    self.clock,
                    name,
                    settings,
                    self._computed,
                    self._prefilled,
                    self._ended,
                    happened,
                )
            )
            self._links_free_s[name] = 0.0
        for number in range(engine.decode_workers):
            self.decoders.append(
                DecodeWorker(
                    self.clock, f"decode-{number}", settings.kv_tokens, settings.decode, self._ended
                )
            )

    def run(self, load: Sequence[Arrived], output: int) -> list[Client]:
        """Answers all requests of a load. Raises RuntimeError if one is never answered."""
        clients = [self._client(arrived, output) for arrived in load]
        begun = [client for client in clients if client.space < self._room]
        for client in begun:
            client.begin()
        self.clock.run()
        for client in begun:
            if client.end_s is None:
                raise RuntimeError(f"{client.query.query_id} was never answered")
        return clients

    def _client(self, arrived: Arrived, output: int) -> Client:
        match self._cell.mode:
            case "waiting":
                return WaitingClient(self, arrived, output)
            case "resend":
                return ResendClient(self, arrived, output)
            case "streaming":
                return StreamingClient(self, arrived, output, awaits_answers=self._awaits_answers)

    # --- what clients call --------------------------------------------------------------------

    def request_call_s(self) -> float:
        return self.call_s + self._call_rest.seconds(self.clock.now - self._last_call_s)

    def place(self, tokens: int, roots: dict[str, Node], prompt: Prompt) -> Worker:
        """The worker for a prompt of which so much is known; `roots`: its trees by worker."""
        if len(self.workers) == 1:
            return self.workers[0]
        views = [
            worker.view(worker.pool.match(roots[worker.name], prompt)[1])
            if worker.name in roots
            else worker.view()
            for worker in self.workers
        ]
        chosen = choose_prefill(self._cell.placement, views, tokens, self._placed)
        self._placed += 1
        return next(worker for worker in self.workers if worker.name == chosen.name)

    def ask(self, worker: Worker, request: Request, client: Client) -> None:
        """Hands a worker a full request, once a decode worker has room for it where there are
        some; the client hears of its tokens."""
        self._clients[request] = client
        self._last_call_s = self.clock.now
        if not self.decoders:
            worker.post(lambda: worker.ask(request))
            return
        views = [decoder.view() for decoder in self.decoders]
        chosen = choose_decode(self._cell.placement, views, request.space, self._sealed)
        self._sealed += 1
        decoder = next(d for d in self.decoders if d.name == chosen.name)
        self._to[request] = worker, decoder
        decoder.reserve(request, lambda: worker.post(lambda: worker.ask(request)))

    # --- what workers tell --------------------------------------------------------------------

    def _computed(self, request: Request) -> None:
        if request not in self._to:
            return
        worker, _ = self._to[request]
        begin = max(self.clock.now, self._links_free_s[worker.name])
        self._links_free_s[worker.name] = begin + self._copy.seconds(request.done - request.sent)
        request.sent = request.done

    def _prefilled(self, request: Request) -> bool:
        if request not in self._to:
            self._first_token(request)
            return True
        worker, decoder = self._to.pop(request)

        def arrived() -> None:
            worker.post(lambda: worker.release(request))
            self._first_token(request)
            decoder.start(request)

        self.clock.at(self._links_free_s[worker.name], arrived)
        return False

    def _first_token(self, request: Request) -> None:
        self._last_call_s = self.clock.now
        self._clients[request].first_token(request, self.clock.now + self.call_s)

    def _ended(self, request: Request) -> None:
        self._last_call_s = self.clock.now
        self._clients.pop(request).ended(request, self.clock.now + self.call_s)
