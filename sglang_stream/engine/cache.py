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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sglang_stream.engine.host import KvCopier, KvCopy
from sglang_stream.messages import PREFIX_BLOCK, prefix_blocks

TokenIds = array  # array("q"), the type that SGLang keys its tree with


@dataclass(frozen=True)
class Hold:
    """A locked prefix: its deepest node and its length in tokens, a multiple of the page size.

    `found`: tokens of it that an update had left behind and that were still there.
    """

    node: Any
    length: int
    found: int = 0


class Holder(Protocol):
    """Where streams hold the KV of their prefixes."""

    def take(
        self, tokens: TokenIds[int], namespace: str | None, old: Hold | None = None
    ) -> Hold | None:
        """Holds the longest cached prefix of `tokens` in place of `old`; None if there is none."""

    def release(self, hold: Hold | None) -> None:
        """Gives a hold back; its pages stay cached until they are evicted."""

    def prune(self, leaf: Any, keep: Hold | None) -> None:
        """Frees what only a dead branch needs."""

    def leave(self, leaf: Any, keep: Hold | None) -> None:
        """Makes what only a dead branch needs the first to be evicted."""

    def copy_out(self, hold: Hold) -> KvCopy | None:
        """The held KV in host memory; None where the pool cannot be copied."""

    def bring_back(
        self, tokens: TokenIds[int], namespace: str | None, copy: KvCopy, old: Hold | None
    ) -> tuple[Hold | None, int]:
        """Holds the prefix that `copy` ends in place of `old`, less if there is no room. Also
        returns the tokens that were copied."""


class NoHolds:
    """The holder of a decode worker, which computes no prompts and keeps no prefixes."""

    def take(
        self, tokens: TokenIds[int], namespace: str | None, old: Hold | None = None
    ) -> Hold | None:
        return None

    def release(self, hold: Hold | None) -> None: ...

    def prune(self, leaf: Any, keep: Hold | None) -> None: ...

    def leave(self, leaf: Any, keep: Hold | None) -> None: ...

    def copy_out(self, hold: Hold) -> KvCopy | None:
        return None

    def bring_back(
        self, tokens: TokenIds[int], namespace: str | None, copy: KvCopy, old: Hold | None
    ) -> tuple[Hold | None, int]:
        return old, 0


@dataclass
class BlockChanges:
    """Prefix blocks (`messages.prefix_blocks`) that came into the tree and that left it."""

    cached: list[bytes]
    evicted: list[bytes]


class StreamRadixCache(RadixCache):
    """RadixCache plus taking, moving and releasing holds, and pruning a dead branch.

    It also keeps the fingerprints of all prefix blocks in the tree, for routers. `_left`: nodes of
    dead branches that wait to be evicted before all others.
    """

    def __init__(self, params: Any) -> None:
        self._left: set[Any] = set()
        super().__init__(params)
        pool = self.token_to_kv_pool_allocator.get_kvcache()
        self._copier = KvCopier(pool) if KvCopier.can_copy(pool) else None
        self.eviction_strategy: Any = _LeftFirst(self.eviction_strategy, self._left)

    def reset(self) -> None:
        super().reset()  # also called by the constructor
        gone = dict.fromkeys(getattr(self, "blocks", ()), False)
        self._changes: dict[bytes, bool] = getattr(self, "_changes", {}) | gone
        self.blocks: set[bytes] = set()
        self._left.clear()

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
        hold = None
        if length:
            hold = Hold(match.last_device_node, length, self._found(match.last_device_node))
            self.inc_lock_ref(hold.node)
        self.release(old)
        return hold

    def release(self, hold: Hold | None) -> None:
        """Gives a hold back; its pages stay cached until they are evicted."""
        if hold is not None:
            self.dec_lock_ref(hold.node)

    def prune(self, leaf: Any, keep: Hold | None) -> None:
        """Frees the branch from `leaf` upward, up to but not including `keep`'s node.

        Stops at the first node that somebody else holds or that has other children: what another
        stream or request shares stays.
        """
        for node in self._dead_branch(leaf, keep):
            if node.children:
                break
            self.token_to_kv_pool_allocator.free_segment(node.value, start_pos=0)
            self._delete_leaf(node)
            self._record_remove_event(node)

    def leave(self, leaf: Any, keep: Hold | None) -> None:
        """Leaves that branch in the tree, as the first to be evicted."""
        for node in self._dead_branch(leaf, keep):
            if any(child not in self._left for child in node.children.values()):
                break
            self._left.add(node)

    def copy_out(self, hold: Hold) -> KvCopy | None:
        """The held KV in host memory; None where the pool cannot be copied."""
        if self._copier is None:
            return None
        values = [node.value for node in self._path(hold.node)]
        return self._copier.out(torch.cat(values[::-1]))

    def bring_back(
        self, tokens: TokenIds[int], namespace: str | None, copy: KvCopy, old: Hold | None
    ) -> tuple[Hold | None, int]:
        """Puts KV from host memory back into the tree and holds it in place of `old`.

            tokens  |--- still in the tree ---|--- from the copy ---|
                    0                        have              copy.length

        Without room for it (evicting what nobody holds included) only what the tree has is held.
        Also returns the tokens that were copied.
        """
        hold = self.take(tokens, namespace, old)
        have = hold.length if hold is not None else 0
        missing = copy.length - have
        allocator = self.token_to_kv_pool_allocator
        if missing <= 0:
            return hold, 0
        if allocator.available_size() < missing:
            self.evict(EvictParams(num_tokens=missing - allocator.available_size()))
        slots = allocator.alloc(missing) if allocator.available_size() >= missing else None
        if slots is None or self._copier is None:
            return hold, 0
        self._copier.back(copy, have, slots)
        key = RadixKey(tokens[: copy.length], namespace)
        values = [n.value for n in self._path(hold.node)][::-1] if hold is not None else []
        self.insert(InsertParams(key=key, value=torch.cat([*values, slots])))
        return self.take(tokens, namespace, hold), missing

    def _dead_branch(self, leaf: Any, keep: Hold | None) -> Iterator[Any]:
        """The nodes from `leaf` upward that nobody holds, up to `keep`'s node. A node that SGLang
        has evicted meanwhile has left the tree, which its parent's children tell."""
        stop = self.root_node if keep is None else keep.node
        node = leaf
        while node is not stop and node is not self.root_node:
            parent = node.parent
            child_key = node.key.child_key(self.page_size)
            if node.lock_ref or parent.children.get(child_key) is not node:
                return
            yield node
            node = parent

    def _path(self, node: Any) -> Iterator[Any]:
        """The nodes from `node` upward, without the root."""
        while node is not self.root_node:
            yield node
            node = node.parent

    def _found(self, node: Any) -> int:
        """Tokens up to `node` that had been left behind; they are no longer."""
        if not self._left:
            return 0
        again = [n for n in self._path(node) if n in self._left]
        self._left.difference_update(again)
        return sum(len(n.key) for n in again)

    def _split_node(self, key: Any, child: Any, split_len: int) -> Any:
        upper = super()._split_node(key, child, split_len)
        if child in self._left:
            self._left.add(upper)
        return upper

    def _delete_leaf(self, node: Any) -> None:
        self._left.discard(node)
        super()._delete_leaf(node)

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


class _LeftFirst:
    """An eviction strategy of SGLang that gives up nodes of dead branches before all others."""

    def __init__(self, strategy: Any, left: set[Any]) -> None:
        self._strategy = strategy
        self._left = left

    def get_priority(self, node: Any) -> tuple[bool, Any]:
        return node not in self._left, self._strategy.get_priority(node)


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
