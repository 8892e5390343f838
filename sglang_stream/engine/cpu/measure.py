"""Times our attention against SGLang's `torch_native` on one model, in one process.

`python -m sglang_stream.engine.cpu.measure --dtype float32` prints one JSON object a line. Both
backends run on the same model runner, pool and batch, in turn, so that a busy machine slows both.
Set `OMP_NUM_THREADS=1` for one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sglang.benchmark.one_batch import TreeCacheNamespace, load_model
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_stream.engine.cpu.attention import CpuAttentionBackend
from sglang_stream.engine.cpu.tiny_model import default_tiny_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", type=Path, help="default: the small model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--new", type=int, default=128, help="new tokens of the extend forward")
    parser.add_argument("--cached", type=int, default=8192, help="tokens cached before them")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        runner = _load(options.model_path or default_tiny_model(), options.dtype)
        rows = list(measure(runner, options.new, options.cached, options.repeats))
    for row in rows:
        print(json.dumps({"dtype": options.dtype, "threads": torch.get_num_threads(), **row}))


@torch.inference_mode()
def measure(runner: Any, new: int, cached: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of `part` ("attention", one layer's call, or "forward", the model's), `phase`
    ("extend" or "decode"), `new` and `cached` tokens, the times of `ours` and `stock` in seconds,
    and the largest `difference` of their results over the largest value.
    """
    backends = {"ours": CpuAttentionBackend(runner), "stock": TorchNativeAttnBackend(runner)}
    runner.attn_backend = backends["ours"]
    request, batch = _new_request(runner, cached + new)
    _forward(runner, _extend(runner, request, batch, 0, cached))

    extend = _extend(runner, request, batch, cached, cached + new)
    size = {"new": new, "cached": cached}
    yield {"part": "attention", "phase": "extend", **size} | _compare(
        _attention_calls(runner, backends, extend, new), repeats
    )
    yield {"part": "forward", "phase": "extend", **size} | _compare(
        {n: _forward_call(runner, b, extend) for n, b in backends.items()}, repeats
    )

    batch.input_ids = torch.tensor([1])
    batch.prepare_for_decode()
    decode = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
    size = {"new": 1, "cached": cached + new}
    yield {"part": "attention", "phase": "decode", **size} | _compare(
        _attention_calls(runner, backends, decode, 1), repeats
    )
    yield {"part": "forward", "phase": "decode", **size} | _compare(
        {n: _forward_call(runner, b, decode) for n, b in backends.items()}, repeats
    )


def _load(model_path: Path, dtype: str) -> Any:
    args = ServerArgs(model_path=str(model_path), dtype=dtype, max_running_requests=1)
    bench, _ = load_model(args, PortArgs.init_new(args), gpu_id=0, tp_rank=0)
    return bench.torch_runner


def _new_request(runner: Any, length: int) -> tuple[Req, ScheduleBatch]:
    """One request of `length` tokens, and the batch that holds it."""
    vocabulary = runner.model_config.vocab_size
    ids = torch.randint(vocabulary // 2, vocabulary, (length,)).tolist()
    request = Req(
        rid="0",
        origin_input_text="",
        origin_input_ids=array("q", ids),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=8),
    )
    request.logprob_start_len = -1
    cache = TreeCacheNamespace(
        page_size=runner.server_args.page_size,
        device=runner.device,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
    )
    batch = ScheduleBatch.init_new(
        reqs=[request],
        req_to_token_pool=runner.req_to_token_pool,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        tree_cache=cache,
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    return request, batch


def _extend(
    runner: Any, request: Req, batch: ScheduleBatch, cached: int, length: int
) -> ForwardBatch:
    """The forward of the request's tokens [cached, length)."""
    if cached:
        row = runner.req_to_token_pool.req_to_token[request.req_pool_idx]
        request.prefix_indices = row[:cached].to(torch.int64)
    request.full_untruncated_fill_ids = request.origin_input_ids[:length]
    request.set_extend_range(cached, length)
    batch.prepare_for_extend()
    batch.input_ids = batch.prefill_input_ids_cpu
    batch.prefill_input_ids_cpu = None
    return ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)


def _forward(runner: Any, batch: ForwardBatch) -> torch.Tensor:
    return runner.forward(batch).logits_output.next_token_logits


def _forward_call(runner: Any, backend: Any, batch: ForwardBatch) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        runner.attn_backend = runner.decode_attn_backend = backend
        return _forward(runner, batch)

    return call


def _attention_calls(
    runner: Any, backends: dict[str, Any], batch: ForwardBatch, new: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """One layer's attention on random queries, keys and values of the model's shapes."""
    layer = runner.model.model.layers[0].self_attn.attn
    size = layer.head_dim
    q = torch.randn(new, layer.tp_q_head_num * size, dtype=runner.dtype)
    k, v = torch.randn(2, new, layer.tp_k_head_num, size, dtype=runner.dtype)

    def call_of(backend: Any) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with forward_context(ForwardContext(attn_backend=backend)):
                return backend.forward(q, k, v, layer, batch)

        backend.init_forward_metadata(batch)
        return call

    return {name: call_of(backend) for name, backend in backends.items()}


def _compare(calls: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, Any]:
    """Runs the calls in turn, after one warm-up of each."""
    results = {name: call().float() for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    scale = results["stock"].abs().max()
    difference = ((results["ours"] - results["stock"]).abs().max() / scale).item()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**times, "ratio": medians["stock"] / medians["ours"], "difference": difference}


if __name__ == "__main__":
    main()
