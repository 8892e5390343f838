from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sglang_stream.cli.serve import ServePlan, ready_text, router_command, services
from sglang_stream.config import ENGINE_VARIABLE, EngineConfig, RouterConfig
from sglang_stream.errors import InvalidRequest


def plan(*sglang_flags: str, host: str = "127.0.0.1") -> ServePlan:
    router = RouterConfig(worker_url="http://127.0.0.1:20001", host=host, port=8000)
    engine = EngineConfig(max_streams=7)
    return ServePlan("m", engine, router, sglang_flags, Path("worker.log"), 600.0)


def test_the_worker_starts_first_where_the_router_looks_for_it() -> None:
    worker, router = services(plan("--tp", "2"), {"PATH": "x"})
    assert worker.argv[3:] == (
        "--model-path m --host 127.0.0.1 --port 20001 --tp 2 --radix-cache-backend sglang_stream"
    ).split(" ")
    assert worker.health_url == "http://127.0.0.1:20001/health"
    assert worker.log == Path("worker.log")
    assert worker.env is not None
    assert worker.env["PATH"] == "x"
    assert EngineConfig.from_environment(worker.env[ENGINE_VARIABLE]).max_streams == 7
    assert router.argv[:4] == [sys.executable, "-m", "sglang_stream.cli", "router"]
    assert router.health_url == "http://127.0.0.1:8000/readiness"
    assert router.log is None


def test_a_router_for_all_addresses_is_probed_and_shown_on_this_machine() -> None:
    everywhere = plan(host="0.0.0.0")
    _, router = services(everywhere, {})
    assert router.health_url == "http://127.0.0.1:8000/readiness"
    assert router.argv[router.argv.index("--host") + 1] == "0.0.0.0"
    assert "http://127.0.0.1:8000/v1/streams" in ready_text(everywhere.router)


@pytest.mark.parametrize("flag", ["--api-key", "--ssl-keyfile=x"])
def test_flags_that_would_cut_the_router_off_are_refused(flag: str) -> None:
    with pytest.raises(InvalidRequest, match=flag.partition("=")[0]):
        services(plan(flag, "x"), {})


def test_all_settings_reach_the_router(start: Callable[..., subprocess.Popen[str]]) -> None:
    config = RouterConfig(
        worker_url="http://tell-your-settings",
        host="::1",
        port=0,
        max_open_streams=2,
        max_body_bytes=3,
        max_chunk_bytes=4,
        idle_timeout_s=5.5,
        max_idle_timeout_s=6.5,
        resume_grace_s=7.5,
    )
    defaults = msgspec.structs.asdict(RouterConfig(worker_url=""))
    assert all(v != defaults[k] for k, v in msgspec.structs.asdict(config).items())
    out, _ = start(*router_command(config)[1:]).communicate(timeout=60)
    assert msgspec.json.decode(out, type=RouterConfig) == config
