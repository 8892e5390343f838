from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sglang_stream.cli import build_app
from sglang_stream.cli.worker import worker_command
from sglang_stream.config import ENGINE_VARIABLE, EngineConfig, load_profile

START = [sys.executable, "-m", "sglang.launch_server", "--model-path", "m"]
RADIX = ["--radix-cache-backend", "sglang_stream"]


@pytest.mark.parametrize(
    ("flags", "added"),
    [
        ([], RADIX),
        (["--tp", "2", "--json", '{"a": 1}'], RADIX),
        (["--radix-cache-backend", "other"], []),
        (["--radix-cache-backend=other"], []),
        (["--radix-cache-backend-like", "other"], RADIX),
    ],
)
def test_our_prefix_cache_is_added_unless_the_flags_choose_one(
    flags: list[str], added: list[str]
) -> None:
    argv, _ = worker_command("m", EngineConfig(), flags)
    assert argv == [*START, *flags, *added]


def test_the_settings_travel_in_the_environment() -> None:
    engine = EngineConfig(host="::1", port=7, max_streams=3, max_prompt_tokens=9, pass_tokens=64)
    _, environment = worker_command("m", engine, [])
    assert list(environment) == [ENGINE_VARIABLE]
    assert EngineConfig.from_environment(environment[ENGINE_VARIABLE]) == engine


@pytest.mark.parametrize("own_pass_ms", [None, 30.0])
def test_how_streams_are_scheduled_is_told_by_flags(
    own_pass_ms: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, str] = {}
    monkeypatch.setattr(os, "execve", lambda path, argv, env: started.update(env))
    flags = (
        f"worker --model-path {tmp_path} --stream-policy srpf --preemption swap "
        "--stream-host-memory-gb 1.5 --invalidation hard --profile h200"
    ).split()
    pass_flags = [] if own_pass_ms is None else ["--stream-pass-ms", str(own_pass_ms)]
    build_app()([*flags, *pass_flags], standalone_mode=False)
    config = EngineConfig.from_environment(started[ENGINE_VARIABLE])
    profile = load_profile("h200")
    assert (config.policy, config.preemption, config.invalidation) == ("srpf", "swap", "hard")
    assert config.host_memory_gb == 1.5
    assert config.cost == profile.cost
    assert config.pass_ms == (own_pass_ms or profile.pass_ms.value)
