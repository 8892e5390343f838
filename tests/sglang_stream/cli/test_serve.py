from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sglang_stream.cli.serve import (
    ServePlan,
    plan_workers,
    ready_text,
    router_command,
    services,
)
from sglang_stream.config import ENGINE_VARIABLE, EngineConfig, RouterConfig, WorkerAddress
from sglang_stream.errors import InvalidRequest

ONE = (WorkerAddress("http://127.0.0.1:20001", "unified"),)
APART = (
    WorkerAddress("http://127.0.0.1:20001", "prefill", 20002),
    WorkerAddress("http://127.0.0.1:20003", "decode"),
)


def plan(
    *sglang_flags: str, host: str = "127.0.0.1", workers: tuple[WorkerAddress, ...] = ONE
) -> ServePlan:
    router = RouterConfig(workers, host=host, port=8000)
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
    assert not worker.spare


def test_workers_apart() -> None:
    prefill, decode, router = services(plan("--tp", "2", workers=APART), {})
    assert prefill.argv[3:] == (
        "--model-path m --disaggregation-mode prefill --host 127.0.0.1 --port 20001 "
        "--disaggregation-bootstrap-port 20002 --base-gpu-id 0 --tp 2 "
        "--radix-cache-backend sglang_stream"
    ).split(" ")
    assert decode.argv[3:] == (
        "--model-path m --disaggregation-mode decode --host 127.0.0.1 --port 20003 "
        "--base-gpu-id 2 --tp 2 --radix-cache-backend sglang_stream"
    ).split(" ")
    assert [s.name for s in (prefill, decode)] == ["prefill worker 1", "decode worker 2"]
    assert [s.log for s in (prefill, decode)] == [
        Path("worker-prefill-1.log"),
        Path("worker-decode-2.log"),
    ]
    assert prefill.spare
    assert decode.spare
    said = " ".join(router.argv)
    assert "--prefill http://127.0.0.1:20001 20002 --decode http://127.0.0.1:20003" in said


def test_how_many_workers() -> None:
    assert [w.role for w in plan_workers(3, 0, 0)] == ["unified"] * 3
    apart = plan_workers(1, 2, 1)
    assert [w.role for w in apart] == ["prefill", "prefill", "decode"]
    assert len({w.url for w in apart}) == 3
    assert [w.bootstrap_port is not None for w in apart] == [True, True, False]
    for prefill, decode in ((1, 0), (0, 1)):
        with pytest.raises(InvalidRequest, match="need each other"):
            plan_workers(1, prefill, decode)


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
        workers=(
            WorkerAddress("http://tell-your-settings", "unified"),
            WorkerAddress("http://p", "prefill", 8998),
            WorkerAddress("http://d", "decode"),
        ),
        host="::1",
        port=0,
        placement="prefix",
        stream_buffer_gb=1.5,
        worker_wait_s=2.5,
        secret="s",
        api_key_file="keys.txt",
        admin_api_key="a",
        share_prefixes=True,
        max_concurrent_requests=1,
        queue_size=2,
        queue_timeout_secs=3.5,
        request_timeout_secs=4.5,
        cb_failure_threshold=1,
        cb_success_threshold=3,
        cb_timeout_duration_secs=5.5,
        cb_window_duration_secs=6.5,
        retry_max_retries=1,
        retry_initial_backoff_ms=7.5,
        retry_max_backoff_ms=8.5,
        retry_backoff_multiplier=9.5,
        retry_jitter_factor=0.5,
        log_level="debug",
        log_json=True,
        max_open_streams=2,
        max_body_bytes=3,
        max_chunk_bytes=4,
        idle_timeout_s=5.5,
        max_idle_timeout_s=6.5,
        resume_grace_s=7.5,
    )
    defaults = msgspec.structs.asdict(RouterConfig())
    assert all(v != defaults[k] for k, v in msgspec.structs.asdict(config).items())
    process = start(
        *router_command(config)[1:], SGLANG_STREAM_SECRET="s", SGLANG_STREAM_ADMIN_KEY="a"
    )
    out, _ = process.communicate(timeout=60)
    assert msgspec.json.decode(out, type=RouterConfig) == config
