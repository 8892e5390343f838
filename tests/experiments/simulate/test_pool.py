from __future__ import annotations

import pytest

from experiments.simulate.pool import Node, Pool
from experiments.workload.shapes import Document

A, B, C, D = (Document(name, 10) for name in "ABCD")


def check(pool: Pool) -> None:
    assert pool.free + pool.used + pool.evictable + pool.protected == pool.size
    assert min(pool.free, pool.used, pool.evictable, pool.protected) >= 0


def cached(pool: Pool, root: Node, *documents: Document) -> int:
    """What is cached of a prompt."""
    return pool.match(root, documents)[1]


def compute(pool: Pool, root: Node, *documents: Document) -> Node:
    """Caches a whole prompt, as a request that ends does."""
    node, have = pool.match(root, documents)
    pool.lock(node)
    total = sum(d.tokens for d in documents)
    pool.allocate(total - have)
    leaf = pool.insert(root, documents, total, total - have)
    pool.unlock(node)
    return leaf


def test_a_prefix_is_found_to_the_middle_of_a_document() -> None:
    pool, root = Pool(100), Node()
    pool.allocate(15)
    pool.insert(root, (A, B), 15, 15)
    assert cached(pool, root, A, B, C) == 15
    assert cached(pool, root, A, C) == 10
    assert cached(pool, root, B) == 0
    check(pool)


def test_held_kv_is_not_evicted() -> None:
    pool, root, other = Pool(30), Node(), Node()
    compute(pool, root, A, B)
    hold = pool.take(root, (A, C))
    assert hold is not None
    assert hold.length == 10
    compute(pool, other, C, D)
    assert cached(pool, root, A, B) == 10
    with pytest.raises(RuntimeError, match="21 KV tokens are wanted"):
        pool.allocate(21)
    pool.release(hold)
    pool.allocate(30)
    check(pool)


def test_what_an_update_left_is_evicted_first_and_found_if_it_comes_back() -> None:
    pool, first, second = Pool(40), Node(), Node()
    compute(pool, first, A)
    compute(pool, second, B, C)
    leaf = compute(pool, second, B, D)
    keep = pool.take(second, (B, C))
    pool.leave(leaf, keep)
    pool.make_free(10)
    assert (cached(pool, first, A), cached(pool, second, B, D)) == (10, 10)
    leaf = compute(pool, second, B, D)
    pool.leave(leaf, keep)
    again = pool.take(second, (B, D), keep)
    assert again is not None
    assert (again.length, again.found) == (20, 10)
    pool.make_free(10)
    assert cached(pool, second, B, D) == 20
    check(pool)


def test_a_dead_branch_is_pruned_up_to_what_is_kept() -> None:
    pool, root = Pool(50), Node()
    leaf = compute(pool, root, A, B, C)
    keep = pool.take(root, (A, D))
    pool.prune(leaf, keep)
    assert pool.free == 40
    assert cached(pool, root, A) == 10
    check(pool)


def test_the_least_recently_used_is_evicted_first() -> None:
    pool, roots = Pool(30), [Node() for _ in range(4)]
    for root in roots[:3]:
        compute(pool, root, A)
    cached(pool, roots[0], A)
    compute(pool, roots[3], B)
    assert [cached(pool, root, A) for root in roots[:3]] == [10, 0, 10]


def test_whole_pages_are_found() -> None:
    pool, root = Pool(100, page=16), Node()
    compute(pool, root, A, B)
    assert cached(pool, root, A, B) == 16
    assert cached(pool, root, A, C) == 0
