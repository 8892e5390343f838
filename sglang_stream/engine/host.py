"""KV of open streams in host memory, out of the way of others until it is wanted again.

Seam used: the copies of SGLang's KV pools (`mem_cache/memory_pool.py`, get_cpu_copy and
load_cpu_copy).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVCache

_GIB = 1 << 30


@dataclass(frozen=True)
class KvCopy:
    """The KV of the first `length` tokens of a prompt. `layers`: for each, its K and V in blocks
    of `block` tokens, as SGLang's pool makes them."""

    layers: list[list[list[Any]]]
    length: int
    block: int

    def after(self, start: int) -> list[list[list[Any]]]:
        """The layers without the first `start` tokens."""
        if start == 0:
            return self.layers
        rest = []
        for blocks in self.layers:
            k, v = (torch.cat([block[part] for block in blocks])[start:] for part in (0, 1))
            steps = range(0, len(k), self.block)
            rest.append([[k[i : i + self.block], v[i : i + self.block]] for i in steps])
        return rest


def can_copy(allocator: Any) -> bool:
    """Whether the pool of `allocator` can be copied."""
    return type(allocator.get_kvcache()).get_cpu_copy is not KVCache.get_cpu_copy


def kv_bytes_per_token(allocator: Any) -> float:
    """Of all layers of this rank."""
    pool = allocator.get_kvcache()
    sizes = pool.get_kv_size_bytes()
    return float((sum(sizes) if isinstance(sizes, tuple) else sizes) / pool.size)


def copy_out(allocator: Any, slots: Any) -> KvCopy | None:
    """The KV in `slots` (int64, one a token) in host memory; None where the pool cannot do it."""
    if not can_copy(allocator):
        return None
    layers = allocator.get_cpu_copy(slots)
    return KvCopy(layers, len(slots), allocator.get_kvcache().cpu_offloading_chunk_size)


def copy_in(allocator: Any, copy: KvCopy, start: int, slots: Any) -> None:
    """Writes the KV of the tokens from `start` on into `slots`."""
    allocator.load_cpu_copy(copy.after(start), slots)


class HostMemory:
    """Copies of streams' KV, within `tokens` tokens together; the oldest copy gives way."""

    def __init__(self, tokens: int) -> None:
        self.capacity = tokens
        self.tokens = 0
        self._copies: OrderedDict[str, KvCopy] = OrderedDict()

    @classmethod
    def for_pool(cls, allocator: Any, gigabytes: float) -> HostMemory:
        """`gigabytes` (GiB) of host memory for the KV of this rank."""
        if not can_copy(allocator):
            return cls(0)
        return cls(int(gigabytes * _GIB / kv_bytes_per_token(allocator)))

    def put(self, stream_id: str, copy: KvCopy) -> list[str]:
        """Keeps a copy; returns whose copies it has dropped for it. It must fit."""
        self.drop(stream_id)
        dropped: list[str] = []
        while self.tokens + copy.length > self.capacity:
            oldest, gone = self._copies.popitem(last=False)
            self.tokens -= gone.length
            dropped.append(oldest)
        self._copies[stream_id] = copy
        self.tokens += copy.length
        return dropped

    def get(self, stream_id: str) -> KvCopy | None:
        return self._copies.get(stream_id)

    def drop(self, stream_id: str) -> None:
        """Forgets a copy, if there is one."""
        copy = self._copies.pop(stream_id, None)
        if copy is not None:
            self.tokens -= copy.length
