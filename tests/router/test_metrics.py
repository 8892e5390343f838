from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.router.conftest import opened


def samples(client: httpx.Client) -> dict[tuple[str, ...], float]:
    """All samples by name and label values."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (s.name, *(v for _, v in sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
    }


def test_what_is_counted(client: httpx.Client) -> None:
    stream = opened(client)
    opened(client)
    client.post(f"/v1/streams/{stream}/chunks", json={"seq": 1, "chunks": ["a"]})
    client.post(f"/v1/streams/{stream}/chunks", json={"seq": 9, "chunks": ["a"]})
    client.post(f"/v1/streams/{stream}/generate", json={})
    client.get("/nowhere")

    seen = samples(client)
    name = "sglang_stream_router"
    assert seen[f"{name}_open_streams",] == 1
    assert seen[f"{name}_chunks_total",] == 1
    assert seen[f"{name}_ttft_seconds_count",] == 1
    assert 0 < seen[f"{name}_ttft_seconds_sum",] < 20
    requests = f"{name}_requests_total"
    chunks = "/v1/streams/{stream_id}/chunks"
    assert seen[requests, "POST", "/v1/streams", "201"] == 2
    assert seen[requests, "POST", chunks, "202"] == 1
    assert seen[requests, "POST", chunks, "409"] == 1
    assert seen[requests, "POST", "/v1/streams/{stream_id}/generate", "200"] == 1
    assert seen[requests, "GET", "other", "404"] == 1
