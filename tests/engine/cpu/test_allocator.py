from __future__ import annotations

import random

import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

from sglang_stream.engine.cpu.allocator import CpuPagedAllocator, build_allocator


def make(size: int, page_size: int, need_sort: bool = False) -> CpuPagedAllocator:
    allocator = build_allocator(
        size,
        page_size=page_size,
        dtype=torch.float32,
        device="cpu",
        kvcache=None,
        need_sort=need_sort,
    )
    assert isinstance(allocator, CpuPagedAllocator)
    return allocator


def extend(allocator: CpuPagedAllocator, rows: list[list[int]], lengths: list[int]) -> bool:
    """Grows each sequence of `rows` (the slots it holds) to its length; False if out of pages."""
    prefix = torch.tensor([len(row) for row in rows])
    lens = torch.tensor(lengths)
    last = torch.tensor([row[-1] if row else -1 for row in rows], dtype=torch.int32)
    slots = allocator.alloc_extend(prefix, prefix, lens, lens, last, int((lens - prefix).sum()))
    if slots is None:
        return False
    assert slots.dtype == torch.int64
    pieces = slots.split((lens - prefix).tolist())
    for row, piece in zip(rows, pieces, strict=True):
        row.extend(piece.tolist())
    return True


def check(allocator: CpuPagedAllocator, rows: list[list[int]]) -> None:
    """Slots follow one another within pages, pages belong to one sequence, none is lost."""
    size = allocator.page_size
    pages = allocator.free_pages.tolist() + allocator.release_pages.tolist()
    for row in rows:
        assert [slot % size for slot in row] == [i % size for i in range(len(row))]
        own = [slot // size for slot in row]
        assert all(own[i] == own[i - 1] for i in range(len(row)) if i % size)
        pages += own[::size]
    assert sorted(pages) == list(range(1, allocator.num_pages + 1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("page_size", [2, 16])
@pytest.mark.parametrize("need_sort", [False, True])
def test_sequences_grow_shrink_and_share_nothing(
    page_size: int, need_sort: bool, seed: int
) -> None:
    source = random.Random(seed)
    allocator = make(60 * page_size, page_size, need_sort)
    rows: list[list[int]] = [[] for _ in range(4)]
    refused = 0
    for _ in range(60):
        if source.random() < 0.3:
            row = source.choice(rows)
            allocator.free(torch.tensor(row, dtype=torch.int64))
            row.clear()
        elif source.random() < 0.5 and all(rows):
            lens = torch.tensor([len(row) + 1 for row in rows])
            last = torch.tensor([row[-1] for row in rows])
            slots = allocator.alloc_decode(lens, lens, last)
            if slots is not None:
                for row, slot in zip(rows, slots.tolist(), strict=True):
                    row.append(slot)
        else:
            grown = [len(row) + source.randrange(1, 12 * page_size) for row in rows]
            before = allocator.available_size()
            if not extend(allocator, rows, grown):
                refused += 1
                assert allocator.available_size() == before
        check(allocator, rows)
    assert refused < 60


def test_takes_the_pages_that_sglang_takes() -> None:
    source = random.Random(0)
    for _ in range(50):
        allocator = make(100 * 8, 8)
        rows: list[list[int]] = [[] for _ in range(3)]
        assert extend(allocator, rows, [source.randrange(1, 60) for _ in rows])
        prefix = torch.tensor([len(row) for row in rows])
        lens = prefix + torch.tensor([source.randrange(1, 60) for _ in rows])
        last = torch.tensor([row[-1] for row in rows])
        total = int((lens - prefix).sum())
        expected = torch.empty(total, dtype=torch.int64)
        alloc_extend_naive(prefix, lens, last, allocator.free_pages, expected, 8, "cpu")
        slots = allocator.alloc_extend(prefix, prefix, lens, lens, last, total)
        assert slots is not None
        assert slots.tolist() == expected.tolist()


def test_exactly_the_last_page_can_be_had() -> None:
    allocator = make(4 * 8, 8)
    rows: list[list[int]] = [[]]
    assert extend(allocator, rows, [32])
    assert allocator.available_size() == 0
    assert not extend(allocator, rows, [33])
    allocator.free(torch.tensor(rows[0]))
    assert allocator.available_size() == 32


def test_page_size_one_uses_sglangs_token_allocator() -> None:
    allocator = build_allocator(
        10, page_size=1, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False
    )
    assert type(allocator) is TokenToKVPoolAllocator
    assert allocator.alloc(10).tolist() == list(range(1, 11))
