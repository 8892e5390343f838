"""What differs between a unified worker, a prefill worker and a decode worker.

    unified   waiting_queue -> running_batch
    prefill   bootstrap queue -> waiting_queue -> forward -> inflight queue (KV on its way)
    decode    prealloc queue -> transfer queue -> waiting_queue -> running_batch

Seams used: `disaggregation/prefill.py` and `disaggregation/decode.py` of SGLang 0.5.17.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang.srt.disaggregation.prefill import maybe_release_metadata_buffer
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, DisaggregationMode
from sglang.srt.managers.schedule_batch import Req

from sglang_stream.messages import Role

_ROLES: dict[DisaggregationMode, Role] = {
    DisaggregationMode.NULL: "unified",
    DisaggregationMode.PREFILL: "prefill",
    DisaggregationMode.DECODE: "decode",
}


def role_of(scheduler: Any) -> Role:
    return _ROLES[scheduler.disaggregation_mode]


def queued(scheduler: Any) -> Iterator[Req]:
    """The requests that wait and hold no KV of their own yet."""
    yield from scheduler.waiting_queue
    yield from scheduler.grammar_manager.grammar_queue
    match role_of(scheduler):
        case "prefill":
            yield from scheduler.disagg_prefill_bootstrap_queue.queue
        case "decode":
            for waiting in scheduler.disagg_decode_prealloc_queue.queue:
                yield waiting.req


def prepare_pass(scheduler: Any, request: Req) -> bool:
    """Makes a pass that has its size ready for admission; False if it must wait.

    On a prefill worker every request needs a sender for its KV. A pass gets SGLang's fake one,
    which it also uses to warm up; such requests are kept out of the prefix cache unless told
    otherwise.
    """
    if role_of(scheduler) != "prefill":
        return True
    queue = scheduler.disagg_prefill_bootstrap_queue
    request.skip_radix_cache_insert = False
    if not queue.create_sender(request, scheduler.model_config.num_key_value_heads):
        return False
    return bool(queue.finalize_bootstrap(request))


def discard_pass(scheduler: Any, request: Req) -> None:
    """Gives back what `prepare_pass` took for a pass that was not admitted."""
    if role_of(scheduler) == "prefill":
        maybe_release_metadata_buffer(request, scheduler.req_to_metadata_buffer_idx_allocator)


def pass_address(scheduler: Any) -> dict[str, Any]:
    """What a pass gives `Req` for the place that its KV goes to: nowhere."""
    if role_of(scheduler) != "prefill":
        return {}
    return {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": 0}
