"""The command as a person runs it, with stand-ins for SGLang and for the router's server."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from sglang_stream.ports import choose_port

Start = Callable[..., "subprocess.Popen[str]"]

BASE_INSTALL = """
import sys
for extra in ("sglang", "torch", "transformers", "tokenizers", "fastapi", "uvicorn", "zmq",
              "trafilatura", "protego", "prometheus_client", "pydantic_settings"):
    sys.modules[extra] = None
from sglang_stream.cli import main
sys.argv[0] = "sglang-stream"
main()
"""


def run(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def cli(start: Start, *arguments: str) -> subprocess.Popen[str]:
    return start("-m", "sglang_stream.cli", *arguments, COLUMNS="200")


def ready(process: subprocess.Popen[str]) -> str:
    """Reads the output of `serve` up to its last line of help; its first address."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if "Ctrl-C" in line:
            found = re.search(r"http://\S+:\d+", seen)
            assert found is not None
            return found[0]
    raise AssertionError(seen + (process.stderr.read() if process.stderr else ""))


@pytest.mark.parametrize(
    "command", ["serve", "worker", "router", "tiny-model", "workload", "version", ""]
)
def test_help_needs_the_base_packages_only(start: Start, command: str) -> None:
    code, out, err = run(start("-c", BASE_INSTALL, *command.split(), "--help"))
    assert (code, err) == (0, "")
    assert f"Usage: sglang-stream {command}".rstrip() in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--model-path", "m"),
        ("worker", "--model-path", "m"),
        ("router", "--worker", "http://127.0.0.1:1", "--port", "0"),
        ("tiny-model", "folder"),
        ("demo",),
        ("bench",),
        ("calibrate", "--out", "profile.json"),
        ("progressive",),
    ],
)
def test_a_missing_extra_is_named_in_one_line(start: Start, arguments: tuple[str, ...]) -> None:
    code, _, err = run(start("-c", BASE_INSTALL, *arguments, PYTHONPATH=""))
    assert code == 1
    assert re.fullmatch(r'sglang-stream: .* pip install "sglang-stream\[server.*\]"\n', err)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("serve",), "--model-path"),
        (("serve", "--model-path", "./no/such/folder"), "--model-path ./no/such/folder"),
        (("serve", "--model-path", "m", "--port", "many"), "--port"),
        (("serve", "--model-path", "m", "--max-open-streams", "0"), "--max-open-streams"),
        (("serve", "--model-path", "m", "--worker-log", "/proc/no/log"), "--worker-log"),
        (("serve", "--model-path", ".", "--profile", "h300"), "--profile h300"),
        (("router",), "--worker"),
        (("router", "--worker", "localhost"), "--worker localhost"),
        (("router", "--worker", "http://127.0.0.1:1", "--no-such-flag"), "--no-such-flag"),
    ],
)
def test_errors_name_the_flag(start: Start, arguments: tuple[str, ...], named: str) -> None:
    code, out, err = run(cli(start, *arguments))
    assert code in (1, 2)
    assert named in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("command", ["serve", "router"])
def test_a_port_in_use_is_told_before_anything_starts(start: Start, command: str) -> None:
    needed = {"serve": ("--model-path", "m"), "router": ("--worker", "http://127.0.0.1:1")}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run(cli(start, command, *needed[command], "--port", str(port)))
    assert (code, out) == (1, "")
    assert f"--port {port}" in err
    assert "Traceback" not in err


def test_worker_becomes_sglang_with_the_unknown_flags(start: Start) -> None:
    process = cli(
        start,
        *("worker", "--tp", "2", "--model", "m", "--stream-port", "7", "--host=0.0.0.0"),
        *("--device", "cuda", "--max-open-streams", "5", "-x", "--seed", "-1"),
    )
    code, out, err = run(process)
    assert (code, err) == (0, "")
    seen = json.loads(out)
    assert seen["argv"] == (
        "--model-path m --tp 2 --host=0.0.0.0 --device cuda -x --seed -1 "
        "--radix-cache-backend sglang_stream"
    ).split(" ")
    settings = json.loads(seen["SGLANG_STREAM"])
    assert (settings["port"], settings["max_streams"]) == (7, 5)


def test_serve_says_where_it_is_ready_and_stops_on_ctrl_c(start: Start, tmp_path: Path) -> None:
    log, port = tmp_path / "logs" / "w.log", choose_port()
    process = cli(
        start,
        *("serve", "--model-path", "m", "--port", str(port), "--worker-log", str(log)),
        *("--max-open-streams", "3", "--mem-fraction-static", "0.5", "family"),
    )
    assert ready(process) == f"http://127.0.0.1:{port}"
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/readiness", timeout=10).status == 200
    process.send_signal(signal.SIGINT)
    code, out, err = run(process)
    assert (code, out) == (0, "")
    steps = [" ".join(line.split()[2:]) for line in err.splitlines()[1:]]
    assert steps == [
        "starting the worker",
        "starting the router",
        "waiting for the worker",
        "waiting for the router",
        "stopping the router",
        "stopping the worker",
    ]
    started = json.loads(log.read_text().splitlines()[0])
    assert "--mem-fraction-static 0.5 family" in " ".join(started["argv"])
    assert json.loads(started["SGLANG_STREAM"])["max_streams"] == 3
    require_nothing_listens(port)


def test_serve_takes_a_free_port_for_0_and_a_log_folder_of_its_own(start: Start) -> None:
    process = cli(start, "serve", "--model-path", "m", "--port", "0")
    url = ready(process)
    assert urllib.request.urlopen(f"{url}/readiness", timeout=10).status == 200
    process.send_signal(signal.SIGTERM)
    code, _, err = run(process)
    assert code == 0
    log = Path(err.splitlines()[0].removeprefix("The worker's log is "))
    assert "is up" in log.read_text()
    log.unlink()
    log.parent.rmdir()


def test_serve_fails_with_the_last_log_lines_of_its_worker(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    process = cli(start, "serve", "--model-path", "m", "--port", "0", "--worker-log", str(log))
    ready(process)
    worker = json.loads(log.read_text().splitlines()[0])["argv"]
    with suppress(OSError):
        address = f"http://127.0.0.1:{worker[worker.index('--port') + 1]}/die"
        urllib.request.urlopen(address, timeout=10)
    code, _, err = run(process)
    assert code == 1
    assert f"sglang-stream: the worker ended with status 3; the end of its log {log}:" in err
    assert re.findall(r"log line (\d+)", err) == [str(i) for i in range(10, 30)]
    assert "Traceback" not in err


def require_nothing_listens(port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_version_tells_ours_and_sglangs(start: Start) -> None:
    code, out, _ = run(cli(start, "version"))
    assert code == 0
    assert re.fullmatch(r"sglang-stream \d+\.\d+\.\d+ \(SGLang .*\)\n", out)
