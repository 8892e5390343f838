"""Ordinary OpenAI calls through the same port, by the `openai` package and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.end_to_end.server import Server, begin, greedy, ok, token_ids
from tests.end_to_end.texts import Prompts, ids, words

MESSAGES: list[Any] = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Is anybody there?"},
]
OPTIONS: dict[str, Any] = {
    "max_tokens": 12,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    (only,) = client.models.list()
    return str(only.id)


def test_a_chat_completion(
    server: Server, client: openai.OpenAI, model: str, prompts: Prompts
) -> None:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, **OPTIONS)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    prompt = prompts.encode(prompts.text({"messages": MESSAGES[:1]}, MESSAGES[1]["content"], ""))
    assert answer.usage.prompt_tokens == len(prompt)
    assert choice.message.content == server.cold(prompt, 12).text


def test_a_streamed_chat_completion(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=MESSAGES, **OPTIONS)
    with client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        **OPTIONS,
    ) as chunks:
        events = list(chunks)
    said = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert said == whole.choices[0].message.content
    assert sum(bool(e.choices and e.choices[0].delta.content) for e in events) > 3
    assert {e.object for e in events} == {"chat.completion.chunk"}
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_a_completion(server: Server, client: openai.OpenAI, model: str, kind: str) -> None:
    """In one piece and streamed; a prompt may be token ids."""
    prompt: Any = ids("completion", 40) if kind == "ids" else words("completion", 40)
    whole = client.completions.create(model=model, prompt=prompt, **OPTIONS)
    with client.completions.create(model=model, prompt=prompt, stream=True, **OPTIONS) as chunks:
        said = "".join(e.choices[0].text for e in chunks if e.choices)
    assert whole.choices[0].text == said
    if kind == "ids":
        assert said == server.cold(prompt, 12).text


def test_models(server: Server, client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"
    assert ok(server.http.get("/v1/models"))["data"][0]["id"] == model


def test_an_answer_whose_prefix_is_cached_says_so(server: Server) -> None:
    """What `cold` compares with is cold because of its salt, not because nothing is ever told."""
    prompt = ids("cached", 100)
    body = {"model": "default", "prompt": prompt, **greedy(4)}
    first, second = (ok(server.http.post("/v1/completions", json=body)) for _ in range(2))
    assert first["usage"]["prompt_tokens_details"] is None
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 99


def test_a_stream_finds_what_an_ordinary_call_computed(server: Server) -> None:
    """And the other way round: both use one cache."""
    prompt = ids("one cache", 200)
    plain = {"model": "default", "prompt": prompt, **greedy(4)}
    ok(server.http.post("/v1/completions", json=plain))
    stream = server.open(input_ids=prompt)
    ok(server.append(stream, 1, ids("more", 50)), 202)
    state = server.computed(stream, 50)
    assert state["usage"]["stream"]["computed_tokens"] == 50
    answer = server.generate(stream, 4)
    assert token_ids(answer) == server.cold([*prompt, *ids("more", 50)], 4).tokens
    plain["prompt"] = [*prompt, *ids("more", 50), 7]
    again = ok(server.http.post("/v1/completions", json=plain))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 250


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": []}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}),
        ("completions", {}),
        ("completions", {"prompt": ids("over", 5000), "max_tokens": 4}),
        ("completions", {"prompt": ids("over", 5000), "max_tokens": 4, "stream": True}),
        ("completions", {"prompt": [5, 10_000_000], "max_tokens": 4}),
        ("completions", {"prompt": [5, -1], "max_tokens": 4}),
        ("completions", {"prompt": [5, 2**64], "max_tokens": 4}),
    ],
)
def test_errors_have_openais_shape(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.http.post(f"/v1/{path}", json={"model": "default", **body})
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_the_package_raises_the_error(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="longer than the model's context length"):
        client.completions.create(model=model, prompt=ids("over", 5000), **OPTIONS)


def test_errors_of_streams_are_those_of_the_package(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.get("/streams/st-1", cast_to=object)
    assert caught.value.code == "stream_not_found"


def test_ordinary_calls_beside_an_open_stream(server: Server) -> None:
    """They share its prefix while it is being computed."""
    shared = ids("shared", 500)
    stream = server.open(input_ids=shared)
    body = {"model": "default", "stream": True, **greedy(8)}
    calls = [
        begin(server, "POST", "/v1/completions", {**body, "prompt": [*shared, *ids(i, 20)]})
        for i in range(3)
    ]
    answers = [call.tokens() for call in calls]
    assert token_ids(server.generate(stream)) == server.cold(shared).tokens
    for i, tokens in enumerate(answers):
        assert tokens == server.cold([*shared, *ids(i, 20)]).tokens
