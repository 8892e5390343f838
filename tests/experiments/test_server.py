from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.server import running_server
from sglang_stream.errors import WorkerUnavailable

SERVER = """
import argparse, http.server, os
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ.get("SGLANG_STREAM", "unset").encode())
http.server.HTTPServer(("127.0.0.1", parser.parse_args().port), Handler).serve_forever()
"""

MEASURING = """
import sys, time, httpx
from experiments.server import _running
with _running([sys.executable, sys.argv[1]], [], "/ready", 60, lambda seconds: None) as url:
    print(httpx.get(url).text, flush=True)
    time.sleep(600)
"""


def test_a_server_that_does_not_start_tells_why() -> None:
    with (
        pytest.raises(WorkerUnavailable, match="there is no such folder"),
        running_server("/no-such-model"),
    ):
        raise AssertionError("it started")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_does_not_outlive_its_measurement(tmp_path: Path, number: int) -> None:
    server = tmp_path / "a_server_of_this_test.py"
    server.write_text(SERVER)
    command = [sys.executable, "-c", MEASURING, str(server)]
    environment = {**os.environ, "SGLANG_STREAM": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "unset\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        process.send_signal(number)
        process.wait(60)
    assert not Path(f"/proc/{children[0]}").exists()
