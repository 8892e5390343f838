"""The files of `docker/`, read as the tools that use them read them."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import typer
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = {role: DOCKER / f"{role}.Dockerfile" for role in ("worker", "router")}

_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
_FLAG = re.compile(r"--[a-z][a-z0-9-]+")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    return dict(read_yaml(DOCKER / name))


def interpolated(text: str) -> str:
    """`text` as compose reads it where no variable of it is set."""
    return _VARIABLE.sub(lambda m: m[3] if m[2] == "-" else "", text)


def json_line(path: Path, instruction: str) -> list[str]:
    """The words of a Dockerfile's last `instruction` in its JSON form."""
    found = re.findall(rf"^{instruction}\b[^\[]*(\[.*\])$", path.read_text(), re.MULTILINE)
    return [str(word) for word in json.loads(found[-1])]


def exposed(role: str) -> set[int]:
    """The ports that an image says it listens on."""
    [ports] = re.findall(r"^EXPOSE (.*)$", DOCKERFILES[role].read_text(), re.MULTILINE)
    return {int(port) for port in ports.split()}


def command_line(role: str, arguments: str | list[str]) -> list[str]:
    """`sglang-stream ...` as a container of `role`'s image runs it with these arguments."""
    entry = json_line(DOCKERFILES[role], "ENTRYPOINT")
    words = shlex.split(interpolated(arguments)) if isinstance(arguments, str) else arguments
    return [*entry[entry.index("sglang-stream") :], *words]


def values(command: list[str], flag: str) -> list[list[str]]:
    """The words after each `flag`, up to the next flag."""
    found = []
    for i, word in enumerate(command):
        if word == flag:
            end = next((j for j in range(i + 1, len(command)) if command[j][:2] == "--"), None)
            found.append(command[i + 1 : end])
    return found


def assert_flags_exist(command: list[str]) -> None:
    """Fails unless each flag is one of the subcommand's, or one of SGLang's for a worker."""
    program, subcommand, *words = command
    assert program == "sglang-stream"
    known = _own_flags(subcommand) | (_sglang_flags() if subcommand == "worker" else frozenset())
    unknown = {word for word in words if word.startswith("--")} - known
    assert not unknown, f"sglang-stream {subcommand} has no {sorted(unknown)}"


@cache
def _own_flags(subcommand: str) -> frozenset[str]:
    """Those declared, and those its help explains."""
    from sglang_stream.cli import build_app

    group: Any = typer.main.get_command(build_app())
    command = group.commands[subcommand]
    declared = {name for parameter in command.params for name in parameter.opts}
    return frozenset(declared | set(_FLAG.findall(command.help)))


@cache
def _sglang_flags() -> frozenset[str]:
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return frozenset(name for action in parser._actions for name in action.option_strings)
