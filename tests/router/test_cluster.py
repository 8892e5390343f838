"""Workers that come and go while a router runs, and whose streams a caller sees."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.identity import worker_tag
from sglang_stream.messages import Report
from tests.router.conftest import error_of, opened, until
from tests.router.fake_worker import greedy, text_of
from tests.router.rig import append, health, rig, text_from

ADMIN = "admin-key"
ASK = {"input_ids": [50], "max_tokens": 8, "temperature": 0}


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

        assert remove(router, first)["draining"] is True
        until(lambda: list(health(router)) == [second])
        error_of(router.delete(f"/workers/{worker_tag(first)}"), 404)
        assert made.tokens(second, stream) == [1, 11]
        assert made.tokens(first, stream) == [], "it is not held twice"
        append(router, stream, 2, [12])
        assert made.tokens(second, stream) == [1, 11, 12]
        assert made.holder(router, stream) == second

        # The stream stays where it is until there is another worker.
        for _ in range(2):
            assert remove(router, second)["draining"] is True
        assert "is draining" in error_of(router.get("/readiness"), 503)["message"]
        error_of(router.post("/v1/streams", json={"input_ids": [1], "mode": "append"}), 503)
        append(router, stream, 3, [13])
        assert made.tokens(second, stream) == [1, 11, 12, 13]
        assert router.post("/workers", json={"url": first}).status_code == 202
        until(lambda: list(health(router)) == [first])
        assert made.tokens(first, stream) == [1, 11, 12, 13]
        append(router, stream, 4, [14])
        assert made.tokens(first, stream) == [1, 11, 12, 13, 14]


def test_a_running_answer_ends_on_a_worker_that_is_draining(tokenizer_dir: Path) -> None:
    with rig(tokenizer_dir, "unified", routers=1) as made, ThreadPoolExecutor() as pool:
        (router,) = made.routers
        (first,) = made.workers
        stream = opened(router)
        made.workers[first].gates = {3: threading.Event()}
        answer = pool.submit(router.post, f"/v1/streams/{stream}/generate", json=ASK)
        until(lambda: made.workers[first].seals)
        router.post("/workers", json={"url": made.add_worker()})
        until(lambda: len(health(router)) == 2 and all(health(router).values()))
        remove(router, first)
        fresh = [opened(router) for _ in range(4)]
        assert not set(fresh) & made.workers[first].streams.keys()
        assert first in health(router)
        made.workers[first].gates[3].set()
        assert text_from(answer.result()) == text_of(greedy([1, 50], 8))
        until(lambda: first not in health(router))
        assert [s["call"]["epoch"] for w in made.workers.values() for s in w.seals] == [0]


def test_a_worker_that_other_routers_use_is_removed_when_it_is_empty(tokenizer_dir: Path) -> None:
    with rig(tokenizer_dir, "unified", "unified") as made:
        one, two = made.routers
        first, held = next(iter(made.workers.items()))
        held.report = Report(1, 0.0, 100, 0, 0, 0, 0, 1, 0.0)
        made.lose(first)  # it reports to who finds it again
        made.reset()
        stream = next(s for s in iter(lambda: opened(two), None) if s in held.streams)
        remove(one, first)
        append(one, stream, 1, [11])
        until(lambda: made.tokens(made.other(first), stream) == [1, 11])
        assert first in health(one)
        assert one.post("/workers", json={"url": first}).json()["draining"] is False


def test_the_other_router_follows_a_stream_that_was_moved(tokenizer_dir: Path) -> None:
    with rig(tokenizer_dir, "unified", "unified") as made:
        one, two = made.routers
        streams = [opened(one) for _ in range(4)]
        for stream in streams:
            append(two, stream, 1, [11])
        first = made.holder(one, streams[0])
        here = [s for s in streams if made.holder(one, s) == first]
        assert len(here) >= 2
        remove(one, first)
        until(lambda: first not in health(one))
        assert two.get(f"/v1/streams/{here[0]}").json()["prefill_worker"] == made.other(first)
        answer = two.post(f"/v1/streams/{here[1]}/generate", json=ASK | {"last_seq": 1})
        assert text_from(answer) == text_of(greedy([1, 11, 50], 8))
        assert two.delete(f"/v1/streams/{here[0]}").status_code == 200
        assert not made.tokens(made.other(first), here[0])


def remove(router: httpx.Client, url: str) -> Any:
    answer = router.delete(f"/workers/{worker_tag(url)}")
    assert answer.status_code == 202, answer.text
    return answer.json()


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
