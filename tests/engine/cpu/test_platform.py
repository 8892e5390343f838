from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from sglang.srt.platforms import _load_platform_class
from transformers import AutoModelForCausalLM

from sglang_stream.engine.cpu import platform
from sglang_stream.engine.cpu.platform import CpuPlatform, activate
from sglang_stream.engine.cpu.tiny_model import default_tiny_model


@pytest.fixture
def no_choice(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without an accelerator, and nothing asked for."""
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return monkeypatch


def test_active_without_an_accelerator(no_choice: pytest.MonkeyPatch) -> None:
    name = activate()
    assert name is not None
    assert _load_platform_class(name) is CpuPlatform


def test_inactive_with_an_accelerator(no_choice: pytest.MonkeyPatch) -> None:
    no_choice.setattr(torch.accelerator, "is_available", lambda: True)
    assert activate() is None


def test_active_with_an_accelerator_when_asked_for(no_choice: pytest.MonkeyPatch) -> None:
    no_choice.setattr(torch.accelerator, "is_available", lambda: True)
    no_choice.setenv("SGLANG_PLATFORM", platform.NAME)
    assert activate() is not None


def test_leaves_sglangs_own_cpu_engine_alone(no_choice: pytest.MonkeyPatch) -> None:
    no_choice.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None


def server_args(**values: object) -> SimpleNamespace:
    defaults: dict[str, object] = {
        "attention_backend": None,
        "max_total_tokens": None,
        "mem_fraction_static": None,
        "max_running_requests": None,
        "tp_size": 1,
        "grammar_backend": "xgrammar",
        "disaggregation_mode": "null",
        "disable_overlap_schedule": False,
    }
    return SimpleNamespace(**{**defaults, **values})


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of how threads wait and of who keeps freed memory, and is
    put back afterwards."""
    for name in ("OMP_WAIT_POLICY", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "")
        del os.environ[name]
    return monkeypatch


def test_defaults_are_those_of_a_cpu(waiting: pytest.MonkeyPatch) -> None:
    args = server_args()
    CpuPlatform().apply_server_args_defaults(args)
    assert (args.device, args.attention_backend) == ("cpu", "torch_native")
    assert args.max_total_tokens == platform.MAX_TOTAL_TOKENS
    assert args.max_running_requests == platform.MAX_RUNNING_REQUESTS
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert args.grammar_backend == "llguidance"
    assert not args.disable_overlap_schedule


def test_processes_keep_the_memory_of_freed_tensors(waiting: pytest.MonkeyPatch) -> None:
    code = """
import resource, torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    before = faults()
    torch.ones(12 << 20)
print(faults() - before)
"""
    command = [sys.executable, "-c", code]
    returned = int(subprocess.check_output(command))
    CpuPlatform().apply_server_args_defaults(server_args())
    assert int(subprocess.check_output(command)) < 100 < returned


def test_workers_apart_move_kv_by_tcp_and_without_overlap(waiting: pytest.MonkeyPatch) -> None:
    waiting.setenv("MC_FORCE_TCP", "")
    del os.environ["MC_FORCE_TCP"]
    args = server_args(disaggregation_mode="prefill")
    CpuPlatform().apply_server_args_defaults(args)
    assert os.environ["MC_FORCE_TCP"] == "1"
    assert args.disable_overlap_schedule


def test_what_the_user_chose_stays(waiting: pytest.MonkeyPatch) -> None:
    waiting.setenv("OMP_WAIT_POLICY", "ACTIVE")
    args = server_args(mem_fraction_static=0.5, max_running_requests=7)
    CpuPlatform().apply_server_args_defaults(args)
    assert (args.max_total_tokens, args.max_running_requests) == (None, 7)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_refuses_an_attention_for_accelerators() -> None:
    with pytest.raises(ValueError, match="flashinfer needs an accelerator"):
        CpuPlatform().apply_server_args_defaults(server_args(attention_backend="flashinfer"))


@pytest.mark.parametrize(
    ("ranks", "cores", "threads", "bind"),
    [
        (2, {0, 1}, "1", "0|1"),
        (2, {2, 3, 4, 5, 6}, "2", "2,3|4,5"),
        (4, {0, 1}, "1", "0|1|0|1"),
        (2, {5}, "1", "5|5"),
    ],
)
def test_ranks_share_the_cores(ranks: int, cores: set[int], threads: str, bind: str) -> None:
    environment = platform._threading(ranks, cores)
    assert environment["OMP_NUM_THREADS"] == threads
    assert environment["SGLANG_CPU_OMP_THREADS_BIND"] == bind


def test_a_lost_replacement_is_told_by_name() -> None:
    code = """
from sglang_stream.engine.cpu.install import BACKEND, check_installed, install
from sglang.srt.layers.attention import attention_registry
install()
check_installed()
attention_registry.register_attention_backend(BACKEND)(lambda runner: None)
check_installed()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: sglang-stream's CPU platform did not take effect (att")
    assert "NCCL" not in last


def launch(log: Path, *flags: str) -> tuple[subprocess.Popen[bytes], str]:
    """SGLang's own command on the small model, in a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["-m", "sglang.launch_server", "--model-path", str(default_tiny_model())]
    flags = ("--port", port, "--dtype", "float32", "--max-total-tokens", "20000", *flags)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command, *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, f"http://127.0.0.1:{port}"


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(log.read_text()[-4000:])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((), id="plain"),
        pytest.param(
            ("--device", "cpu", "--page-size", "16", "--tp", "2"),
            id="pages-and-two-ranks",
            marks=pytest.mark.long,
        ),
    ],
)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    process, url = launch(log, *request.param)
    try:
        wait_until_healthy(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_launch_server_answers_as_the_model_should(url: str) -> None:
    """Cold, over a cached prefix, and at once, against Hugging Face's implementation."""
    source = random.Random(0)
    ids = [source.randrange(300, 8192) for _ in range(400)]
    prompts = [ids, ids[:217] + ids[300:360], ids[:33]]
    answers = [
        httpx.post(
            f"{url}/generate",
            json={
                "input_ids": batch,
                "sampling_params": {"temperature": 0, "max_new_tokens": 20},
            },
            timeout=120,
        )
        .raise_for_status()
        .json()
        for batch in ([ids], prompts)
    ]
    cold, (whole, branch, short) = answers[0][0], answers[1]
    assert branch["meta_info"]["cached_tokens"] in (217, 208)

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(default_tiny_model(), dtype=torch.float32)
    for prompt, answer in zip((ids, *prompts), (cold, whole, branch, short), strict=True):
        tokens = torch.tensor([prompt])
        expected = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False
        )
        assert answer["output_ids"] == expected[0, len(prompt) :].tolist()
