"""Sealing: a small `/generate` call becomes the stream's real request.

The call carries one placeholder token and a `messages.SealCall`. The stream's tokens are put in
here, inside the scheduler, so nothing large is sent or tokenised at the seal.
"""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput

from sglang_stream.engine.channel import StreamEvent
from sglang_stream.engine.roles import role_of
from sglang_stream.engine.stream import Stream
from sglang_stream.engine.table import StreamTable
from sglang_stream.engine.tokens import check_tokens
from sglang_stream.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    Malformed,
    StreamError,
    StreamMoved,
)
from sglang_stream.messages import SEAL_KEY, Append, SealCall, Update


def seal_call(request: TokenizedGenerateReqInput) -> SealCall | None:
    """The seal that a received request asks for; None for an ordinary request. Raises Malformed."""
    params = request.sampling_params.custom_params
    if not isinstance(params, dict) or SEAL_KEY not in params:
        return None
    try:
        return msgspec.json.decode(params[SEAL_KEY], type=SealCall)
    except (msgspec.DecodeError, TypeError) as e:
        raise Malformed(f"custom_params.{SEAL_KEY}: {e}") from e


def seal(
    table: StreamTable, call: SealCall, request: TokenizedGenerateReqInput, scheduler: Any
) -> Stream:
    """Seals the stream and gives its tokens to `request`; on an error both stay as they were.

    Raises StreamNotFound, StreamSealed, StreamMoved, SequenceGap, SequenceConflict, Malformed,
    ContextLengthExceeded, InvalidRequest.
    """
    stream = table.get(call.id)
    if call.epoch != stream.epoch:
        raise StreamMoved(
            f"stream {call.id} has moved (epoch {stream.epoch}, not {call.epoch}): fetch it again"
        )
    stream.session.check_seal(call.last_seq)
    tail = array("q", call.tail)
    check_tokens(tail, scheduler.model_config.vocab_size)
    length = len(stream.tokens) + len(tail)
    params = request.sampling_params
    params.max_new_tokens = _checked_max_new(length, params.max_new_tokens, scheduler)
    params.custom_params = {k: v for k, v in params.custom_params.items() if k != SEAL_KEY} or None
    request.input_ids = table.seal(stream, request.rid) + tail
    request.extra_key = stream.namespace
    return stream


def in_order(pulled: list[Any], events: list[Any]) -> list[Any]:
    """The requests that SGLang has pulled and the events that were polled after them, as they are
    to be handled: a seal comes after the chunks that it counts on, which were sent before it.
    """
    calls = [call for request in pulled if (call := _readable_call(request)) is not None]
    seals = {call.id: call.last_seq or 0 for call in calls}
    ends = [end for end, received in enumerate(events, 1) if _counts(received, seals)]
    before = ends[-1] if ends else 0
    return events[:before] + pulled + events[before:]


def _readable_call(request: Any) -> SealCall | None:
    try:
        return seal_call(request) if isinstance(request, TokenizedGenerateReqInput) else None
    except Malformed:
        return None  # refused when it is handled


def _counts(received: Any, seals: dict[str, int]) -> bool:
    """Whether `received` is a chunk of one of the seals."""
    event = received.event if isinstance(received, StreamEvent) else None
    return isinstance(event, Append | Update) and event.seq <= seals.get(event.stream_id, 0)


def check_ordinary(request: TokenizedGenerateReqInput, vocab_size: int) -> None:
    """Keeps an ordinary request with impossible token ids from ending the scheduler.

    Raises InvalidRequest, whose status 400 is the one that SGLang's server turns into an error.
    """
    if request.input_ids is None:
        return
    try:
        check_tokens(array("q", request.input_ids), vocab_size)
    except Malformed as e:
        raise InvalidRequest(e.message, param=e.param) from e


def refuse(scheduler: Any, request: TokenizedGenerateReqInput, error: StreamError) -> None:
    """Answers a request with an error, which the router finds in `meta_info.finish_reason`.

    `sglang_stream_error` holds the error's fields as JSON: SGLang carries flat reasons only.
    """
    reason = {
        "type": "abort",
        "message": error.message,
        "status_code": error.status,
        "sglang_stream_error": msgspec.json.encode(error.to_fields()).decode(),
    }
    abort = AbortReq(rid=request.rid, finished_reason=reason)
    scheduler.ipc_channels.send_to_tokenizer.send_output(abort, request)


def _checked_max_new(length: int, wanted: int | None, scheduler: Any) -> int:
    """The tokens to generate. SGLang would clip a larger number silently; here it is an error."""
    context_len = scheduler.model_config.context_len
    page = scheduler.page_size
    pool = scheduler.max_total_num_tokens - page - 1 - -(-length // page) * page
    if role_of(scheduler) == "prefill" and pool > 0:
        pool = context_len  # what is generated goes into the decode worker's pool
    room = min(context_len - length, pool)
    if length == 0:
        raise InvalidRequest("the prompt is empty: send a chunk or a question before generating")
    if room < 1 or (wanted is not None and wanted > room):
        limit = "the model's context length" if room == context_len - length else "the KV pool"
        raise ContextLengthExceeded(
            f"the prompt has {length} tokens and {wanted or 1} are to be generated, together over "
            f"{limit}: at most {max(room, 0)} can be generated after this prompt",
            param="max_tokens",
        )
    return room if wanted is None else wanted
