"""SGLang's radix tree, with prefixes that streams hold between their chunks.

A stream holds the KV of its computed prefix by a lock on the deepest tree node of that prefix:

    root --[opening]--[page 1]--[page 2]--[page 3]          tokens of the stream ...........
                                             ^ hold.node    |<---- hold.length ---->|

Locked nodes are never evicted and count as `protected_size`, so SGLang's memory checks stay quiet
while streams are idle. Nothing else is held: no request slot, no page outside the tree.
Seams used: `mem_cache/radix_cache.py` of SGLang 0.5.17.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sglang_stream.messages import PREFIX_BLOCK, prefix_blocks

TokenIds = array  # array("q"), the type that SGLang keys its tree with


@dataclass(frozen=True)
class Hold:
    """A locked prefix: its deepest node and its length in tokens, a multiple of the page size."""

    node: Any
    length: int


class Holder(Protocol):
    """Where streams hold the KV of their prefixes."""

    def take(
        self, tokens: TokenIds[int], namespace: str | None, old: Hold | None = None
    ) -> Hold | None:
        """Holds the longest cached prefix of `tokens` in place of `old`; None if there is none."""

    def release(self, hold: Hold | None) -> None:
        """Gives a hold back; its pages stay cached until they are evicted."""

    def prune(self, leaf: Any, keep: Hold | None) -> int:
        """Frees what only a dead branch needs; the tokens freed."""


class NoHolds:
    """The holder of a decode worker, which computes no prompts and keeps no prefixes."""

    def take(
        self, tokens: TokenIds[int], namespace: str | None, old: Hold | None = None
    ) -> Hold | None:
        return None

    def release(self, hold: Hold | None) -> None: ...

    def prune(self, leaf: Any, keep: Hold | None) -> int:
        return 0


@dataclass
class BlockChanges:
    """Prefix blocks (`messages.prefix_blocks`) that came into the tree and that left it."""

    cached: list[bytes]
    evicted: list[bytes]


class StreamRadixCache(RadixCache):
    """RadixCache plus taking, moving and releasing holds, and pruning a dead branch.

    It also keeps the fingerprints of all prefix blocks in the tree, for routers.
    """

    def reset(self) -> None:
        super().reset()  # also called by the constructor
        gone = dict.fromkeys(getattr(self, "blocks", ()), False)
        self._changes: dict[bytes, bool] = getattr(self, "_changes", {}) | gone
        self.blocks: set[bytes] = set()

    def take_block_changes(self) -> BlockChanges:
        """What has changed since the last call."""
        changes, self._changes = self._changes, {}
        return BlockChanges(
            [block for block, cached in changes.items() if cached],
            [block for block, cached in changes.items() if not cached],
        )

    def take(
        self, tokens: TokenIds[int], namespace: str | None, old: Hold | None = None
    ) -> Hold | None:
        """Holds the longest cached prefix of `tokens` in place of `old`.

        Returns None where nothing is cached. The new lock is taken before the old one is released,
        so that shared pages never become evictable in between.
        """
        match = self.match_prefix(MatchPrefixParams(key=RadixKey(tokens, namespace)))
        length = len(match.device_indices)
        hold = Hold(match.last_device_node, length) if length else None
        if hold is not None:
            self.inc_lock_ref(hold.node)
        self.release(old)
        return hold

    def release(self, hold: Hold | None) -> None:
        """Gives a hold back; its pages stay cached until they are evicted."""
        if hold is not None:
            self.dec_lock_ref(hold.node)

    def prune(self, leaf: Any, keep: Hold | None) -> int:
        """Frees the branch from `leaf` upward, up to but not including `keep`'s node.

        Stops at the first node that somebody else holds or that has other children: what another
        stream or request shares stays. Returns the tokens freed. A node that SGLang has evicted
        meanwhile has left the tree, which the walk recognises by its parent's children.
        """
        stop = self.root_node if keep is None else keep.node
        freed = 0
        node = leaf
        while node is not stop and node is not self.root_node:
            parent = node.parent
            child_key = node.key.child_key(self.page_size)
            if node.lock_ref or node.children or parent.children.get(child_key) is not node:
                break
            self.token_to_kv_pool_allocator.free_segment(node.value, start_pos=0)
            freed += len(node.value)
            self._delete_leaf(node)
            self._record_remove_event(node)
            node = parent
        return freed

    def _record_store_event(self, node: Any) -> None:
        super()._record_store_event(node)
        for block in _blocks_ending_in(node):
            self.blocks.add(block)
            self._changes[block] = True

    def _record_remove_event(self, node: Any) -> None:
        super()._record_remove_event(node)
        for block in _blocks_ending_in(node):
            self.blocks.discard(block)
            self._changes[block] = False


def _blocks_ending_in(node: Any) -> list[bytes]:
    """The prefix blocks whose last token lies in `node`.

    root --[ ... ]--[ ... ]--[ node ]      path: the tokens from the root to the end of node
    """
    keys = []
    walk = node
    while walk.parent is not None:
        keys.append(walk.key)
        walk = walk.parent
    end = sum(len(key) for key in keys)
    start = end - len(node.key)
    if start // PREFIX_BLOCK == end // PREFIX_BLOCK:
        return []
    path = np.concatenate(
        [np.frombuffer(array("q", key.token_ids[: len(key)]), np.int64) for key in reversed(keys)]
    )
    blocks = prefix_blocks(path.astype("<i4").tobytes(), node.key.extra_key)
    return blocks[start // PREFIX_BLOCK :]
