"""SGLang on a machine without an accelerator, and without SGLang's compiled CPU kernels.

SGLang asks `activate` (entry point group `sglang.srt.platforms`) in each of its processes. It
answers on a machine where torch finds no accelerator, so that plain `python -m
sglang.launch_server --model-path M` runs there. On other machines either hide the accelerator
(`CUDA_VISIBLE_DEVICES=`), or ask for the platform by SGLang's variable
`SGLANG_PLATFORM=sglang_stream_cpu`. With `SGLANG_USE_CPU_ENGINE=1` SGLang's own CPU engine is
meant, and this one stays away.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

NAME = "sglang_stream_cpu"

MAX_TOTAL_TOKENS = 262_144
"""Size of the KV pool unless a flag says otherwise. SGLang's default, a share of the memory, is
meant for a device's own; here it would take, and fill with zeros, most of the machine's."""

MAX_RUNNING_REQUESTS = 256
"""Likewise: SGLang keeps a row as long as the model's context for each."""

_KEPT_BYTES = 1 << 30


def activate() -> str | None:
    """The platform's dotted name, or None where it is not for this machine."""
    asked = os.environ.get("SGLANG_PLATFORM") == NAME
    other = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or torch.accelerator.is_available()
    if other and not asked:
        return None
    return f"{__name__}.CpuPlatform"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang's `torch_native` path with an attention and a page allocator of our own."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int | None = None) -> str:
        return "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Sets what a CPU needs, and defaults where the user chose nothing.

        Runs in the process that starts the others, before it does. Raises ValueError for an
        attention backend that needs an accelerator.
        """
        if server_args.attention_backend not in (None, "torch_native", "intel_amx"):
            raise ValueError(
                f"--attention-backend {server_args.attention_backend} needs an accelerator: "
                "on a CPU leave the flag out, or give torch_native"
            )
        server_args.device = "cpu"
        server_args.base_gpu_id = 0  # several workers share the one device
        server_args.attention_backend = "torch_native"
        server_args.sampling_backend = "pytorch"
        server_args.disable_custom_all_reduce = True
        if server_args.grammar_backend in (None, "xgrammar"):
            server_args.grammar_backend = "llguidance"  # the other pins memory of a device
        # A scheduler that polls while idle would take a core from the other processes.
        server_args.sleep_on_idle = True
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            server_args.max_total_tokens = MAX_TOTAL_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        if server_args.disaggregation_mode != "null":
            os.environ.setdefault("MC_FORCE_TCP", "1")  # Mooncake looks for RDMA otherwise
            # The overlap schedule sends cached KV early after a CUDA event.
            server_args.disable_overlap_schedule = True
        threading = _threading(server_args.tp_size, os.sched_getaffinity(0))
        for name, value in {**threading, **_memory()}.items():
            os.environ.setdefault(name, value)

    def init_backend(self) -> None:
        from sglang_stream.engine.cpu.install import install

        install()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> Any:
        from sglang_stream.engine.cpu.allocator import build_allocator
        from sglang_stream.engine.cpu.install import check_installed

        check_installed()
        return build_allocator

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False


def _threading(ranks: int, available: set[int]) -> dict[str, str]:
    """Environment of the model's processes: how `ranks` of them use the `available` cores.

    Threads sleep while they wait for one another: spinning ones, OpenMP's default, slow a forward
    several times when other processes want the cores too. Each tensor-parallel rank gets its share
    of the cores; SGLang wants them named (`0,1|2,3`) where there are more ranks than NUMA nodes.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}
    if ranks > 1:
        cores = sorted(available)
        share = max(1, len(cores) // ranks)
        shares = [[cores[(i * share + j) % len(cores)] for j in range(share)] for i in range(ranks)]
        environment["OMP_NUM_THREADS"] = str(share)
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            ",".join(map(str, cores)) for cores in shares
        )
    return environment


def _memory() -> dict[str, str]:
    """Environment of the model's processes: freed tensors stay with the process.

    glibc gives large ones back to the system, and each forward then faults thousands of pages in
    again: the activations of 512 tokens of the small model are 4,608 pages a layer.
    """
    kept = str(_KEPT_BYTES)
    return {"MALLOC_MMAP_THRESHOLD_": kept, "MALLOC_TRIM_THRESHOLD_": kept}
