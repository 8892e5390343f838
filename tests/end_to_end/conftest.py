from __future__ import annotations

from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from sglang_stream.engine.cpu.tiny_model import default_tiny_model
from tests.end_to_end.server import Server, running_server
from tests.end_to_end.texts import Prompts


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The one server of all tests here; `test_stop`, the last by its name, ends it."""
    with running_server(tmp_path_factory.mktemp("serve")) as running:
        yield running


@pytest.fixture(scope="package")
def prompts() -> Prompts:
    return Prompts(Tokenizer.from_file(str(default_tiny_model() / "tokenizer.json")))


@pytest.fixture
def empty_cache(server: Server) -> None:
    """For tests that count what was computed."""
    server.flush()


@pytest.fixture(autouse=True)
def _no_stream_and_no_complaint_is_left(server: Server) -> Iterator[None]:
    yield
    if server.process.poll() is None:
        server.drop_streams()
        server.assert_healthy()


@pytest.fixture(autouse=True, scope="module")
def _nothing_runs_in_the_end(server: Server) -> Iterator[None]:
    """After each module; after each test it would take SGLang longer than many tests do."""
    yield
    if server.process.poll() is None:
        server.flush()
