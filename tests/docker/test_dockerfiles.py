"""The Dockerfiles: linted, and checked against pyproject.toml and the sources."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.docker.files import DOCKERFILES, ROOT, exposed, json_line, values

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
each_image = pytest.mark.parametrize("role", DOCKERFILES)


@each_image
def test_hadolint_finds_nothing(role: str) -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"
    linted = subprocess.run([program, DOCKERFILES[role]], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@each_image
def test_what_is_copied_exists_and_is_in_the_context(role: str) -> None:
    allowed = set(re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = re.findall(r"^COPY (.*) \S+$", DOCKERFILES[role].read_text(), re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    assert sources <= allowed
    assert all((ROOT / name).exists() for name in sources)


@each_image
def test_the_extras_exist(role: str) -> None:
    text = DOCKERFILES[role].read_text()
    [extra] = re.findall(r'"\.\[(\w+)\]"', text)
    needed = PROJECT["optional-dependencies"].get(extra)
    assert needed is not None, f'pyproject.toml has no extra "{extra}"'
    heavy = [line for line in needed if line.startswith(("torch", "sglang", "flashinfer"))]
    assert bool(heavy) == (role == "worker")


def test_the_engine_is_the_one_asked_for() -> None:
    [pin] = [line for line in PROJECT["optional-dependencies"]["server"] if "sglang==" in line]
    version = pin.partition("==")[2]
    assert f"lmsysorg/sglang:v{version} " in DOCKERFILES["worker"].read_text()


@each_image
def test_it_runs_as_a_user_of_its_own_and_listens_as_it_says(role: str) -> None:
    text = DOCKERFILES[role].read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001"]
    entry = json_line(DOCKERFILES[role], "ENTRYPOINT")
    ports = {int(word) for flag in ("--port", "--stream-port") for [word] in values(entry, flag)}
    assert ports <= exposed(role)
    hosts = [words for flag in ("--host", "--stream-host") for words in values(entry, flag)]
    assert hosts == [["0.0.0.0"]] * len(ports)


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server that answers GET /health with `status`, and 404 elsewhere: its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@each_image
@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_tells_good_from_bad(role: str, status: int) -> None:
    [_, option, code] = json_line(DOCKERFILES[role], r"  CMD")
    [port] = values(json_line(DOCKERFILES[role], "ENTRYPOINT"), "--port")[0]
    assert f"'127.0.0.1', {port}," in code
    with answering(status) as real:
        checked = subprocess.run([sys.executable, option, code.replace(port, str(real))])
    assert checked.returncode == (status != 200)
