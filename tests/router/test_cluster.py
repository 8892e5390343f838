"""Workers that come and go while a router runs, and whose streams a caller sees."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.router.conftest import error_of, opened, until
from tests.router.rig import append, health, rig

ADMIN = "admin-key"


def test_workers_are_added_and_removed(tokenizer_dir: Path) -> None:
    with rig(tokenizer_dir, "unified", routers=1) as made:
        (router,) = made.routers
        (first,) = made.workers
        stream = opened(router)
        append(router, stream, 1, [11])

        second = made.add_worker()
        added = router.post("/workers", json={"url": second})
        assert added.status_code == 202, added.text
        until(lambda: health(router).get(second))
        assert error_of(router.post("/workers", json={"url": second + "/"}), 400)

        ids = {w["url"]: w["id"] for w in router.get("/workers").json()["workers"]}
        removed = router.delete(f"/workers/{ids[first]}")
        assert removed.json() == {"id": ids[first], "url": first, "removed": True}
        error_of(router.delete(f"/workers/{ids[first]}"), 404)
        assert list(health(router)) == [second]
        append(router, stream, 2, [12])
        assert made.tokens(second, stream) == [1, 11, 12]
        assert made.holder(router, stream) == second

        assert router.delete(f"/workers/{ids[second]}").status_code == 200
        until(lambda: router.get("/readiness").status_code == 503)
        # The stream waits here for a worker.
        assert router.post("/workers", json={"url": first}).status_code == 202
        append(router, stream, 3, [13])
        assert made.tokens(first, stream) == [1, 11, 12, 13]


@pytest.fixture
def keyed(tokenizer_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("a:key-a\nb:key-b\n")
    return path


def test_a_key_sees_its_own_streams_at_every_router(tokenizer_dir: Path, keyed: Path) -> None:
    settings = {"api_key_file": str(keyed), "admin_api_key": ADMIN}
    with rig(tokenizer_dir, "unified", "unified", **settings) as made:
        mine = {"Authorization": "Bearer key-a"}
        others = {"Authorization": "Bearer key-b"}
        one, two = made.routers
        stream = opened_by(one, mine)
        for router in made.routers:
            _check_visible(router, stream, mine)
            _check_hidden(router, stream, others)
        chunk = {"seq": 1, "input_ids": [11]}
        url = f"/v1/streams/{stream}/chunks"
        assert two.post(url, json=chunk, headers=mine).status_code == 202
        _check_hidden(two, stream, others)
        error_of(one.get("/workers", headers=mine), 403)
        assert one.get("/workers").status_code == 200
        # The admin sees it, and where it is, also at a router that has not heard of it.
        unheard = opened_by(one, mine)
        assert two.get(f"/v1/streams/{unheard}").json()["prefill_worker"] in made.workers
        assert two.post(f"/v1/streams/{unheard}/chunks", json=chunk, headers=mine).is_success
        assert two.delete(f"/v1/streams/{unheard}").status_code == 200
        assert one.get(f"/v1/streams/{stream}").json()["prefill_worker"] in made.workers
        assert stream in [s["id"] for s in one.get("/v1/streams").json()["data"]]


def opened_by(router: httpx.Client, headers: dict[str, str]) -> str:
    body = {"mode": "append", "input_ids": [1]}
    return str(router.post("/v1/streams", json=body, headers=headers).json()["id"])


def _check_visible(router: httpx.Client, stream: str, mine: dict[str, str]) -> None:
    seen = router.get(f"/v1/streams/{stream}", headers=mine).json()
    assert seen["id"] == stream
    assert "prefill_worker" not in seen
    assert stream in [s["id"] for s in router.get("/v1/streams", headers=mine).json()["data"]]


def _check_hidden(router: httpx.Client, stream: str, others: dict[str, str]) -> None:
    url = f"/v1/streams/{stream}"
    error_of(router.get(url, headers=others), 404)
    error_of(router.delete(url, headers=others), 404)
    chunk = {"seq": 1, "input_ids": [66]}
    error_of(router.post(f"{url}/chunks", json=chunk, headers=others), 404)
    error_of(router.post(f"{url}/generate", json={"max_tokens": 1}, headers=others), 404)
    assert router.get("/v1/streams", headers=others).json()["data"] == []
