"""Calls with as little of a client around them as there can be: one connection, one at a time.

What they take is the server's time. `DirectWorker` goes past the router, to a worker's chunk socket
and to its own `/generate`.
"""

from __future__ import annotations

import http.client
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import zmq

from sglang_stream.errors import WorkerUnavailable, from_fields
from sglang_stream.messages import (
    Abort,
    Append,
    Event,
    Open,
    Query,
    Refused,
    Said,
    SealCall,
    Status,
    decode_said,
    digest,
    encode,
    pack_tokens,
)

_TIMEOUT_S = 60.0
_JSON = {"Content-Type": "application/json"}


class DirectHttp:
    """Calls of one HTTP server over one connection."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._http = http.client.HTTPConnection(
            address.hostname or "", address.port, timeout=_TIMEOUT_S
        )

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The object that answers. Raises the server's error."""
        answer = self._send(method, path, None if body is None else json.dumps(body).encode())
        content = answer.read()
        return dict(json.loads(content)) if content.startswith(b"{") else {}

    def first_event_s(self, path: str, body: Any) -> float:
        """Seconds from a POST to the first event of its answer, all of which is read.

        Raises the error that the server or the first event tells.
        """
        content = json.dumps(body).encode()
        self._http.close()
        self.call("GET", "/v1/models")  # on a new connection: an idle one may just be closing
        began = time.perf_counter()
        answer = self._send("POST", path, content)
        line = answer.readline()
        took = time.perf_counter() - began
        event = json.loads(line.removeprefix(b"data: "))
        answer.read()
        failure = event.get("error")
        if failure is None and (event.get("meta_info") or {}).get("finish_reason"):
            reason = event["meta_info"]["finish_reason"]
            failure = reason if reason.get("type") == "abort" else None
        if failure is not None:
            raise from_fields(failure)
        return took

    def _send(self, method: str, path: str, content: bytes | None) -> http.client.HTTPResponse:
        self._http.request(method, path, content, {} if content is None else _JSON)
        answer = self._http.getresponse()
        if answer.status >= 300:
            text = answer.read().decode(errors="replace")
            raise from_fields({"message": f"{path}: {text}"}, status=answer.status)
        return answer


class DirectWorker:
    """One worker, spoken to as a router does it. `page_size`: of its KV, in tokens."""

    def __init__(self, url: str) -> None:
        self.http = DirectHttp(url)
        server = self.http.call("GET", "/server_info")
        self.page_size = int(server["page_size"])
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(_TIMEOUT_S * 1e3))
        self._socket.connect(server["internal_states"][0]["sglang_stream"]["endpoint"])
        self._calls = itertools.count(1)

    def close(self) -> None:
        self._socket.close()
        self.http.close()

    def open(self, stream_id: str, idle_timeout_s: float) -> None:
        """Opens an append stream without any tokens."""
        self._ask(Open(stream_id, "append", b"", idle_timeout_s))

    def append(self, stream_id: str, seq: int, ids: Sequence[int]) -> None:
        raw = pack_tokens(ids)
        self._ask(Append(stream_id, seq, raw, digest(raw)))

    def abort(self, stream_id: str) -> None:
        self._ask(Abort(stream_id))

    def status(self, stream_id: str) -> Status:
        answer = self._ask(Query(stream_id))
        assert isinstance(answer, Status)
        return answer

    def first_token_s(self, stream_id: str, tail: Sequence[int], max_tokens: int) -> float:
        """Seals a stream; seconds to the first event of its greedy answer."""
        params = {
            "temperature": 0,
            "max_new_tokens": max_tokens,
            "ignore_eos": True,
            "custom_params": SealCall(stream_id, tail=list(tail)).to_custom_params(),
        }
        body = {"input_ids": [0], "stream": True, "sampling_params": params}
        return self.http.first_event_s("/generate", body)

    def _ask(self, event: Event) -> Said:
        """The answer; nothing comes unasked to who has not greeted the worker."""
        self._socket.send_multipart([next(self._calls).to_bytes(8, "big"), encode(event)])
        try:
            answer: Said = decode_said(self._socket.recv_multipart()[-1])
        except zmq.Again:
            raise WorkerUnavailable(f"no answer on the chunk socket in {_TIMEOUT_S:g} s") from None
        if isinstance(answer, Refused):
            raise from_fields({"code": answer.code, "message": answer.message})
        return answer
