"""What the CPU platform replaces in SGLang, and the check that it did."""

from __future__ import annotations

import functools
from typing import Any

from sglang.srt.distributed import parallel_state
from sglang.srt.layers.attention import attention_registry

BACKEND = "torch_native"


def install() -> None:
    """Puts our parts in. Called once in each process that runs a model, before the model does.

    The attention keeps SGLang's name: code elsewhere takes every name it does not know for a
    backend whose machine has Triton.
    """
    attention_registry.register_attention_backend(BACKEND)(_build_attention)
    group = parallel_state.GroupCoordinator
    group.__init__ = _without_nccl(group.__init__)


def check_installed() -> None:
    """Raises RuntimeError if something else has taken the place of our parts since."""
    attention = attention_registry.ATTENTION_BACKENDS.get(BACKEND)
    init = parallel_state.GroupCoordinator.__init__
    lost = [
        name
        for name, there in (
            (f"attention backend {BACKEND}", attention is _build_attention),
            ("collectives without NCCL", getattr(init, "sglang_stream_cpu", False)),
        )
        if not there
    ]
    if lost:
        raise RuntimeError(
            f"sglang-stream's CPU platform did not take effect ({', '.join(lost)}): is another "
            "SGLang plugin installed that replaces the same?"
        )


def _build_attention(runner: Any) -> Any:
    from sglang_stream.engine.cpu.attention import CpuAttentionBackend

    return CpuAttentionBackend(runner)


def _without_nccl(init: Any) -> Any:
    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        # SGLang passes these by name; the defaults assume that what is no NPU or XPU has NCCL.
        kwargs.update(use_pynccl=False, use_custom_allreduce=False)
        init(self, *args, **kwargs)

    wrapped.sglang_stream_cpu = True  # type: ignore[attr-defined]
    return wrapped
