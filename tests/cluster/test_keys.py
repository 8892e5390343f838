"""API keys on real workers: whose streams, whose prefix cache, who may look at the workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.calls import append, generate, opened, tokens
from tests.cluster.processes import ClusterProcesses, router_process
from tests.harness import wait_until

KEYS = "team-a:sk-a\nteam-b:sk-b\n"


@pytest.fixture
def url(cluster: ClusterProcesses, tmp_path: Path) -> Iterator[str]:
    """A third router in front of the same workers, which wants keys."""
    file = tmp_path / "keys"
    file.write_text(KEYS)
    flags = ("--api-key-file", str(file), "--log-json")
    router = router_process(cluster.workers, tmp_path, "router-with-keys", *flags)
    router.env["SGLANG_STREAM_ADMIN_KEY"] = "sk-admin"
    router.start()
    try:
        router.wait_ready()
        yield router.url
    finally:
        router.kill()


def client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"})


def test_each_key_has_its_own(cluster: ClusterProcesses, url: str) -> None:
    a, b, admin = client(url, "sk-a"), client(url, "sk-b"), client(url, "sk-admin")
    refused = httpx.post(f"{url}/v1/streams", json={"prompt": "x"})
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    prompt = tokens("secret document", 900)

    stream = opened(a, "append", [])
    append(a, stream, 1, prompt)
    wait_until(lambda: computed(a, stream) >= len(prompt), 60, "computed")
    path = f"/v1/streams/{stream}"
    for call in (b.get(path), b.delete(path), b.post(f"{path}/generate", json={})):
        assert (call.status_code, call.json()["error"]["code"]) == (404, "stream_not_found")
    assert b.get("/v1/streams").json()["data"] == []
    assert "prefill_worker" not in a.get(path).json()
    assert admin.get(path).json()["prefill_worker"] in {w.url for w in cluster.workers}
    assert a.get("/workers").status_code == 403
    assert len(admin.get("/workers").json()["workers"]) == len(cluster.workers)

    assert generate(a, stream, [5], 4).error is None
    # What one key has computed, another one computes anew.
    mine = opened(a, "append", prompt)
    counters = generate(a, mine, [6], 4).usage["stream"]
    assert (counters["ready_tokens"], counters["computed_tokens"]) == (len(prompt), 0)
    theirs = opened(b, "append", [])
    append(b, theirs, 1, prompt)
    wait_until(lambda: computed(b, theirs) >= len(prompt), 60, "computed anew")


def computed(http: httpx.Client, stream: str) -> int:
    usage = http.get(f"/v1/streams/{stream}").json()["usage"]
    return int(usage["stream"]["computed_tokens"])
