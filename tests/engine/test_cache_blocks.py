"""The prefix blocks that the cache tells routers of, against all prompts that are in its tree."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_stream.engine.cache import StreamRadixCache
from sglang_stream.engine.cpu.allocator import CpuPagedAllocator
from sglang_stream.messages import PREFIX_BLOCK, pack_tokens, prefix_blocks

POOL = 1 << 15
PART = 100  # tokens, so that nodes end within blocks


class Rig:
    """A cache, and what a router knows of it from its changes alone."""

    def __init__(self, page_size: int = 1) -> None:
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(POOL, torch.float32, "cpu", None, False)
        else:
            self.allocator = CpuPagedAllocator(POOL, page_size, torch.float32, "cpu", None, False)
        self.page_size = page_size
        self.cache = StreamRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,  # type: ignore[arg-type]
                token_to_kv_pool_allocator=self.allocator,
                page_size=page_size,
            )
        )
        self.told: set[bytes] = set()

    def insert(self, tokens: list[int], namespace: str | None = None) -> Any:
        """Puts a prompt in as a request does that ends; its deepest node."""
        ids = array("q", tokens)
        ids = ids[: len(ids) - len(ids) % self.page_size]
        match = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(ids, namespace)))
        self.cache.inc_lock_ref(match.last_device_node)
        prefix = len(match.device_indices)
        slots = self.allocator.alloc(len(ids) - prefix)
        assert slots is not None
        values = torch.cat([match.device_indices, slots])
        self.cache.insert(InsertParams(key=RadixKey(ids, namespace), value=values))
        self.cache.dec_lock_ref(match.last_device_node)
        match = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(ids, namespace)))
        return match.last_device_node

    def reset(self) -> None:
        self.cache.reset()
        self.allocator.clear()

    def listen(self) -> None:
        changes = self.cache.take_block_changes()
        assert not set(changes.cached) & set(changes.evicted)
        self.told -= set(changes.evicted)
        self.told |= set(changes.cached)

    def in_tree(self) -> set[bytes]:
        """The blocks of all prompts in the tree, found by walking it."""
        found: set[bytes] = set()
        todo = [(child, array("q")) for child in self.cache.root_node.children.values()]
        while todo:
            node, before = todo.pop()
            path = before + array("q", node.key.token_ids[: len(node.key)])
            found.update(prefix_blocks(pack_tokens(path), node.key.extra_key))
            todo += [(child, path) for child in node.children.values()]
        return found


def prompt(*parts: int) -> list[int]:
    return [part * PART + i for part in parts for i in range(PART)]


def test_a_prompt_brings_its_whole_blocks() -> None:
    rig = Rig()
    tokens = list(range(3 * PREFIX_BLOCK - 1))
    rig.insert(tokens)
    rig.listen()
    assert rig.told == rig.cache.blocks == set(prefix_blocks(pack_tokens(tokens)))
    assert len(rig.told) == 2
    rig.insert([*tokens, 9999], "another")
    rig.listen()
    assert len(rig.told) == 5


def test_a_split_changes_nothing_and_a_block_across_two_nodes_counts() -> None:
    rig = Rig()
    rig.insert(prompt(1, 2, 3, 4, 5, 6))
    before = set(rig.cache.blocks)
    rig.insert(prompt(1, 2, 3, 4, 7, 8))
    assert before < rig.cache.blocks
    assert rig.cache.blocks == rig.in_tree()
    assert len(rig.cache.blocks) == 3


def test_what_left_just_before_a_flush_is_told() -> None:
    rig = Rig()
    rig.insert(prompt(1, 2, 3))
    rig.listen()
    rig.cache.evict(EvictParams(num_tokens=POOL))
    rig.reset()
    rig.listen()
    assert rig.told == rig.cache.blocks == set()


def test_changes_are_told_once() -> None:
    rig = Rig()
    rig.insert(prompt(1, 2, 3))
    assert len(rig.cache.take_block_changes().cached) == 1
    again = rig.cache.take_block_changes()
    assert (again.cached, again.evicted) == ([], [])


steps = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "insert", "evict", "prune", "reset", "listen"]),
        st.lists(st.integers(0, 2), min_size=1, max_size=8),
        st.sampled_from([None, "a"]),
    ),
    max_size=15,
)


@settings(deadline=None, max_examples=60)
@given(steps, st.sampled_from([1, 4]))
def test_the_blocks_are_those_of_the_tree(
    drawn: list[tuple[str, list[int], str | None]], page_size: int
) -> None:
    rig = Rig(page_size)
    leaf: Any = None
    for action, parts, namespace in drawn:
        match action:
            case "insert":
                leaf = rig.insert(prompt(*parts), namespace)
            case "evict":
                rig.cache.evict(EvictParams(num_tokens=PART * len(parts)))
            case "prune" if leaf is not None:
                rig.cache.prune(leaf, None)
                leaf = None
            case "reset":
                rig.reset()
                leaf = None
            case "listen":
                rig.listen()
        assert rig.cache.blocks == rig.in_tree()
    rig.listen()
    assert rig.told == rig.cache.blocks
