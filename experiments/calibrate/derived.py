"""Profiles of machines that were not measured, from data sheets and first principles.

`python -m experiments.calibrate.derived` writes those that come with the package again.

    prefill   operations of the layers and of attention, at assumed shares of the peak
    swaps     KV of a token through PCIe, at an assumed share of its rate
    decode    the weights, then the KV of all context, read at an assumed share of the memory's rate
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.calibrate.fitting import PASS_MS_SOURCE, pass_ms_for
from sglang_stream import config
from sglang_stream.config import Figure, Profile
from sglang_stream.policy.cost import Copying, Decode, Prefill

FOLDER = Path(config.__file__).parent / "profiles"

# Shares of a peak that are sustained: assumptions.
_ATTENTION = 0.78  # of what the layers sustain
_MEMORY = 0.8
_PCIE = 0.8
_POOL = 0.8  # of the memory, as in Stream2LLM's experiments
_WORK_GB = 4.0  # of one GPU: activations, graphs, the libraries
_COPY_BASE_S = 1e-3  # 64 gathers and copies (K and V of 32 layers) of about 15 us
_REQUEST_S = 3e-5  # of a decode step: sampling and bookkeeping

_PAPER = "Stream2LLM, MLSys 2026, arXiv 2604.16395"


@dataclass(frozen=True)
class Model:
    """The figures of a model's config.json that matter here; 2 bytes a parameter."""

    name: str = "Llama-3.1-8B"
    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256

    @property
    def layer_params(self) -> int:
        """Of all layers: what each prompt token goes through."""
        attention = 2 * self.hidden * (self.hidden + self.kv_heads * self.head_dim)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def weight_bytes(self) -> int:
        return 2 * (self.layer_params + 2 * self.vocab * self.hidden)

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


@dataclass(frozen=True)
class Machine:
    """A data sheet's figures of one GPU, and what is assumed of it.

    `sustained`: the share of the dense bfloat16 peak in prefill. `launch_s`: of a forward outside
    CUDA graphs, of a captured decode step `graph_s`, all-reduces included. `call_s`: see
    `config.Profile.call`.
    """

    name: str
    title: str
    gpus: int
    peak_tflops: float
    memory_gb: float
    memory_gb_s: float
    pcie: str
    pcie_gb_s: float
    sustained: float
    launch_s: float
    graph_s: float
    sheet: str
    check: str = ""
    call_s: float | None = None


_H200 = "NVIDIA H200 data sheet (SXM): BF16 1,979 TFLOPS with sparsity, half of it dense"
_H100 = "NVIDIA H100 data sheet (SXM): BF16 1,979 TFLOPS with sparsity, half of it dense"
_A40 = "NVIDIA A40 data sheet: BF16 tensor 149.7 TFLOPS dense"
_FIT = f"fitted to the TTFT of {_PAPER}, 2x H200, crawler, as simulated"
_CHECK = (
    f" Share and launches are {_FIT}: P50 and P95 without streaming at 0.5 to 4 queries a second, "
    "2,048 tokens an iteration. Alone the median prompt of 5,749 tokens takes {p50:.3f} s here, "
    "that of 28,372 tokens (P95) {p95:.2f} s."
)

MACHINES = (
    Machine("h200-tp2", "2x NVIDIA H200 SXM, tensor parallel 2", 2, 989.5, 141, 4800,
            "Gen5 x16", 64, 0.59, 2e-3, 1.5e-3, _H200, _CHECK, 9e-3),
    Machine("h200", "NVIDIA H200 SXM", 1, 989.5, 141, 4800,
            "Gen5 x16", 64, 0.5, 2e-3, 1e-3, _H200),
    Machine("h100-tp2", "2x NVIDIA H100 SXM, tensor parallel 2", 2, 989.5, 80, 3350,
            "Gen5 x16", 64, 0.45, 3e-3, 1.5e-3, _H100),
    Machine("a40", "NVIDIA A40", 1, 149.7, 48, 696,
            "Gen4 x16", 32, 0.5, 2e-3, 1e-3, _A40),
)  # fmt: skip


