"""`supervise` on real small processes, itself in a process of its own that gets the signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from sglang_stream.ports import choose_port

SERVICE = Path(__file__).parent / "fakes" / "service.py"

Start = Callable[..., "subprocess.Popen[str]"]

SUPERVISE = """
import asyncio, json, sys
from pathlib import Path
from sglang_stream.cli.processes import Service, supervise
from sglang_stream.errors import StreamError

specs = json.loads(sys.argv[1])
services = [
    Service(s["name"], [sys.executable, s["script"], str(s["port"]), *s["words"]],
            f"http://127.0.0.1:{s['port']}/health", log=Path(s["log"]), grace_s=s["grace_s"])
    for s in specs
]
say = lambda step: print(step, flush=True)
try:
    asyncio.run(supervise(services, start_timeout_s=float(sys.argv[2]), say=say,
                          on_ready=lambda: say("ready")))
except StreamError as e:
    sys.exit(e.message)
"""


def spec(tmp_path: Path, name: str, *words: str, grace_s: float = 60.0) -> dict[str, object]:
    log = tmp_path / f"{name}.log"
    return {
        "name": name,
        "script": str(SERVICE),
        "port": choose_port(),
        "words": words,
        "log": str(log),
        "grace_s": grace_s,
    }


def run_until(process: subprocess.Popen[str], line: str) -> list[str]:
    """Reads the supervisor's output up to `line`."""
    assert process.stdout is not None
    seen: list[str] = []
    for text in process.stdout:
        seen.append(text.rstrip())
        if seen[-1] == line:
            return seen
    raise AssertionError(f"{line!r} never came: {seen} {process.stderr and process.stderr.read()}")


def members(group_of: set[int]) -> list[int]:
    """Living processes of these process groups (zombies are not)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) in group_of and state != "Z":
                    found.append(int(entry.name))
    return found


def children(process: subprocess.Popen[str]) -> set[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return {int(pid) for pid in text.split()}


def end(process: subprocess.Popen[str], timeout_s: float = 30) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_starts_together_and_stops_in_the_opposite_order(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    specs = [spec(tmp_path, "worker"), spec(tmp_path, "router")]
    process = start("-c", SUPERVISE, json.dumps(specs), "30")
    assert run_until(process, "ready") == [
        "starting the worker",
        "starting the router",
        "waiting for the worker",
        "waiting for the router",
        "ready",
    ]
    groups = children(process)
    assert len(members(groups)) == 2
    process.send_signal(number)
    assert end(process) == (0, "stopping the router\nstopping the worker\n", "")
    assert members(groups) == []


def test_a_group_is_gone_with_its_leader(start: Start, tmp_path: Path) -> None:
    process = start("-c", SUPERVISE, json.dumps([spec(tmp_path, "worker", "family")]), "30")
    run_until(process, "ready")
    groups = children(process)
    assert len(members(groups)) == 3
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0
    assert members(groups) == []


def test_a_stubborn_service_is_killed_after_its_grace(start: Start, tmp_path: Path) -> None:
    worker = spec(tmp_path, "worker", "stubborn", "family", grace_s=0.5)
    process = start("-c", SUPERVISE, json.dumps([worker]), "30")
    run_until(process, "ready")
    groups = children(process)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert end(process)[0] == 0
    assert 0.5 <= time.monotonic() - began < 10
    assert members(groups) == []


def test_a_second_signal_does_not_wait_for_the_grace(start: Start, tmp_path: Path) -> None:
    process = start("-c", SUPERVISE, json.dumps([spec(tmp_path, "worker", "stubborn")]), "30")
    run_until(process, "ready")
    groups = children(process)
    process.send_signal(signal.SIGINT)
    run_until(process, "stopping the worker")
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 0
    assert members(groups) == []


def test_a_signal_ends_the_wait_for_health(start: Start, tmp_path: Path) -> None:
    process = start("-c", SUPERVISE, json.dumps([spec(tmp_path, "worker", "unhealthy")]), "600")
    run_until(process, "starting the worker")
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process)
    assert (code, err) == (0, "")
    assert "ready" not in out


def test_a_death_at_the_start_is_told_with_the_last_log_lines(start: Start, tmp_path: Path) -> None:
    specs = [spec(tmp_path, "worker", "die"), spec(tmp_path, "router")]
    code, out, err = end(start("-c", SUPERVISE, json.dumps(specs), "30"))
    assert code == 1
    assert "ready" not in out
    assert out.splitlines()[-2:] == ["stopping the router", "stopping the worker"]
    assert err.startswith("the worker ended with status 3; the end of its log ")
    assert re.findall(r"log line (\d+)", err) == [str(i) for i in range(10, 30)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_later_death_stops_the_other(start: Start, tmp_path: Path, victim: int) -> None:
    specs = [spec(tmp_path, "worker", "family"), spec(tmp_path, "router")]
    process = start("-c", SUPERVISE, json.dumps(specs), "30")
    run_until(process, "ready")
    groups = children(process)
    with suppress(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{specs[victim]['port']}/die", timeout=10)
    code, _, err = end(process)
    assert code == 1
    assert f"the {specs[victim]['name']} ended with status 3" in err
    assert "log line 29" in err
    assert members(groups) == []


def test_a_death_by_signal_is_named(start: Start, tmp_path: Path) -> None:
    process = start("-c", SUPERVISE, json.dumps([spec(tmp_path, "worker")]), "30")
    run_until(process, "ready")
    os.kill(children(process).pop(), signal.SIGKILL)
    code, _, err = end(process)
    assert code == 1
    assert "the worker was killed by SIGKILL" in err


def test_a_start_that_takes_too_long_fails(start: Start, tmp_path: Path) -> None:
    worker = spec(tmp_path, "worker", "unhealthy")
    process = start("-c", SUPERVISE, json.dumps([worker]), "1.5")
    code, out, err = end(process)
    assert code == 1
    steps = ["starting the worker", "waiting for the worker", "stopping the worker"]
    assert out.splitlines() == steps
    assert "the worker was not healthy in time" in err
    assert "--start-timeout-s" in err
    assert f"service {worker['port']} is up" in err


def test_services_die_with_a_supervisor_that_is_killed(start: Start, tmp_path: Path) -> None:
    specs = [spec(tmp_path, "worker"), spec(tmp_path, "router", "stubborn")]
    process = start("-c", SUPERVISE, json.dumps(specs), "30")
    run_until(process, "ready")
    groups = children(process)
    assert len(members(groups)) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while members(groups):
        assert time.monotonic() < deadline, "the services outlived their supervisor"
        time.sleep(0.01)
