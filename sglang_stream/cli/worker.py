"""The command line and the environment that start SGLang with stream support."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sglang_stream.config import ENGINE_VARIABLE, EngineConfig

RADIX_CACHE_BACKEND = "sglang_stream"  # the name under which the plugin registers its prefix cache

# NVIDIA, NVIDIA under WSL 2, AMD, Ascend, Gaudi. Intel's /dev/dri exists on any desktop: its
# owners give --device xpu.
_ACCELERATOR_FILES = ("nvidia[0-9]*", "dxg", "kfd", "davinci[0-9]*", "accel/accel[0-9]*")


def worker_command(
    model_path: str, engine: EngineConfig, sglang_flags: Sequence[str], *, accelerator: bool
) -> tuple[list[str], dict[str, str]]:
    """What to run and what to add to its environment, for one worker.

    `sglang_flags` are handed on as they are; what they do not choose themselves is added. That is
    our prefix cache: the plugin would choose it too, but a plugin that SGLang failed to load
    would be missed in silence, while an unknown cache is refused. And on a machine without an
    `accelerator` it is the device `cpu`, where an idle scheduler must sleep, since it would take
    a core from the others otherwise.
    """
    argv = [sys.executable, "-m", "sglang.launch_server", "--model-path", model_path]
    argv += sglang_flags
    if not gives(sglang_flags, "--radix-cache-backend"):
        argv += ["--radix-cache-backend", RADIX_CACHE_BACKEND]
    if not accelerator and not gives(sglang_flags, "--device"):
        argv += ["--device", "cpu"]
        if not gives(sglang_flags, "--sleep-on-idle"):
            argv.append("--sleep-on-idle")
    return argv, {ENGINE_VARIABLE: engine.to_json()}


def has_accelerator(environment: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether SGLang may find an accelerator here, told from device files without loading torch."""
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(found for pattern in _ACCELERATOR_FILES for found in devices.glob(pattern))


def gives(flags: Sequence[str], name: str) -> bool:
    """Whether a command line has the flag `name`."""
    return any(flag == name or flag.startswith(f"{name}=") for flag in flags)
