from __future__ import annotations

import sys

import pytest

from sglang_stream.cli.worker import worker_command
from sglang_stream.config import ENGINE_VARIABLE, EngineConfig

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
