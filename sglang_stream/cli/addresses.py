"""The addresses of workers on the command line, as SGLang's gateway takes them."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_stream.config import WorkerAddress
from sglang_stream.errors import InvalidRequest
from sglang_stream.messages import Role

WORKER_FLAGS: dict[Role, str] = {
    "unified": "--worker",
    "prefill": "--prefill",
    "decode": "--decode",
}
_JOINED = ","


def join_bootstrap_ports(arguments: Sequence[str]) -> list[str]:
    """The command line with `--prefill URL PORT` as one value, which no parser takes otherwise."""
    joined: list[str] = []
    for argument in arguments:
        if argument.isdigit() and joined[-2:-1] == ["--prefill"]:
            joined[-1] += _JOINED + argument
        else:
            joined.append(argument)
    return joined


def worker_addresses(
    unified: Sequence[str], prefill: Sequence[str], decode: Sequence[str]
) -> tuple[WorkerAddress, ...]:
    """The workers that the flags name. Raises InvalidRequest, naming the flag at fault."""
    addresses = [
        *(_address(value, "unified") for value in unified),
        *(_address(value, "prefill") for value in prefill),
        *(_address(value, "decode") for value in decode),
    ]
    if not addresses:
        raise InvalidRequest("give the router its workers: --worker, or --prefill and --decode")
    if bool(prefill) != bool(decode):
        raise InvalidRequest("--prefill and --decode need each other: give both")
    urls = [address.url for address in addresses]
    twice = next((url for url in urls if urls.count(url) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"the worker {twice} is named twice")
    return tuple(addresses)


def _address(value: str, role: Role) -> WorkerAddress:
    url, _, port = value.partition(_JOINED)
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(
            f"{WORKER_FLAGS[role]} {url}: give an address such as http://127.0.0.1:30001"
        )
    return WorkerAddress(url.rstrip("/"), role, int(port) if port else None)
