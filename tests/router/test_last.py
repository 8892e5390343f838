"""The last chunk, or the whole context, in the call that generates."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_stream.errors import EngineFailure, PromptTooLong
from sglang_stream.messages import Append, Update
from tests.router.conftest import error_of, opened, until
from tests.router.fake_worker import CHUNKS, FakeWorker, greedy, text_of
from tests.router.rig import Rig, append, rig, text_from

ASK: dict[str, Any] = {"input_ids": [50], "max_tokens": 8, "temperature": 0}


def generate(client: httpx.Client, stream: str, seq: int, **more: Any) -> httpx.Response:
    """Seals over `input_ids` as call `seq`, or what else is given as `last`."""
    last = {"seq": seq} | more.pop("last", {"input_ids": [12]})
    return client.post(f"/v1/streams/{stream}/generate", json=ASK | {"last": last} | more)


def held(worker: FakeWorker, stream: str) -> list[int]:
    return worker.streams[stream].tokens.tolist()


def chunks_heard(worker: FakeWorker) -> int:
    return sum(isinstance(event, Append | Update) for event in worker.events)


def test_it_goes_before_the_seal(client: httpx.Client, worker: FakeWorker) -> None:
    worker.spoken = 8
    stream = opened(client)
    append(client, stream, 1, [11])
    assert text_from(generate(client, stream, 2)) == text_of(greedy([1, 11, 12, 50], 8))
    (seal,) = worker.seals
    assert seal["call"]["last_seq"] == 2
    assert held(worker, stream) == [1, 11, 12]


def test_it_may_be_the_only_one(client: httpx.Client, worker: FakeWorker) -> None:
    worker.spoken = 8
    stream = opened(client)
    answer = generate(client, stream, 1, last_seq=1)
    assert text_from(answer) == text_of(greedy([1, 12, 50], 8))


def test_a_whole_context(client: httpx.Client, worker: FakeWorker) -> None:
    stream, other = (opened(client, mode="update", prompt="<") for _ in range(2))
    documents = ["ab", {"id": "d", "text": "cd"}]
    for seq, chosen in ((1, documents[1:]), (2, documents)):
        body = {"seq": seq, "documents": chosen}
        assert client.put(f"/v1/streams/{other}/context", json=body).status_code == 202
    body = {"seq": 1, "documents": documents[1:]}
    assert client.put(f"/v1/streams/{stream}/context", json=body).status_code == 202
    ask = {"input_ids": None, "question": "?"}
    text_from(generate(client, stream, 2, last={"documents": documents}, **ask))
    assert held(worker, stream) == held(worker, other)


def test_the_seal_does_not_wait_for_its_answer(client: httpx.Client, worker: FakeWorker) -> None:
    """Where the seal is there before it, which a worker refuses, it is sent again."""
    worker.spoken = 8
    stream = opened(client)
    gate = worker.gates[CHUNKS] = threading.Event()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(generate, client, stream, 1)
        until(lambda: worker.seals)
        assert held(worker, stream) == [1]
        gate.set()
        assert text_from(answer.result()) == text_of(greedy([1, 12, 50], 8))


def test_a_refusal_changes_nothing(client: httpx.Client, worker: FakeWorker) -> None:
    worker.spoken = 8
    stream = opened(client)
    append(client, stream, 1, [11])
    worker.refusal = PromptTooLong("too long: send less")
    assert error_of(generate(client, stream, 2), 413)["message"] == "too long: send less"
    worker.refusal = None
    described = client.get(f"/v1/streams/{stream}").json()
    assert (described["status"], described["seq"]) == ("open", 1)
    append(client, stream, 2, [13])
    answer = client.post(f"/v1/streams/{stream}/generate", json=ASK | {"last_seq": 2})
    assert text_from(answer) == text_of(greedy([1, 11, 13, 50], 8))


def test_a_gap_before_it(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client)
    assert error_of(generate(client, stream, 3), 409)["expected_seq"] == 1
    assert worker.seals == []
    append(client, stream, 1, [11])
    assert generate(client, stream, 2).status_code == 200


def test_it_was_sent_before(client: httpx.Client, worker: FakeWorker) -> None:
    worker.spoken = 8
    stream = opened(client)
    append(client, stream, 1, [12])
    assert error_of(generate(client, stream, 1, last={"input_ids": [13]}), 409)
    assert text_from(generate(client, stream, 1)) == text_of(greedy([1, 12, 50], 8))


def test_the_wrong_mode(client: httpx.Client, worker: FakeWorker) -> None:
    stream = opened(client)
    assert error_of(generate(client, stream, 1, last={"documents": ["a"]}), 409)
    assert worker.seals == []
    assert generate(client, stream, 1).status_code == 200


def test_no_room_for_an_answer_is_told_before_anything_is_sent(
    client: httpx.Client, worker: FakeWorker
) -> None:
    stream = opened(client)
    long = {"input_ids": [7] * (worker.context_len - 5)}
    fields = error_of(generate(client, stream, 1, last=long), 400)
    assert fields["code"] == "context_length_exceeded"
    assert chunks_heard(worker) == 0
    assert generate(client, stream, 1).status_code == 200


def test_the_same_request_again(client: httpx.Client, worker: FakeWorker) -> None:
    gate = worker.gates[-1] = threading.Event()
    stream = opened(client)
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(generate, client, stream, 1, request_id="r") for _ in range(2)]
        # A seal that is looked at before its chunk is there would be refused, and sent again.
        until(lambda: worker.seals and held(worker, stream) == [1, 12])
        gate.set()
        texts = {text_from(answer.result()) for answer in answers}
    assert texts == {"Hello there"}
    assert len(worker.seals) == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"last": {"seq": 2, "input_ids": [1]}, "last_seq": 1}, "last_seq"),
        ({"last": {"seq": 1, "input_ids": [1], "chunks": ["a"]}}, "last"),
        ({"last": {"seq": 1}}, "last"),
        ({"last": {"input_ids": [1]}}, "last.seq"),
    ],
)
def test_what_is_malformed(client: httpx.Client, body: dict[str, Any], field: str) -> None:
    stream = opened(client)
    answer = client.post(f"/v1/streams/{stream}/generate", json=ASK | body)
    assert field.split(".")[0] in error_of(answer, 422)["message"] + str(answer.json())


@pytest.fixture
def pair(tokenizer_dir: Path) -> Iterator[Rig]:
    quick = {"retry_initial_backoff_ms": 1, "cb_failure_threshold": 100}
    with rig(tokenizer_dir, "unified", "unified", routers=1, **quick) as found:
        yield found


def test_it_goes_along_to_another_worker(pair: Rig) -> None:
    router = pair.routers[0]
    stream = opened(router)
    append(router, stream, 1, [11])
    holder = pair.holder(router, stream)
    pair.workers[holder].fails = EngineFailure("no forward")
    assert text_from(generate(router, stream, 2)) == text_of(greedy([1, 11, 12, 50], 8))
    assert pair.tokens(pair.other(holder), stream) == [1, 11, 12]
