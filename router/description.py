"""What a worker is: by its HTTP server, and by the greeting at its chunk socket.

Seam used: `/health`, `/server_info` and `/v1/models` of SGLang 0.5.17.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from sglang_stream.errors import WorkerUnavailable
from sglang_stream.messages import Role, Welcome

_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class WorkerInfo:
    """What a ready worker is. `context_len`: prompt and answer together, in tokens.

    `incremental`: whether each event of its answers holds the new tokens only, or all so far.
    `bootstrap_port`: where a prefill worker is met by decode workers. `pid`: of a worker that
    `serve` has started. `server`: SGLang's own description of the server.
    """

    worker_id: str
    role: Role
    model: str
    context_len: int
    vocab_size: int
    kv_tokens: int
    incremental: bool
    bootstrap_port: int
    pid: int | None
    server: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """What the HTTP server of a worker says. `endpoint`: of its chunk socket, as it is reached from
    here; `server`, `pid`: see `WorkerInfo`."""

    endpoint: str
    model: str
    context_len: int
    pid: int | None
    server: dict[str, Any]

    def welcomed(self, welcome: Welcome, bootstrap_port: int | None) -> WorkerInfo:
        """The worker with what its scheduler says; `bootstrap_port`: the operator's word for it."""
        server = self.server
        return WorkerInfo(
            worker_id=welcome.worker_id,
            role=welcome.role,
            model=self.model,
            context_len=self.context_len,
            vocab_size=welcome.vocab_size,
            kv_tokens=welcome.kv_tokens,
            incremental=bool(server.get("incremental_streaming_output")),
            bootstrap_port=bootstrap_port or server["disaggregation_bootstrap_port"],
            pid=self.pid,
            server=server,
        )


async def describe(http: httpx.AsyncClient, url: str) -> Description:
    """Asks the worker at `url`. Raises WorkerUnavailable if it is none, or is not ready."""
    await _get(http, url, "/health")  # SGLang answers 503 until it is warm
    server = await _get(http, url, "/server_info")
    stream_support = (server.get("internal_states") or [{}])[0].get("sglang_stream")
    if not stream_support:
        raise WorkerUnavailable(
            f"the worker at {url} runs without stream support: start it with `sglang-stream worker`"
        )
    card = (await _get(http, url, "/v1/models"))["data"][0]
    return Description(
        endpoint=_reachable(stream_support["endpoint"], urlsplit(url).hostname or ""),
        model=card["id"],
        context_len=card["max_model_len"],
        pid=stream_support.get("pid"),
        server=server,
    )


def lost(url: str, error: httpx.TransportError) -> WorkerUnavailable:
    """The error for a connection that failed."""
    return WorkerUnavailable(
        f"the connection to the worker at {url} failed ({type(error).__name__}: {error})",
        retry_after=1,
    )


async def _get(http: httpx.AsyncClient, url: str, path: str) -> dict[str, Any]:
    try:
        answer = await http.get(url + path, timeout=_PROBE_TIMEOUT_S)
    except httpx.ConnectError as e:
        raise WorkerUnavailable(f"there is no worker at {url} ({e})") from e
    except httpx.TransportError as e:
        raise lost(url, e) from e
    if not answer.is_success:
        raise WorkerUnavailable(
            f"the worker at {url} is not ready: {path} answered {answer.status_code}"
        )
    return msgspec.json.decode(answer.content, type=dict[str, Any]) if answer.content else {}


def _reachable(endpoint: str, host: str) -> str:
    """A worker that listens everywhere is reached where its HTTP server is."""
    return endpoint.replace("//0.0.0.0:", f"//{host}:").replace("//*:", f"//{host}:")
