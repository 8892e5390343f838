"""Ids of streams: signed, of one length, and telling which worker was the first to hold them.

    st-[worker, 8 hex][random, 16 hex][signature, 16 hex]

Routers that share a secret accept each other's ids, so any of them can serve the next call.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from secrets import token_hex

from sglang_stream.errors import StreamNotFound

_ID = re.compile(r"st-([0-9a-f]{8})[0-9a-f]{16}[0-9a-f]{16}")
_SIGNED = len("st-") + 8 + 16


def worker_tag(url: str) -> str:
    """What a worker is called in the ids of its streams."""
    return hashlib.blake2b(url.encode(), digest_size=4).hexdigest()


class StreamIds:
    """Makes and checks ids. `secret`: None where routers and clients trust one another."""

    def __init__(self, secret: str | None) -> None:
        self._key = hashlib.blake2b((secret or "").encode(), digest_size=32).digest()

    def new(self, worker_url: str) -> str:
        """An id for a stream that the worker at `worker_url` will hold."""
        unsigned = f"st-{worker_tag(worker_url)}{token_hex(8)}"
        return unsigned + self._signature(unsigned)

    def first_worker(self, stream_id: str) -> str:
        """The tag of the worker that held the stream first. Raises StreamNotFound if no router
        with this secret made the id."""
        match = _ID.fullmatch(stream_id)
        unsigned, signature = stream_id[:_SIGNED], stream_id[_SIGNED:]
        if match is None or not hmac.compare_digest(signature, self._signature(unsigned)):
            raise StreamNotFound(f"stream {stream_id} is unknown: open a new one")
        return match.group(1)

    def _signature(self, unsigned: str) -> str:
        return hashlib.blake2b(unsigned.encode(), key=self._key, digest_size=8).hexdigest()
