"""curl alone, with the very commands that `serve` prints when it is ready, and the README's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.server import Server
from tests.end_to_end.texts import Prompts

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def run(command: str) -> str:
    """What a command of the shell prints."""
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def events(printed: str) -> list[dict[str, Any]]:
    *data, end = [line for line in printed.splitlines() if line]
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in data]


def commands(server: Server) -> list[str]:
    """The curl commands in what `serve` printed, without the client's progress bar."""
    printed = [line.strip() for line in server.output.read_text().splitlines()]
    return [line.replace("curl ", "curl -s ", 1) for line in printed if line.startswith("curl ")]


def test_the_commands_that_serve_prints(server: Server) -> None:
    to_open, to_append, to_generate = commands(server)
    opened = json.loads(run(to_open))
    assert (opened["object"], opened["mode"], opened["status"]) == ("stream", "append", "open")
    appended = json.loads(run(to_append.replace("ID", opened["id"])))
    assert appended["seq"] == 1
    assert appended["tokens"] > opened["usage"]["prompt_tokens"]
    *pieces, last = events(run(to_generate.replace("ID", opened["id"])))
    assert {event["object"] for event in (*pieces, last)} == {"text_completion"}
    assert "".join(piece["choices"][0]["text"] for piece in pieces)
    assert last["choices"][0]["finish_reason"] in ("length", "stop")
    assert 0 < last["usage"]["completion_tokens"] <= 64
    assert last["usage"]["prompt_tokens"] > appended["tokens"]
    assert last["usage"]["stream"]["chunks"] == 1


def test_the_same_commands_greedily(server: Server, prompts: Prompts) -> None:
    to_open, to_append, to_generate = commands(server)
    stream = json.loads(run(to_open))["id"]
    run(to_append.replace("ID", stream))
    greedily = to_generate.replace('"max_tokens"', '"temperature": 0, "max_tokens"')
    said = events(run(greedily.replace("ID", stream)))
    pieces = [prompts.text({"prompt": "Pages:"}, "", ""), "...", "..."]
    prompt = [t for piece in pieces for t in prompts.encode(piece)]
    assert said[-1]["usage"]["prompt_tokens"] == len(prompt)
    text = "".join(event["choices"][0]["text"] for event in said)
    assert text == server.cold(prompt, 64).text


def test_abort(server: Server) -> None:
    to_open, to_append, _ = commands(server)
    stream = json.loads(run(to_open))["id"]
    run(to_append.replace("ID", stream))
    url = f"{server.url}/v1/streams/{stream}"
    assert json.loads(run(f"curl -s -X DELETE {url}"))["deleted"] is True
    assert run(f"curl -s -o /dev/null -w '%{{http_code}}' {url}") == "404"
    assert json.loads(run(f"curl -s {url}"))["error"]["code"] == "stream_not_found"
    assert json.loads(run(f"curl -s {server.url}/v1/streams"))["data"] == []


def test_the_commands_of_the_readme(server: Server, prompts: Prompts) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = re.findall(r"```sh\n(URL=[^`]*)```", readme)
    names, to_open, *to_append, to_generate, to_abort = block.strip().splitlines()
    setting = names.replace("http://localhost:30000", server.url)

    def call(command: str, stream: str = "") -> str:
        return run(f"{setting}; ID={stream}; {command.replace('curl ', 'curl -s ', 1)}")

    streams = [str(json.loads(call(to_open))["id"]) for _ in range(2)]
    for command in to_append:
        accepted = [json.loads(call(command, stream)) for stream in streams]
        assert accepted[0] == accepted[1]
    assert accepted[0]["seq"] == len(to_append)
    said = events(call(to_generate, streams[0]))
    assert {event["object"] for event in said} == {"chat.completion.chunk"}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in said)
    assert said[-1]["usage"]["stream"]["chunks"] == len(to_append)
    assert json.loads(call(to_abort, streams[1]))["deleted"] is True
    assert server.look(streams[1]).status_code == 404
