from collections.abc import Iterator

import pytest

from tests.sglang_stream.sdk.fake_router import FakeRouter, serving


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    fake = FakeRouter()
    with serving(fake.app()) as url:
        fake.url = url
        yield fake
        for gate in fake.gates.values():
            gate.set()
        if fake.pace is not None:
            fake.pace.release(1000)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
