"""A worker's counters, read from its metrics page."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

COUNTERS = {
    "sglang_stream_passes_total": "passes",
    "sglang_stream_pass_tokens_total": "pass_tokens",
    "sglang_stream_preemptions_total": "preemptions",
    "sglang_stream_recomputed_tokens_total": "recomputed_tokens",
    "sglang_stream_swapped_tokens_total": "swapped_tokens",
    "sglang_stream_restored_tokens_total": "restored_tokens",
    "sglang_stream_invalidated_tokens_total": "invalidated_tokens",
    "sglang_stream_found_again_tokens_total": "found_again_tokens",
}


def read_counters(worker_url: str) -> dict[str, float]:
    """What the worker at `worker_url` has counted so far; `preemptions` by their kind, as
    `preemptions_swap`."""
    page = httpx.get(f"{worker_url}/metrics", timeout=30, trust_env=False, follow_redirects=True)
    page.raise_for_status()
    return parse_counters(page.text)


def parse_counters(page: str) -> dict[str, float]:
    counted: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            name = COUNTERS.get(sample.name)
            if name is not None:
                kind = sample.labels.get("kind")
                name = f"{name}_{kind}" if kind else name
                counted[name] = counted.get(name, 0.0) + sample.value
    return counted


def counted_since(before: dict[str, float], now: dict[str, float]) -> dict[str, int]:
    """How much each counter has grown."""
    return {name: round(value - before.get(name, 0.0)) for name, value in now.items()}
