"""The synchronous side, against a real local server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_stream import Stream, stream_chat
from sglang_stream.errors import (
    ContextLengthExceeded,
    EngineFailure,
    LimitReached,
    SequenceGap,
    StreamNotFound,
    WorkerUnavailable,
)
from tests.sglang_stream.sdk.fake_router import FakeRouter, failing, lost


def chat(router: FakeRouter, chunks: Any, *args: Any, **options: Any) -> Stream:
    return stream_chat(chunks, *args, base_url=router.url, **options)


def sent(router: FakeRouter, item: Any, calls: int = 1) -> Iterator[Any]:
    """The last item, which ends the iterable only once it was sent in a call of its own."""
    yield item
    router.wait_for(lambda: len(router.of("chunks")) >= calls)


def no_threads_left() -> bool:
    return not any("sglang-stream" in t.name for t in threading.enumerate())


def test_chunks_arrive_in_order_and_the_answer_comes_back(router: FakeRouter) -> None:
    texts = [f"chunk {i}\n" for i in range(50)]
    stream = chat(router, iter(texts), "Why?", max_tokens=5, temperature=0)
    assert "".join(stream) == "Hello, world"

    seen = router.only_stream()
    assert seen.context == texts
    assert seen.opening == {"mode": "append", "messages": []}
    assert [b["seq"] for b in router.contents()] == list(range(1, seen.session.seq + 1))
    (call,) = router.of("generate")
    assert call.body.pop("request_id")
    call.body.pop("last", None)
    assert call.body == {
        "question": "Why?",
        "last_seq": seen.session.seq,
        "stream": True,
        "max_tokens": 5,
        "temperature": 0,
    }
    assert router.of("abort") == []
    assert no_threads_left()


def test_usage_timings_and_the_final_completion(router: FakeRouter) -> None:
    before = time.perf_counter()
    stream = chat(router, ["a"])
    assert stream.usage is None
    assert stream.t0 is None
    assert stream.ttft_s is None
    completion = stream.get_final_completion()
    assert completion["object"] == "chat.completion"
    assert completion["model"] == "fake"
    (choice,) = completion["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello, world"}
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == [3, 4, 5]
    assert stream.usage is not None
    assert stream.usage.prompt_tokens == 9
    assert stream.usage.stream is not None
    assert stream.usage.stream.ready_tokens == 7
    assert stream.usage.stream.router_ttft_ms == 1.5
    assert stream.t0 is not None
    assert stream.sealed_at is not None
    assert stream.first_token_at is not None
    assert before < stream.t0 < stream.sealed_at < stream.first_token_at < time.perf_counter()
    assert stream.ttft_s == stream.first_token_at - stream.t0


def test_t0_is_the_last_item_not_the_end_of_the_iterable(router: FakeRouter) -> None:
    moments: list[float] = []

    def chunks() -> Iterator[str]:
        moments.append(time.perf_counter())
        yield "last"
        moments.append(time.perf_counter())

    stream = chat(router, chunks())
    list(stream)
    assert stream.t0 is not None
    assert moments[0] < stream.t0 < moments[1]


def test_chunks_that_wait_for_a_call_go_in_one(router: FakeRouter) -> None:
    gate = router.gates["chunks"] = threading.Event()

    def chunks() -> Iterator[str]:
        yield "first"
        router.wait_for(lambda: router.of("chunks"))
        yield from (f"next {i}" for i in range(9))
        gate.set()

    list(chat(router, chunks()))
    assert [b["chunks"] for b in router.contents()] == [["first"], [f"next {i}" for i in range(9)]]


def test_sending_goes_on_while_the_iterable_is_waited_for(router: FakeRouter) -> None:
    def chunks() -> Iterator[str]:
        for i in range(3):
            yield f"{i}"
            router.wait_for(lambda i=i: len(router.of("chunks")) == i + 1)

    list(chat(router, chunks()))
    assert [c.body["seq"] for c in router.of("chunks")] == [1, 2, 3]


def test_only_the_newest_list_is_sent(router: FakeRouter) -> None:
    gate = router.gates["context"] = threading.Event()

    def lists() -> Iterator[list[Any]]:
        yield ["a"]
        router.wait_for(lambda: router.of("context"))
        yield ["a", "b"]
        yield ["c", {"id": "d", "text": "D"}]
        gate.set()

    list(chat(router, lists(), "Q", mode="update", order="sticky"))
    assert router.only_stream().opening == {"mode": "update", "order": "sticky", "messages": []}
    assert router.contents() == [
        {"seq": 1, "documents": ["a"]},
        {"seq": 2, "documents": ["c", {"id": "d", "text": "D"}]},
    ]
    assert router.of("generate")[0].body["last_seq"] == 2


def test_the_calls_share_one_warm_connection(router: FakeRouter) -> None:
    list(chat(router, ["a", "b"]))
    assert len({call.port for call in router.calls}) == 1


def test_an_empty_iterable_generates_at_once(router: FakeRouter) -> None:
    stream = chat(router, [], "Q")
    assert "".join(stream) == "Hello, world"
    assert router.of("chunks") == []
    assert router.of("generate")[0].body["last_seq"] == 0
    assert stream.t0 is not None


def test_token_ids_throughout(router: FakeRouter) -> None:
    stream = chat(router, [[1, 2], (3,), [4]], input_ids=range(3), question_ids=[9])
    completion = stream.get_final_completion()
    assert completion["object"] == "text_completion"
    assert completion["choices"][0]["text"] == "Hello, world"
    seen = router.only_stream()
    assert seen.opening == {"mode": "append", "input_ids": [0, 1, 2]}
    assert seen.context == [1, 2, 3, 4]
    assert router.of("generate")[0].body["input_ids"] == [9]


def test_opening_and_sampling_fields_reach_the_server(router: FakeRouter) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    options: dict[str, Any] = {"messages": system, "preamble": "P", "model": "m"}
    sampling: dict[str, Any] = {"ignore_eos": True, "stop": ["x"], "extra_body": {"top_k": 3}}
    list(chat(router, ["a"], idle_timeout_s=7.5, api_key="key", **options, **sampling))
    seen = router.only_stream().opening
    assert seen == {"mode": "append", "idle_timeout_s": 7.5, **options}
    body = router.of("generate")[0].body
    assert (body["ignore_eos"], body["stop"], body["top_k"]) == (True, ["x"], 3)
    assert {c.headers["authorization"] for c in router.calls} == {"Bearer key"}


def test_a_producers_error_drops_the_stream_and_arrives_unchanged(router: FakeRouter) -> None:
    error = OSError("the crawl failed")

    def chunks() -> Iterator[str]:
        yield "a"
        router.wait_for(lambda: router.of("chunks"))
        raise error

    with pytest.raises(OSError, match="the crawl failed") as caught:
        list(chat(router, chunks()))
    assert caught.value is error
    assert len(router.of("abort")) == 1
    assert router.streams == {}
    assert router.of("generate") == []
    assert no_threads_left()


def test_ctrl_c_in_the_producer_drops_the_stream(router: FakeRouter) -> None:
    def chunks() -> Iterator[str]:
        yield "a"
        router.wait_for(lambda: router.of("chunks"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(chat(router, chunks()))
    assert router.streams == {}
    assert no_threads_left()


def test_ctrl_c_while_the_first_token_is_waited_for(router: FakeRouter) -> None:
    router.pace = threading.Semaphore(0)
    main = threading.get_ident()

    def interrupt() -> None:
        router.wait_for(lambda: router.of("generate"))
        signal.pthread_kill(main, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        list(chat(router, ["a"]))
    interrupting.join()
    assert router.streams == {}
    assert no_threads_left()


def test_leaving_early_closes_the_generation(router: FakeRouter) -> None:
    router.pace = threading.Semaphore(1)
    with chat(router, ["a"]) as stream:
        assert next(stream) == "Hel"
    assert len(router.of("abort")) == 1
    router.wait_for(lambda: router.gone)
    assert no_threads_left()
    with pytest.raises(RuntimeError, match="closed before its end"):
        stream.get_final_completion()


def test_a_break_out_of_a_loop_is_enough(router: FakeRouter) -> None:
    router.pace = threading.Semaphore(1)
    for _ in chat(router, ["a"]):
        break
    assert len(router.of("abort")) == 1
    assert no_threads_left()


def test_nothing_is_sent_before_the_first_piece_is_asked_for(router: FakeRouter) -> None:
    with chat(router, ["a"]):
        pass
    assert router.calls == []


def test_a_refusal_ends_a_producer_that_goes_on(router: FakeRouter) -> None:
    router.faults["chunks"].append(failing(413, {"code": "too_large", "message": "too much"}))
    closed = []

    def chunks() -> Iterator[str]:
        try:
            for i in range(1_000_000):
                yield f"{i}"
                time.sleep(0)
        finally:
            closed.append(True)

    with pytest.raises(Exception, match="too much"):
        list(chat(router, chunks()))
    assert closed == [True]
    assert router.streams == {}


@pytest.mark.parametrize(
    ("item", "what"),
    [(7, "of type int"), ([1, "a"], "a list of int and str"), (b"bytes", "of type bytes")],
)
def test_a_bad_item_is_named(router: FakeRouter, item: Any, what: str) -> None:
    with pytest.raises(TypeError, match=f"item 2 is {what}"):
        list(chat(router, ["a", item]))
    assert router.streams == {}


def test_calls_are_repeated_with_the_same_number(router: FakeRouter) -> None:
    router.faults["open"].append(failing(503))
    router.faults["chunks"].extend([lost, failing(502)])
    router.late_faults["chunks"].append(lost)
    assert "".join(chat(router, sent(router, "a"))) == "Hello, world"
    assert [c.body for c in router.of("chunks")] == [{"seq": 1, "chunks": ["a"]}] * 4
    assert router.only_stream().context == ["a"]


def test_a_generation_lost_before_its_first_token_is_asked_for_again(router: FakeRouter) -> None:
    router.faults["generate"].append(lost)
    router.cut_answers = 1
    stream = chat(router, ["a"])
    assert stream.get_final_completion()["choices"][0]["message"]["content"] == "Hello, world"
    bodies = [c.body for c in router.of("generate")]
    assert len(bodies) == 3
    assert bodies[0] == bodies[1] == bodies[2]


def test_the_same_call_is_not_repeated_for_ever(router: FakeRouter) -> None:
    router.faults["chunks"].extend([lost] * 9)
    with pytest.raises(WorkerUnavailable, match="no answer from"):
        list(chat(router, sent(router, "a"), max_retries=2))
    assert len(router.of("chunks")) == 3


def test_a_server_that_is_not_there(router: FakeRouter) -> None:
    with pytest.raises(WorkerUnavailable, match="check the address"):
        list(stream_chat(["a"], base_url="http://127.0.0.1:1", max_retries=1))


def test_an_address_without_a_scheme() -> None:
    with pytest.raises(WorkerUnavailable, match="UnsupportedProtocol"):
        list(stream_chat(["a"], base_url="localhost:1"))


@pytest.mark.parametrize("mode", ["append", "update"])
def test_a_gap_is_filled_from_the_number_expected(router: FakeRouter, mode: Any) -> None:
    def forget() -> None:
        # The server falls back to an older copy, as after the loss of a worker.
        seen = router.only_stream()
        seen.session.__init__(seen.session.stream_id, mode)  # type: ignore[misc]
        seen.context = []

    def items() -> Iterator[Any]:
        for i in range(3):
            yield f"{i}" if mode == "append" else [f"{i}"]
            router.wait_for(lambda i=i: router.applied() == i + 1)

    router.faults["generate"].append(forget)
    list(chat(router, items(), mode=mode))
    seqs = [body["seq"] for body in router.contents()]
    assert seqs == [1, 2, 3, *([1, 2, 3] if mode == "append" else [3])]
    assert router.only_stream().context == (["0", "1", "2"] if mode == "append" else ["2"])
    assert len(router.of("open")) == 1


def test_a_gap_that_cannot_be_filled_is_an_error(router: FakeRouter) -> None:
    gap = {"code": "seq_gap", "message": "gap", "expected_seq": 5}
    router.faults["chunks"].append(failing(409, gap))
    with pytest.raises(SequenceGap):
        list(chat(router, sent(router, "a")))


def test_a_gap_that_never_closes_is_an_error(router: FakeRouter) -> None:
    gap = {"code": "seq_gap", "message": "gap", "expected_seq": 1}
    router.faults["chunks"].extend([failing(409, gap)] * 50)
    with pytest.raises(SequenceGap):
        list(chat(router, sent(router, "a", calls=9)))
    assert len(router.of("chunks")) < 20


@pytest.mark.parametrize("kind", ["chunks", "generate"])
def test_a_lost_stream_is_replayed_in_a_new_one(router: FakeRouter, kind: str) -> None:
    def lose() -> None:
        router.streams.clear()

    def chunks() -> Iterator[str]:
        yield "a"
        router.wait_for(lambda: router.applied() == 1)
        if kind == "chunks":
            router.faults["chunks"].append(lose)
        yield from sent(router, "b", calls=2)

    if kind == "generate":
        router.faults["generate"].append(lose)
    assert "".join(chat(router, chunks())) == "Hello, world"
    assert len(router.of("open")) == 2
    assert router.of("open")[0].body == router.of("open")[1].body
    assert router.only_stream().context == ["a", "b"]


def test_a_stream_is_replayed_once_only(router: FakeRouter) -> None:
    router.faults["generate"].extend([router.streams.clear] * 2)
    with pytest.raises(StreamNotFound):
        list(chat(router, ["a"]))
    assert len(router.of("open")) == 2


def test_retry_after_is_honoured(router: FakeRouter) -> None:
    limit = {"code": "limit_reached", "message": "too many", "retry_after": 1}
    router.faults["open"].append(failing(429, limit, **{"Retry-After": "1"}))
    before = time.perf_counter()
    assert "".join(chat(router, ["a"])) == "Hello, world"
    assert time.perf_counter() - before >= 1


def test_a_long_retry_after_is_the_callers_business(router: FakeRouter) -> None:
    limit = {"code": "limit_reached", "message": "too many"}
    router.faults["open"].append(failing(429, limit, **{"Retry-After": "3600"}))
    with pytest.raises(LimitReached) as caught:
        list(chat(router, ["a"]))
    assert caught.value.retry_after == 3600


def test_an_error_in_the_middle_of_the_answer(router: FakeRouter) -> None:
    router.break_answer = {"code": "engine_failure", "message": "the worker died"}
    stream = chat(router, ["a"])
    assert next(stream) == "Hel"
    with pytest.raises(EngineFailure, match="the worker died"):
        next(stream)
    assert router.streams == {}


def test_a_refused_generation(router: FakeRouter) -> None:
    refusal = {"code": "context_length_exceeded", "message": "too long: shorten it"}
    router.faults["generate"].append(failing(400, refusal))
    with pytest.raises(ContextLengthExceeded, match="shorten it"):
        list(chat(router, ["a"]))
    assert router.streams == {}


def test_arguments_without_a_meaning(router: FakeRouter) -> None:
    with pytest.raises(ValueError, match="at most one of messages"):
        chat(router, ["a"], prompt="p", messages=[])
    with pytest.raises(ValueError, match="at most one of question"):
        chat(router, ["a"], "q", question_ids=[1])
    with pytest.raises(ValueError, match="preamble"):
        chat(router, ["a"], prompt="p", preamble="x")
    with pytest.raises(ValueError, match="mode='update'"):
        chat(router, ["a"], order="sticky")
    with pytest.raises(ValueError, match="mode is"):
        chat(router, ["a"], mode="both")
    with pytest.raises(ValueError, match="order is"):
        chat(router, ["a"], mode="update", order="best")
    with pytest.raises(TypeError, match="one text"):
        chat(router, "a")
