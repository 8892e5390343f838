from __future__ import annotations

import pytest

from sglang_stream.cli.addresses import join_bootstrap_ports, worker_addresses
from sglang_stream.config import WorkerAddress
from sglang_stream.errors import InvalidRequest


def test_a_prefill_worker_may_come_with_its_port() -> None:
    line = "router --prefill http://a 8998 --prefill http://b --port 7 --decode http://c".split()
    joined = join_bootstrap_ports(line)
    assert joined == [
        *("router", "--prefill", "http://a,8998", "--prefill", "http://b"),
        *("--port", "7", "--decode", "http://c"),
    ]
    assert worker_addresses([], ["http://a/,8998", "http://b"], ["http://c"]) == (
        WorkerAddress("http://a", "prefill", 8998),
        WorkerAddress("http://b", "prefill"),
        WorkerAddress("http://c", "decode"),
    )


@pytest.mark.parametrize(
    ("unified", "prefill", "decode", "named"),
    [
        ([], [], [], "--worker"),
        (["localhost"], [], [], "--worker localhost"),
        ([], ["http://a"], [], "--decode"),
        ([], [], ["http://a"], "--prefill"),
        (["http://a", "http://a/"], [], [], "named twice"),
    ],
)
def test_what_is_wrong_is_named(
    unified: list[str], prefill: list[str], decode: list[str], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        worker_addresses(unified, prefill, decode)
