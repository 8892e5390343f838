"""The end of the server, after all other tests here."""

from __future__ import annotations

import httpx
import psutil
import pytest

from tests.end_to_end.server import LEAKS, Server, begin_generate
from tests.end_to_end.texts import ids

STOP_TIMEOUT_S = 90


def test_sigterm_lets_answers_end_and_leaves_nothing(server: Server) -> None:
    prompt = ids("last", 60)
    expected = server.cold(prompt, 60).tokens
    stream, idle = server.open(input_ids=prompt), server.open(input_ids=prompt)
    processes = server.processes()
    assert len(processes) >= 5  # serve, router, worker, its scheduler and its detokenizer
    call = begin_generate(server, stream, 60)
    assert call.next_event()
    server.process.terminate()
    assert call.tokens() == expected
    assert server.process.wait(STOP_TIMEOUT_S) == 0, server.tail()
    assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/v1/streams/{idle}")
    for path in (server.log, server.output):
        text = path.read_text(errors="replace")
        assert [word for word in LEAKS if word in text] == [], server.tail()
