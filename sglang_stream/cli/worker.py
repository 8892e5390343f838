"""The command line and the environment that start SGLang with stream support."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sglang_stream.config import ENGINE_VARIABLE, EngineConfig
from sglang_stream.messages import Role

RADIX_CACHE_BACKEND = "sglang_stream"  # the name under which the plugin registers its prefix cache


def worker_command(
    model_path: str, engine: EngineConfig, sglang_flags: Sequence[str], *, role: Role = "unified"
) -> tuple[list[str], dict[str, str]]:
    """What to run and what to add to its environment, for one worker.

    `sglang_flags` are handed on as they are; our prefix cache is added if they choose none. The
    plugin would choose it too, but a plugin that SGLang failed to load is missed in silence,
    while a cache by an unknown name is refused.
    """
    argv = [sys.executable, "-m", "sglang.launch_server", "--model-path", model_path]
    if role != "unified":
        argv += ["--disaggregation-mode", role]
    argv += sglang_flags
    if not gives(sglang_flags, "--radix-cache-backend"):
        argv += ["--radix-cache-backend", RADIX_CACHE_BACKEND]
    return argv, {ENGINE_VARIABLE: engine.to_json()}


def gives(flags: Sequence[str], name: str) -> bool:
    """Whether a command line has the flag `name`."""
    return any(flag == name or flag.startswith(f"{name}=") for flag in flags)
