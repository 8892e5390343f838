"""Passes: SGLang requests that only prefill a slice of an open stream.

A pass is built just before a batch is formed, given its size when its cached prefix is known, and
either admitted to that batch or thrown away: it never stays in a queue, so that an abort or an
update never meets a stale one.

    stream.tokens  |--- cached prefix ---|--- the slice ---|--- later passes ---|
                   0                   start              end            len(tokens)
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_stream.engine.roles import discard_pass, pass_address, prepare_pass
from sglang_stream.engine.stream import Stream

_LOWEST_PRIORITY = 1 << 62


@dataclass(eq=False)
class Ticket:
    """What a pass carries: its scheduler and stream, the most tokens to compute, what it got."""

    scheduler: Any
    stream: Stream
    tokens: int
    ids: array[int]
    start: int = 0


def ticket_of(request: Req) -> Ticket | None:
    """The ticket of a pass; None for every other request."""
    return getattr(request, "stream_ticket", None)


def build_pass(scheduler: Any, stream: Stream, tokens: int, number: int) -> Req:
    """A request that would compute at most `tokens` beyond the cached prefix of `stream`.

    `number` makes its id unique; the id is no prefix of another, since SGLang aborts by prefix.
    """
    ids = stream.tokens[:]
    params = SamplingParams(max_new_tokens=0, temperature=0.0)
    params.normalize(None)
    request = Req(
        f"stream-pass-{number:016x}",
        None,
        ids,
        params,
        vocab_size=scheduler.model_config.vocab_size,
        eos_token_ids=scheduler.model_config.hf_eos_token_id,
        disagg_mode=scheduler.disaggregation_mode,
        extra_key=stream.namespace,
        **pass_address(scheduler),
    )
    request.tokenizer = scheduler.tokenizer
    request.logprob_start_len = -1
    if scheduler.enable_priority_scheduling:
        low = scheduler.schedule_low_priority_values_first
        request.priority = _LOWEST_PRIORITY if low else -_LOWEST_PRIORITY
    request.stream_ticket = Ticket(scheduler, stream, tokens, ids)
    return request


def admit_pass(
    add_one_req: Any, adder: PrefillAdder, request: Req, ticket: Ticket, *args: Any, **kwargs: Any
) -> AddReqResult:
    """Cuts a pass to what fits the batch and admits it, or lets the next request try.

    Sized here because only here its cached prefix is known. A pass that fits whole never becomes
    SGLang's chunked request, and it never answers NO_TOKEN, which would mark the batch full.
    """
    page = adder.page_size
    start = len(request.prefix_indices)
    budget = adder.rem_input_tokens if adder.rem_chunk_tokens is None else adder.rem_chunk_tokens
    # Locking the prefix takes it out of what could be evicted.
    memory = min(adder.rem_total_tokens, adder.cur_rem_tokens) - _unlocked(request) - 2 * page
    room = min(ticket.tokens, int(budget), int(memory))
    end = min(start + room, len(ticket.ids))
    end -= end % page
    if end <= start:
        return AddReqResult.CONTINUE
    ticket.ids = ticket.ids[:end]
    ticket.start = start
    request.origin_input_ids = ticket.ids
    request.full_untruncated_fill_ids = ticket.ids
    if not prepare_pass(ticket.scheduler, request):
        return AddReqResult.CONTINUE
    result = add_one_req(adder, request, *args, **kwargs)
    if request not in adder.can_run_list:
        discard_pass(ticket.scheduler, request)
    return AddReqResult.OTHER if result is AddReqResult.NO_TOKEN else result


def _unlocked(request: Req) -> int:
    """Tokens of the request's cached prefix that nobody has locked yet."""
    node, tokens = request.last_node, 0
    while node.parent is not None and node.lock_ref == 0:
        tokens += len(node.key)
        node = node.parent
    return tokens
