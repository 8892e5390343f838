"""A real nginx with the project's configuration, in front of routers that a test has started."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sglang_stream.ports import choose_port
from tests.docker.files import DOCKER

SITE = DOCKER / "nginx" / "sglang-stream.conf"


def nginx_program() -> str | None:
    """Where nginx is installed, None where it is not."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def write_config(folder: Path, port: int, routers: Sequence[str]) -> Path:
    """The project's configuration with other addresses (`HOST:PORT`), and what stands around it.

    All files of that nginx lie in `folder`.
    """
    servers = iter(routers)
    site, placed = re.subn(r"router-\d:30000", lambda _: next(servers), SITE.read_text())
    assert placed == len(routers)
    site = site.replace("listen 8080;", f"listen 127.0.0.1:{port};")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "\n".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(
        f"{user}\ndaemon off;\nworker_processes 2;\npid {folder}/nginx.pid;\n"
        f"error_log {folder}/error.log info;\nevents {{}}\n"
        f"http {{\naccess_log {folder}/access.log;\n{paths}\n{site}\n}}\n"
    )
    return config


@contextlib.contextmanager
def running_nginx(folder: Path, routers: Sequence[str]) -> Iterator[str]:
    """Runs nginx before `routers` (`HOST:PORT`) until the block ends; gives its URL."""
    program = nginx_program()
    assert program is not None
    port = choose_port()
    config = write_config(folder, port, routers)
    process = subprocess.Popen([program, "-c", str(config), "-e", str(folder / "error.log")])
    try:
        _wait_until_it_listens(process, port, folder / "error.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nginx does not listen: {log.read_text() if log.exists() else ''}")
