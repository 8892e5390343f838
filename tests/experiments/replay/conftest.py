from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiments.replay.fake_server import FakeServer
from tests.sglang_stream.sdk.fake_router import serving

SPEC = """\
name = "small"
goodput_ttft_ms = 1000

[workload]
kind = "KIND"
queries = 6
scale = 500
delay = 0.01
output_tokens = 2

[cells]
modes = ["waiting", "streaming"]
policies = ["srpf"]
qps = [50.0]
"""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    with serving(fake.app()) as url:
        fake.url = url
        yield fake


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(SPEC.replace("KIND", "crawler"))
    return path
