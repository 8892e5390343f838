"""Answers whose clients repeat their call, vanish, come back, or delete the stream.

With the scheduler frozen no first token can come, so what is sent meanwhile comes before it.
"""

from __future__ import annotations

import pytest

from tests.end_to_end.server import Server, begin, begin_generate, error_of, ok, token_ids
from tests.end_to_end.texts import ids
from tests.harness import wait_until

LONG = 1500  # tokens: an answer that is still being generated whenever it is looked at


def filled(server: Server, seed: str, length: int = 60) -> tuple[str, list[int]]:
    """A stream with one chunk, and its prompt."""
    prompt = ids(seed, length)
    stream = server.open()
    ok(server.append(stream, 1, prompt), 202)
    return stream, prompt


def nothing_held(server: Server) -> None:
    wait_until(lambda: server.worker_metric("sglang_stream_held_tokens") == 0, 30, "no KV held")


# --- the same call again ----------------------------------------------------------------------


def test_the_same_call_before_the_first_token_is_the_same_answer(server: Server) -> None:
    stream, prompt = filled(server, "twice")
    with server.frozen_scheduler():
        calls = []
        for streamed in (True, True, False):
            calls.append(begin_generate(server, stream, 8, request_id="a", stream=streamed))
            server.handled()
        other = server.generate(stream, request_id="b")
    error_of(other, 409, "stream_sealed")
    expected = server.cold(prompt)
    assert calls[0].tokens() == expected.tokens
    assert calls[1].tokens() == expected.tokens
    status, answer = calls[2].answer()
    assert status == 200
    assert answer["choices"][0]["token_ids"] == expected.tokens
    assert answer["choices"][0]["text"] == expected.text
    assert answer["prompt_token_ids"] == prompt


def test_the_same_call_after_the_first_token(server: Server) -> None:
    stream, prompt = filled(server, "late")
    call = begin_generate(server, stream, 40, request_id="a")
    call.next_event()
    error_of(server.generate(stream, 40, request_id="a"), 409, "generation_started")
    error_of(server.generate(stream, 40, request_id="b"), 409, "stream_sealed")
    error_of(server.generate(stream, 40), 409, "stream_sealed")
    error_of(server.append(stream, 2, [5]), 409, "stream_sealed")
    assert ok(server.look(stream))["status"] in ("sealed", "finished")
    assert call.tokens() == server.cold(prompt, 40).tokens
    error_of(server.generate(stream, 40, request_id="a"), 409, "generation_started")


# --- clients that vanish ----------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_comes_back_before_the_first_token(server: Server, streamed: bool) -> None:
    stream, prompt = filled(server, "back")
    with server.frozen_scheduler():
        begin_generate(server, stream, 8, request_id="a", stream=streamed).close()
        server.handled()
        call = begin_generate(server, stream, 8, request_id="a")
        server.handled()
    assert call.tokens() == server.cold(prompt).tokens


def test_an_answer_that_was_lost_whole(server: Server) -> None:
    """All is generated while nobody is there: who comes in time is given it from the beginning."""
    stream, prompt = filled(server, "lost")
    with server.frozen_scheduler():
        begin_generate(server, stream, 8, request_id="a", stream=False).close()
        server.handled()
    wait_until(lambda: ok(server.look(stream))["status"] == "finished", 30, "the end")
    assert token_ids(server.generate(stream, 8, request_id="a")) == server.cold(prompt).tokens
    error_of(server.generate(stream, 8, request_id="a"), 409, "generation_started")


def test_an_answer_in_one_piece_whose_client_comes_back_midway(server: Server) -> None:
    stream, prompt = filled(server, "midway")
    call = begin_generate(server, stream, 100, request_id="a", stream=False)
    wait_until(lambda: ok(server.look(stream))["status"] == "sealed", 30, "a first token")
    call.close()
    server.handled()
    answer = server.generate(stream, 100, request_id="a")
    assert token_ids(answer) == server.cold(prompt, 100).tokens


def test_a_client_that_stays_away(server: Server) -> None:
    """After the grace its generation is given up, here and in the engine."""
    stream, _ = filled(server, "away")
    with server.frozen_scheduler():
        begin_generate(server, stream, LONG, request_id="a").close()
        server.handled()
    server.gone(stream)
    error_of(server.generate(stream, LONG, request_id="a"), 404, "stream_not_found")
    nothing_held(server)
    server.flush()


def test_a_client_that_vanishes_during_the_answer(server: Server) -> None:
    """Nobody can read on from the middle, so the generation ends at once."""
    stream, _ = filled(server, "vanish")
    call = begin_generate(server, stream, LONG, request_id="a")
    for _ in range(3):
        assert call.next_event()
    call.close()
    server.gone(stream, 10)
    nothing_held(server)
    server.flush()
    after, prompt = filled(server, "after")
    assert token_ids(server.generate(after)) == server.cold(prompt).tokens


