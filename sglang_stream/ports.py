"""TCP ports and the addresses that are shown to people."""

from __future__ import annotations

import random
import socket

from sglang_stream.errors import InvalidRequest, WorkerUnavailable

# Below the range from which Linux serves outgoing connections and binds to port 0 (32768 and up):
# a model takes minutes to load, and nothing must take the port in the meantime.
_WORKER_PORTS = range(20000, 30000)
_TRIES = 100


def require_free_port(host: str, port: int) -> None:
    """Raises InvalidRequest, naming the flag at fault, if nothing can listen on `host`:`port`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as e:
        raise InvalidRequest(f"--host {host}: {e.strerror}", param="--host") from e
    with socket.socket(family, kind, protocol) as listener:
        # As a server does: a connection of an earlier run in its last minute is no obstacle.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as e:
            raise InvalidRequest(
                f"--port {port} cannot be used on {host} ({e.strerror}): choose another one",
                param="--port",
            ) from e


def choose_port(host: str = "127.0.0.1") -> int:
    """A port on which nothing listens now. Raises WorkerUnavailable if none is found."""
    for port in random.sample(_WORKER_PORTS, _TRIES):
        try:
            require_free_port(host, port)
        except InvalidRequest:
            continue
        return port
    raise WorkerUnavailable(f"no free port found on {host} from {_WORKER_PORTS.start} upward")


def reachable_url(host: str, port: int) -> str:
    """The address of a server that listens on `host`, as a client on this machine may use it."""
    if host in ("0.0.0.0", ""):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
