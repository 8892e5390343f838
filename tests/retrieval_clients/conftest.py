from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.retrieval_clients.webserver import Web


def _serve() -> Iterator[Web]:
    with Web() as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield web
        web.release.set()
        web.shutdown()
        thread.join()


@pytest.fixture
def web() -> Iterator[Web]:
    yield from _serve()


@pytest.fixture
def other_web() -> Iterator[Web]:
    yield from _serve()
