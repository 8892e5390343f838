from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from router.server import create_app
from sglang_stream.config import RouterConfig, WorkerAddress
from tests.router.fake_worker import FakeWorker, serving

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 256 bytes and a beginning token (id 256), with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<s>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return path


@pytest.fixture
def worker(tokenizer_dir: Path) -> FakeWorker:
    return FakeWorker(tokenizer_dir)


@pytest.fixture
def worker_url(worker: FakeWorker) -> Iterator[str]:
    with serving(worker.app()) as url:
        yield url
        for gate in worker.gates.values():
            gate.set()


@pytest.fixture
def settings() -> dict[str, Any]:
    """The router's settings besides the worker; a test overrides them by parametrising."""
    return {"max_body_bytes": 200_000, "max_chunk_bytes": 50_000, "resume_grace_s": 0.3}


@pytest.fixture
def client(worker_url: str, settings: dict[str, Any]) -> Iterator[httpx.Client]:
    """A client of a router that is ready."""
    with (
        serving(create_app(router_config(worker_url, **settings))) as url,
        httpx.Client(base_url=url, timeout=20) as http,
    ):
        until(lambda: http.get("/readiness").status_code == 200)
        yield http


def router_config(*worker_urls: str, **settings: Any) -> RouterConfig:
    """A router in front of unified workers, that does not wait long for one."""
    workers = tuple(WorkerAddress(url, "unified") for url in worker_urls)
    return RouterConfig(workers, **{"worker_wait_s": 0.5, **settings})


def until(condition: Callable[[], Any], timeout_s: float = 15) -> Any:
    """Waits until `condition()` is truthy and returns it."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition never held"
        threading.Event().wait(0.005)
    return value


def call_and_leave(
    client: httpx.Client, path: str, body: dict[str, Any], when: Callable[[], Any]
) -> None:
    """Posts `body` and closes the connection without an answer once `when()` holds."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        raw.sendall(head.encode() + content)
        until(when)


def opened(client: httpx.Client, **body: Any) -> str:
    """Opens a stream, over the token 1 unless told otherwise, and returns its id."""
    if not body.keys() & {"messages", "prompt", "input_ids"}:
        body["input_ids"] = [1]
    answer = client.post("/v1/streams", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """What stands under "error" in an answer of that status, after a look at its shape."""
    assert answer.status_code == status, answer.text
    fields = answer.json()["error"]
    assert isinstance(fields["message"], str)
    assert fields["message"]
    assert {"type", "code", "param"} <= fields.keys()
    return dict(fields)
