"""Streams over HTTP, and what their answers must be."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
VOCABULARY = range(300, 4000)  # ordinary tokens of the small model


def tokens(seed: str, count: int) -> list[int]:
    """`count` token ids that follow from `seed`."""
    rng = random.Random(seed)
    return [rng.choice(VOCABULARY) for _ in range(count)]


@dataclass
class Answer:
    """The events of one streamed answer, as they came."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None


def opened(http: httpx.Client, mode: str, opening: Sequence[int], **body: Any) -> str:
    body = {"mode": mode, "input_ids": list(opening), **body}
    answer = http.post("/v1/streams", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def append(http: httpx.Client, stream: str, seq: int, ids: Sequence[int]) -> dict[str, Any]:
    path = f"/v1/streams/{stream}/chunks"
    answer = http.post(path, json={"seq": seq, "input_ids": list(ids)})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def update(http: httpx.Client, stream: str, seq: int, ids: Sequence[int]) -> dict[str, Any]:
    path = f"/v1/streams/{stream}/context"
    answer = http.put(path, json={"seq": seq, "input_ids": list(ids)})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def generate(
    http: httpx.Client, stream: str, tail: Sequence[int], max_tokens: int, **body: Any
) -> Answer:
    """The whole streamed answer."""
    answer = Answer()
    for _ in generating(http, stream, tail, max_tokens, answer, **body):
        pass
    return answer


def generating(
    http: httpx.Client,
    stream: str,
    tail: Sequence[int],
    max_tokens: int,
    answer: Answer,
    **body: Any,
) -> Iterator[list[int]]:
    """Reads an answer into `answer`; yields the new ids of each event."""
    call = {"input_ids": list(tail), "max_tokens": max_tokens, "stream": True, **GREEDY, **body}
    call.setdefault("request_id", uuid.uuid4().hex)
    with http.stream("POST", f"/v1/streams/{stream}/generate", json=call) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                answer.error = event["error"]
                return
            answer.usage = event.get("usage") or answer.usage
            ids = [i for choice in event["choices"] for i in choice["token_ids"]]
            answer.ids += ids
            answer.text += "".join(choice.get("text") or "" for choice in event["choices"])
            yield ids


def cold(http: httpx.Client, prompt: Sequence[int], max_tokens: int) -> Answer:
    """The same prompt as one ordinary call that finds nothing cached."""
    body = {"model": "m", "prompt": list(prompt), "max_tokens": max_tokens, **GREEDY}
    response = http.post("/v1/completions", json={**body, "extra_key": uuid.uuid4().hex})
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return Answer(choice["token_ids"], choice["text"])