def test_an_ordinary_call_whose_client_vanishes(server: Server) -> None:
    body = {"model": "default", "prompt": ids("plain", 20), "max_tokens": LONG, "stream": True}
    call = begin(server, "POST", "/v1/completions", {**body, "ignore_eos": True})
    assert call.next_event()
    call.close()
    server.flush()


# --- DELETE in every stage --------------------------------------------------------------------


def assert_deleted(server: Server, stream: str) -> None:
    error_of(server.look(stream), 404, "stream_not_found")
    error_of(server.delete(stream), 404, "stream_not_found")
    error_of(server.append(stream, 1, [5]), 404, "stream_not_found")
    error_of(server.generate(stream), 404, "stream_not_found")
    assert server.open_streams() == []
    nothing_held(server)


@pytest.mark.parametrize("stage", ["opened", "computing", "computed", "updated"])
def test_delete_an_open_stream(server: Server, stage: str) -> None:
    stream = server.open(mode="update", input_ids=ids((stage, 0), 10))
    if stage != "opened":
        ok(server.update(stream, 1, ids((stage, 1), 900)), 202)
    if stage in ("computed", "updated"):
        server.computed(stream, 910)
    if stage == "updated":
        ok(server.update(stream, 2, ids((stage, 2), 900)), 202)
    assert ok(server.delete(stream)) == {"id": stream, "object": "stream", "deleted": True}
    assert_deleted(server, stream)


@pytest.mark.parametrize("streamed", [True, False])
def test_delete_before_the_first_token(server: Server, streamed: bool) -> None:
    stream, _ = filled(server, "before")
    with server.frozen_scheduler():
        call = begin_generate(server, stream, LONG, stream=streamed)
        server.handled()
        deleting = begin(server, "DELETE", f"/v1/streams/{stream}")
        server.handled()
    assert deleting.answer()[0] == 200
    status, answer = call.answer()
    assert (status, answer["error"]["code"]) == (404, "stream_not_found")
    assert_deleted(server, stream)
    server.flush()


def test_delete_during_the_answer(server: Server) -> None:
    """What was said stays said; the last event is the error."""
    stream, _ = filled(server, "during")
    call = begin_generate(server, stream, LONG)
    call.next_event()
    assert server.delete(stream).status_code == 200
    while "error" not in call.events[-1]:
        assert call.next_event() is not None
    assert call.events[-1]["error"]["code"] == "stream_not_found"
    assert call.next_event() is None
    assert_deleted(server, stream)
    server.flush()


def test_delete_after_the_answer(server: Server) -> None:
    stream, _ = filled(server, "done")
    assert len(token_ids(server.generate(stream))) == 8
    assert server.delete(stream).status_code == 200
    assert_deleted(server, stream)


def test_a_deleted_stream_leaves_its_neighbour_alone(server: Server) -> None:
    """They share a prefix, which the neighbour's KV goes on holding."""
    shared = ids("shared", 300)
    stream, neighbour = server.open(input_ids=shared), server.open(input_ids=shared)
    for name in (stream, neighbour):
        ok(server.append(name, 1, ids("own", 100)), 202)
    assert server.delete(stream).status_code == 200
    answer = server.generate(neighbour, last_seq=1)
    assert token_ids(answer) == server.cold([*shared, *ids("own", 100)]).tokens


# --- the form of an answer --------------------------------------------------------------------


def test_events_and_whole_answers_say_the_same(server: Server) -> None:
    """The events of a chat, put together, are its answer in one piece."""
    opening = {"messages": [{"role": "system", "content": "Be brief."}]}
    streams = [server.open(**opening) for _ in range(2)]
    for stream in streams:
        ok(server.append(stream, 1, chunks=["Some pages."]), 202)
    whole = ok(server.generate(streams[0], 12, question="Well?"))
    call = begin_generate(
        server, streams[1], 12, question="Well?", stream_options={"include_usage": True}
    )
    call.tokens()
    assert call.response.headers["X-Accel-Buffering"] == "no"
    assert call.response.headers["Content-Type"].startswith("text/event-stream")
    first, *_, last, usage = call.events
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    content = "".join(e["choices"][0]["delta"].get("content", "") for e in call.events[:-1])
    assert content == whole["choices"][0]["message"]["content"]
    assert {e["object"] for e in call.events} == {"chat.completion.chunk"}
    assert whole["object"] == "chat.completion"
    for answer in (whole, usage):
        assert answer["usage"]["prompt_tokens"] == len(whole["prompt_token_ids"])
        assert answer["usage"]["stream"]["chunks"] == 1


def test_stop_strings_end_an_answer(server: Server) -> None:
    prompt = ids("stop", 60)
    plain = server.cold(prompt, 12)
    stop = plain.text[len(plain.text) // 2 :][:4]
    stream = server.open(input_ids=prompt)
    answer = ok(server.generate(stream, 12, stop=stop))["choices"][0]
    assert answer["text"] == plain.text[: plain.text.index(stop)]
    assert (answer["finish_reason"], answer["matched_stop"]) == ("stop", stop)
