from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sglang_stream.cli.worker import has_accelerator, worker_command
from sglang_stream.config import ENGINE_VARIABLE, EngineConfig

START = [sys.executable, "-m", "sglang.launch_server", "--model-path", "m"]
RADIX = ["--radix-cache-backend", "sglang_stream"]


@pytest.mark.parametrize(
    ("flags", "accelerator", "added"),
    [
        ([], True, RADIX),
        ([], False, [*RADIX, "--device", "cpu", "--sleep-on-idle"]),
        (["--tp", "2", "--json", '{"a": 1}'], True, RADIX),
        (["--radix-cache-backend", "other"], True, []),
        (["--radix-cache-backend=other"], True, []),
        (["--device", "cpu"], False, RADIX),
        (["--device=cuda"], False, RADIX),
        (["--sleep-on-idle"], False, [*RADIX, "--device", "cpu"]),
        (["--device-like", "x"], False, [*RADIX, "--device", "cpu", "--sleep-on-idle"]),
    ],
)
def test_only_what_the_flags_do_not_choose_is_added(
    flags: list[str], accelerator: bool, added: list[str]
) -> None:
    argv, _ = worker_command("m", EngineConfig(), flags, accelerator=accelerator)
    assert argv == [*START, *flags, *added]


def test_the_settings_travel_in_the_environment() -> None:
    engine = EngineConfig(host="::1", port=7, max_streams=3, max_prompt_tokens=9, pass_tokens=64)
    _, environment = worker_command("m", engine, [], accelerator=True)
    assert list(environment) == [ENGINE_VARIABLE]
    assert EngineConfig.from_environment(environment[ENGINE_VARIABLE]) == engine


@pytest.mark.parametrize(
    ("files", "environment", "expected"),
    [
        ([], {}, False),
        (["null", "nvidiactl", "dri/renderD128"], {}, False),
        (["nvidia0"], {}, True),
        (["nvidia12"], {"CUDA_VISIBLE_DEVICES": "12"}, True),
        (["nvidia0"], {"CUDA_VISIBLE_DEVICES": ""}, False),
        (["nvidia0"], {"CUDA_VISIBLE_DEVICES": "-1"}, False),
        (["kfd"], {}, True),
        (["dxg"], {}, True),
        (["accel/accel0"], {}, True),
    ],
)
def test_accelerators_are_told_from_device_files(
    tmp_path: Path, files: list[str], environment: dict[str, str], expected: bool
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert has_accelerator(environment, tmp_path) is expected


def test_settings_are_valid_json() -> None:
    _, environment = worker_command("m", EngineConfig(), [], accelerator=True)
    assert json.loads(environment[ENGINE_VARIABLE])["max_prompt_tokens"] is None
