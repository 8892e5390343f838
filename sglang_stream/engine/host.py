"""KV of open streams in host memory, out of the way of others until it is wanted again.

With an accelerator the copies overlap with its work. Pages that are given up may be written again
at once, so their KV is first gathered aside on the device:

    scheduler's stream   gather | next forward ...        next forward | put | forward that reads it
    copying stream              '-> to host (pinned)      to device ---'

Seam used: `k_buffer` and `v_buffer` of SGLang's pools (`mem_cache/memory_pool.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch

_GIB = 1 << 30


@dataclass(frozen=True)
class KvCopy:
    """The KV of the first `length` tokens of a prompt: of each buffer of the pool its rows. There
    are more rows where the prompt has changed after the first ones."""

    parts: list[torch.Tensor]
    length: int

    @property
    def rows(self) -> int:
        return len(self.parts[0])


class KvCopier:
    """Copies between a KV pool and host memory."""

    def __init__(self, pool: Any) -> None:
        self._buffers: list[torch.Tensor] = [*pool.k_buffer, *pool.v_buffer]
        self._device = self._buffers[0].device
        self._module = torch.get_device_module(self._device)
        self._stream = None if self._device.type == "cpu" else self._module.Stream()

    @staticmethod
    def can_copy(pool: Any) -> bool:
        """Whether the pool keeps K and V in rows, one a token."""
        return (
            bool(getattr(pool, "k_buffer", None))
            and bool(getattr(pool, "v_buffer", None))
            and not getattr(pool, "use_hnd", False)
        )

    def out(self, slots: torch.Tensor) -> KvCopy:
        """The KV in `slots` (int64, one a token)."""
        return KvCopy([self._to_host(buffer[slots]) for buffer in self._buffers], len(slots))

    def back(self, copy: KvCopy, start: int, slots: torch.Tensor) -> None:
        """Writes the KV of the copy's tokens from `start` on into `slots`."""
        for buffer, part in zip(self._buffers, copy.parts, strict=True):
            buffer[slots] = self._to_device(part[start : copy.length])

    def _to_host(self, gathered: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return gathered
        host = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            host.copy_(gathered, non_blocking=True)
        gathered.record_stream(self._stream)
        return host

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return host
        with self._module.stream(self._stream):
            brought = host.to(self._device, non_blocking=True)
        current = self._module.current_stream()
        current.wait_stream(self._stream)
        brought.record_stream(current)
        return brought


def kv_bytes_per_token(pool: Any) -> float:
    """Of all layers of this rank."""
    sizes = pool.get_kv_size_bytes()
    return float((sum(sizes) if isinstance(sizes, tuple) else sizes) / pool.size)


class HostMemory:
    """Copies of streams' KV, within `tokens` tokens together; the oldest copy gives way."""

    def __init__(self, tokens: int) -> None:
        self.capacity = tokens
        self.tokens = 0
        self._copies: OrderedDict[str, KvCopy] = OrderedDict()

    @classmethod
    def for_pool(cls, pool: Any, gigabytes: float) -> HostMemory:
        """`gigabytes` (GiB) of host memory for the KV of this rank."""
        if not KvCopier.can_copy(pool):
            return cls(0)
        return cls(int(gigabytes * _GIB / kv_bytes_per_token(pool)))

    def put(self, stream_id: str, copy: KvCopy) -> list[str]:
        """Keeps a copy; returns whose copies it has dropped for it. It must fit."""
        self.drop(stream_id)
        dropped: list[str] = []
        while self.tokens + copy.rows > self.capacity:
            oldest, gone = self._copies.popitem(last=False)
            self.tokens -= gone.rows
            dropped.append(oldest)
        self._copies[stream_id] = copy
        self.tokens += copy.rows
        return dropped

    def cut(self, stream_id: str, length: int) -> None:
        """Only the first `length` tokens of a copy are any use; it keeps its place in memory, since
        it may not even have arrived there."""
        self._copies[stream_id] = replace(self._copies[stream_id], length=length)

    def get(self, stream_id: str) -> KvCopy | None:
        return self._copies.get(stream_id)

    def drop(self, stream_id: str) -> None:
        """Forgets a copy, if there is one."""
        copy = self._copies.pop(stream_id, None)
        if copy is not None:
            self.tokens -= copy.rows