def derive(machine: Machine, model: Model) -> Profile:
    """The profile of a machine with a model on it."""
    gpus = machine.gpus
    read_s = model.weight_bytes / (gpus * machine.memory_gb_s * 1e9 * _MEMORY)
    prefill = _prefill(machine, model, read_s)
    copying = Copying(_COPY_BASE_S, model.kv_bytes / (gpus * machine.pcie_gb_s * 1e9 * _PCIE))
    decode = Decode(
        read_s + machine.graph_s,
        _REQUEST_S,
        model.kv_bytes / (gpus * machine.memory_gb_s * 1e9 * _MEMORY),
    )
    pool_bytes = gpus * (_POOL * machine.memory_gb - _WORK_GB) * 1e9 - model.weight_bytes
    copy_source = (
        f"{model.kv_bytes // gpus:,} bytes a token of each GPU through PCIe {machine.pcie}, "
        f"{machine.pcie_gb_s:g} GB/s a direction, of which {_PCIE:.0%} is assumed (pinned memory); "
        f"{_COPY_BASE_S * 1e3:g} ms assumed for 64 gathers and copies"
    )
    return Profile(
        name=machine.name,
        kind="derived",
        machine=machine.title,
        model=model.name,
        dtype="bfloat16",
        pass_ms=Figure(pass_ms_for(prefill.base_s), PASS_MS_SOURCE),
        kv_bytes_per_token=Figure(
            float(model.kv_bytes),
            f"K and V of {model.layers} layers, {model.kv_heads} KV heads of {model.head_dim}, "
            "2 bytes each",
        ),
        kv_tokens=Figure(
            int(pool_bytes / model.kv_bytes),
            f"{_POOL:.0%} of {gpus} x {machine.memory_gb:g} GB (the share of {_PAPER}) less "
            f"{model.weight_bytes / 1e9:.1f} GB of weights and {_WORK_GB:g} GB a GPU assumed for "
            "the rest, over the bytes of a token",
        ),
        prefill=Figure(prefill, _prefill_source(machine, model, prefill, read_s)),
        swap_out=Figure(copying, copy_source),
        swap_in=Figure(copying, copy_source),
        decode=Figure(
            decode,
            f"weights, then the KV of all context, at {_MEMORY:.0%} (assumed) of "
            f"{machine.memory_gb_s:,g} GB/s a GPU; {machine.graph_s * 1e3:g} ms a step and "
            f"{_REQUEST_S * 1e6:g} us a request assumed for launches, sampling and bookkeeping",
        ),
        call=Figure(machine.call_s, f"HTTP, tokenising and detokenising: {_FIT}, streaming's P50")
        if machine.call_s is not None
        else None,
    )


def _prefill(machine: Machine, model: Model, read_s: float) -> Prefill:
    sustained = machine.gpus * machine.peak_tflops * 1e12 * machine.sustained
    return Prefill(
        read_s + machine.launch_s,
        2 * model.layer_params / sustained,
        4 * model.layers * model.hidden / (sustained * _ATTENTION),
    )


def _prefill_source(machine: Machine, model: Model, prefill: Prefill, read_s: float) -> str:
    return (
        f"2 x {model.layer_params / 1e9:.2f}e9 operations a token at {machine.sustained:.0%} "
        f"(assumed) of {machine.gpus} x {machine.peak_tflops:g} TFLOPS ({machine.sheet}); 4 x "
        f"{model.layers} layers x {model.hidden} operations a pair of tokens at "
        f"{machine.sustained * _ATTENTION:.0%} (assumed); base: weights read once, "
        f"{read_s * 1e3:.1f} ms, and {machine.launch_s * 1e3:g} ms assumed for launches."
        + machine.check.format(p50=in_passes(prefill, 5749), p95=in_passes(prefill, 28372))
    )


def in_passes(prefill: Prefill, tokens: int, budget: int = 2048) -> float:
    """Seconds of a prompt that is computed in iterations of at most `budget` tokens."""
    return sum(
        prefill.seconds(min(budget, tokens - start), start) for start in range(0, tokens, budget)
    )


def main() -> None:
    """Writes the profiles that come with the package."""
    FOLDER.mkdir(exist_ok=True)
    for machine in MACHINES:
        profile = derive(machine, Model())
        (FOLDER / f"{machine.name}.json").write_text(profile.to_json())


if __name__ == "__main__":
    main()
