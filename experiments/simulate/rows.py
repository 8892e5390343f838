"""The rows of one cell, as the runner writes them (`experiments/replay/load.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from experiments.cells import Cell
from experiments.request_row import (
    WINDOW_S,
    CellRow,
    EventName,
    EventRow,
    LoadRow,
    RequestRow,
)
from experiments.simulate.clients import Client
from experiments.simulate.cluster import Cluster
from experiments.simulate.holdings import Usage
from experiments.simulate.table import tokens_of
from experiments.simulate.timeline import Happened, window
from experiments.spec import EngineSpec
from experiments.workload.shapes import Arrived
from sglang_stream.config import Profile


def simulate(
    profile: Profile,
    engine: EngineSpec,
    cell: Cell,
    load: Sequence[Arrived],
    output: int,
    workload: str,
    *,
    events: bool = False,
) -> list[LoadRow]:
    """One row for each request, in the order of arrival, then one for the cell.

    `events`: before that one, rows of what clients saw and workers did in a short time in the
    middle of the load (see `timeline.window`).
    """
    keys: dict[str, Any] = {
        "source": "simulator",
        "machine": profile.name,
        "workload": workload,
        "mode": cell.mode,
        "stream_policy": cell.policy,
        "placement": cell.placement,
        "qps": cell.qps,
        "seed": cell.seed,
    }
    happened: list[Happened] | None = [] if events else None
    clients = Cluster(profile, engine, cell, happened).run(load, output)
    rows: list[LoadRow] = [_request_row(client, keys) for client in clients]
    if happened is not None:
        happened += [event for client in clients for event in _seen_by(client)]
        middle_s = load[len(load) // 2].at_s
        kept = window(happened, middle_s - WINDOW_S / 2)
        rows += [EventRow(**keys, **event._asdict()) for event in kept]
    return [*rows, _cell_row(clients, keys)]


def _request_row(client: Client, keys: dict[str, Any]) -> RequestRow:
    """What became of a request."""
    query, request = client.query, client.request
    fields: dict[str, Any] = {
        "query_id": query.query_id,
        "arrival_s": client.arrival_s,
        "last_chunk_s": client.last_chunk_s,
        "chunks": len(query.steps),
    }
    if request is None:
        failed = "prompt and answer do not fit into the KV pool"
        return RequestRow(**keys, **fields, failed=failed)
    if client.stream is not None:
        counters = vars(client.stream.usage)
        fields |= {
            name: counters[name] for name in RequestRow.__struct_fields__ if name in counters
        }
    assert client.first_token_s is not None
    return RequestRow(
        **keys,
        **fields,
        iterator_end_s=client.last_chunk_s,
        seal_s=client.seal_s,
        first_token_s=client.first_token_s,
        end_s=client.end_s,
        ttft_s=client.first_token_s - client.last_chunk_s,
        prompt_tokens=query.prompt_tokens,
        output_tokens=request.generated,
        cached_tokens=request.found,
    )


def _cell_row(clients: Sequence[Client], keys: dict[str, Any]) -> CellRow:
    ended = [client.end_s for client in clients if client.end_s is not None]
    usages = [client.stream.usage for client in clients if client.stream is not None]
    return CellRow(
        **keys,
        requests=len(clients),
        failed=len(clients) - len(ended),
        makespan_s=max(ended, default=0.0),
        counted=counted_of(usages),
    )


def counted_of(usages: Sequence[Usage]) -> dict[str, int]:
    """What the workers' counters of an engine would say (see `bench.counters`)."""

    def total(name: str) -> int:
        return sum(getattr(usage, name) for usage in usages)

    swaps = total("swaps")
    return {
        "passes": total("passes"),
        "pass_tokens": total("computed_tokens"),
        "preemptions_recompute": total("preemptions") - swaps,
        "preemptions_swap": swaps,
        "recomputed_tokens": total("recomputed_tokens"),
        "swapped_tokens": total("swapped_tokens"),
        "restored_tokens": total("restored_tokens"),
        "invalidated_tokens": total("invalidated_tokens"),
        "found_again_tokens": total("found_again_tokens"),
    }


def _seen_by(client: Client) -> Iterator[Happened]:
    """Each step when it was due, and the times of its row."""
    name = client.query.query_id
    for step in client.query.steps:
        at_s = client.arrival_s + step.at_s
        yield Happened("chunk", at_s, tokens=tokens_of(step.documents), query_id=name)
    times: tuple[tuple[EventName, float | None], ...] = (
        ("seal", client.seal_s),
        ("first_token", client.first_token_s),
        ("end", client.end_s),
    )
    for what, t_s in times:
        if t_s is not None:
            yield Happened(what, t_s, query_id=name)
