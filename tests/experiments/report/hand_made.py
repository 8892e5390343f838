"""Rows as `replay` and `simulate` write them, by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from experiments.request_row import CellRow, EventRow, LoadRow, RequestRow
from experiments.rows import Row

MANIFEST: Row = {
    "bench": "manifest",
    "at": "2026-01-02T03:04:05+00:00",
    "model": "tiny",
    "flags": ["--dtype", "float32"],
    "seed": 0,
    "versions": {"sglang": "0.5.17", "torch": None},
    "python": "3.12.1",
    "commit": "abc",
    "cpu": "a CPU",
    "cores": 2,
    "gpus": [],
    "machine": "h200-tp2",
    "spec": {"name": "main", "published": "crawler", "goodput_ttft_ms": 300.0},
}


def keys(policy: str | None, qps: float = 1.0, seed: int = 0, **others: Any) -> dict[str, Any]:
    return {
        "source": "simulator",
        "machine": "h200-tp2",
        "workload": "crawler",
        "mode": "streaming" if policy else "waiting",
        "stream_policy": policy,
        "placement": "stream_aware",
        "qps": qps,
        "seed": seed,
    } | others


def requests(
    policy: str | None, ttft_s: float, count: int = 20, qps: float = 1.0, **others: Any
) -> list[RequestRow]:
    """TTFT from `ttft_s` to almost twice that, one request after the other."""
    rows = []
    for i in range(count):
        end_s = i / qps + 8 + ttft_s * (1 + i / count)
        rows.append(
            RequestRow(
                **keys(policy, qps, **others),
                query_id=f"q{i}",
                arrival_s=i / qps,
                last_chunk_s=i / qps + 8,
                iterator_end_s=i / qps + 8,
                seal_s=i / qps + 8,
                first_token_s=end_s,
                end_s=end_s,
                ttft_s=ttft_s * (1 + i / count),
                prompt_tokens=1000,
                output_tokens=1,
                cached_tokens=0,
                invalidated_tokens=10 * i if policy else None,
            )
        )
    return rows


def end(rows: Sequence[RequestRow]) -> CellRow:
    first = rows[0]
    key = {name: getattr(first, name) for name in LoadRow.__struct_fields__}
    failed = sum(row.failed is not None for row in rows)
    return CellRow(**key, requests=len(rows), failed=failed, makespan_s=100.0)


def event(what: str, t_s: float, policy: str = "fcfs", **fields: Any) -> EventRow:
    return msgspec.convert(
        {"kind": "event", **keys(policy), "what": what, "t_s": t_s, **fields}, EventRow
    )


def write(path: Path, rows: Sequence[LoadRow], manifest: Row | None = MANIFEST) -> Path:
    plain = [msgspec.to_builtins(row) for row in rows]
    lines = [json.dumps(row) for row in ([manifest] if manifest else []) + plain]
    path.write_text("".join(line + "\n" for line in lines))
    return path
