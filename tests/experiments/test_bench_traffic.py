from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from experiments.bench import traffic
from experiments.bench.traffic import measure, random_prompts, table
from experiments.rows import Row
from sglang_stream.errors import EngineFailure


class Server(ThreadingHTTPServer):
    """Answers `/generate` with the reverse of the prompt's end; notes what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.paths: list[str] = []
        self.prompts: list[list[int]] = []
        self.cached = 0
        self.flush_status = 200


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.server.paths.append(path)
        answer, status = b"{}", self.server.flush_status
        if path == "/generate":
            prompt = json.loads(body)["input_ids"]
            self.server.prompts.append(prompt)
            meta = {"cached_tokens": self.server.cached}
            fields = {"output_ids": prompt[:-33:-1], "meta_info": meta}
            answer, status = json.dumps(fields).encode(), 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        """Silent."""


@pytest.fixture
def servers() -> Iterator[dict[traffic.Server, Server]]:
    both: dict[traffic.Server, Server] = {"plain": Server(), "streams": Server()}
    threads = [threading.Thread(target=server.serve_forever) for server in both.values()]
    for thread in threads:
        thread.start()
    yield both
    for server in both.values():
        server.shutdown()
        server.server_close()
    for thread in threads:
        thread.join()


def run(servers: dict[traffic.Server, Server], rounds: int) -> list[Row]:
    rows: list[Row] = []
    urls = {name: server.url for name, server in servers.items()}
    advanced: list[None] = []
    asyncio.run(measure(urls, 1, rounds, 0, rows.append, lambda: advanced.append(None)))
    assert len(advanced) == traffic.waves_of(rounds)
    return rows


def row(server: str, number: int, speed: float, tokens: Sequence[int] = (1, 2)) -> Row:
    return {
        "bench": "traffic",
        "pair": number % 2,
        "round": 1,
        "wave": number,
        "server": server,
        "tokens_per_s": speed,
        "tokens": [list(tokens)],
    }


def last_line(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    Console(file=file, width=120).print(table(rows))
    return file.getvalue().splitlines()[-2]


def test_prompts_of_a_round() -> None:
    waves = random_prompts("0/1")
    assert waves == random_prompts("0/1") != random_prompts("0/2")
    assert [len(wave) for wave in waves] == [traffic.AT_ONCE] * traffic.WAVES
    prompts = [prompt for wave in waves for prompt in wave]
    assert len({prompt[0] for prompt in prompts}) == len(prompts)
    assert all(200 <= len(prompt) <= 800 for prompt in prompts)


def test_servers_get_the_same_waves_after_a_flush(servers: dict[traffic.Server, Server]) -> None:
    rows = run(servers, rounds=2)
    # The first round is not counted, and who comes first changes.
    assert [(r["pair"], r["round"], r["wave"], r["server"]) for r in rows] == [
        (1, number, wave, server)
        for number in (1, 2)
        for wave in range(traffic.WAVES)
        for server in (("plain", "streams"), ("streams", "plain"))[wave % 2]
    ]
    for server in servers.values():
        one_round = ["/flush_cache", *["/generate"] * traffic.WAVES * traffic.AT_ONCE]
        assert server.paths == one_round * 3
    plain, streams = (server.prompts for server in servers.values())
    assert sorted(plain) == sorted(streams)
    assert rows[0]["tokens"] == rows[1]["tokens"] != rows[2]["tokens"]
    expected = [prompt[:-33:-1] for prompt in random_prompts("0/1/1")[0]]
    assert rows[0]["tokens"] == expected
    assert all(r["tokens_per_s"] * r["seconds"] > traffic.AT_ONCE * 232 for r in rows)


def test_a_cache_that_is_not_empty_is_an_error(servers: dict[traffic.Server, Server]) -> None:
    servers["streams"].cached = 7
    with pytest.raises(EngineFailure, match="cached after a flush"):
        run(servers, rounds=1)
    servers["plain"].flush_status = 400
    with pytest.raises(EngineFailure, match="not emptied"):
        run(servers, rounds=1)


def test_table_pairs_the_waves() -> None:
    """A wave in which the machine was slow for both does not count against either."""
    rows = [
        *(row("plain", n, speed) for n, speed in enumerate((1000, 500, 1000), 1)),
        *(row("streams", n, speed) for n, speed in enumerate((990, 495, 990), 1)),
    ]
    # Rows come in the order of measuring, which changes from wave to wave.
    rows.sort(key=lambda r: (r["wave"], r["server"] if r["wave"] % 2 else r["server"][::-1]))
    line = last_line(rows)
    assert "0.990 (0.990 to 0.990)" in line
    assert "met" in line
    assert "yes" in line
    assert "1,000 (500)" in line


def test_table_shows_a_missed_goal_and_other_tokens() -> None:
    line = last_line([row("plain", 1, 1000), row("streams", 1, 970, [1, 3])])
    assert "MISSED" in line
    assert "in 0 of 1" in line
