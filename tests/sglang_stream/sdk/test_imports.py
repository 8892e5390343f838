"""The client needs none of the server's packages."""

import subprocess
import sys

SERVER_PACKAGES = (
    "sglang torch fastapi starlette uvicorn pydantic zmq transformers tokenizers jinja2 numpy"
).split()

SCRIPT = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {SERVER_PACKAGES!r}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Blocked())
from sglang_stream import stream_chat
stream_chat([])
"""


def test_the_sdk_imports_without_the_server() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_package_itself_imports_no_http_client() -> None:
    check = "import sglang_stream, sys; assert 'httpx' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
