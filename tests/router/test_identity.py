"""Ids of streams."""

from __future__ import annotations

import re

import pytest

from router.identity import StreamIds, worker_tag
from sglang_stream.errors import StreamNotFound

URL = "http://127.0.0.1:30001"


def test_an_id_tells_its_first_worker_to_every_router_with_the_secret() -> None:
    stream_id = StreamIds("s").new(URL)
    assert re.fullmatch(r"st-[0-9a-f]{40}", stream_id)
    assert StreamIds("s").first_worker(stream_id) == worker_tag(URL)
    assert worker_tag(URL) != worker_tag(URL + "0")


def test_ids_differ() -> None:
    ids = StreamIds(None)
    assert len({ids.new(URL) for _ in range(1000)}) == 1000


@pytest.mark.parametrize("secret", [None, "", "another"])
def test_another_secret(secret: str | None) -> None:
    with pytest.raises(StreamNotFound):
        StreamIds(secret).first_worker(StreamIds("s").new(URL))


def test_no_secret_is_one_too() -> None:
    assert StreamIds(None).first_worker(StreamIds(None).new(URL)) == worker_tag(URL)


def test_any_change_is_noticed() -> None:
    ids = StreamIds("s")
    stream_id = ids.new(URL)
    for at in range(3, len(stream_id)):
        other = "0" if stream_id[at] != "0" else "1"
        with pytest.raises(StreamNotFound):
            ids.first_worker(stream_id[:at] + other + stream_id[at + 1 :])


@pytest.mark.parametrize("bad", ["", "st-", "st-" + "0" * 39, "st-" + "é" * 40, "x" * 5000])
def test_what_is_no_id(bad: str) -> None:
    with pytest.raises(StreamNotFound):
        StreamIds("s").first_worker(bad)


def test_a_line_end_after_an_id_is_no_part_of_it() -> None:
    ids = StreamIds("s")
    with pytest.raises(StreamNotFound):
        ids.first_worker(ids.new(URL) + "\n")
