"""Slots of the KV pool on a CPU: SGLang's allocators, with their Triton kernels done in torch."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator


def build_allocator(size: int, *, page_size: int, **arguments: Any) -> BaseTokenToKVPoolAllocator:
    """The allocator of a pool of `size` tokens; `arguments`: those of SGLang's own, unchanged."""
    if page_size == 1:
        return TokenToKVPoolAllocator(size, **arguments)
    return CpuPagedAllocator(size, page_size=page_size, **arguments)


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's paged allocator for the CPU.

    A sequence first fills the page that its last token is in, then takes whole new pages in the
    order in which they are free:

        positions:  ... last | rest of its page | page | page | part of a page
                             '- last + 1, + 2 .. '- free_pages, in order
    """

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for the tokens [prefix, length) of each sequence, one sequence after another.

        `last_loc`: the slot of token `prefix - 1`, or -1. None if there are not enough pages.
        """
        return self._extend(prefix_lens, seq_lens, last_loc, extend_num_tokens)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """A slot for the last token of each sequence; None if there are not enough pages."""
        return self._extend(seq_lens - 1, seq_lens, last_loc, len(seq_lens))

    def _extend(
        self, prefix_lens: torch.Tensor, seq_lens: torch.Tensor, last_loc: torch.Tensor, total: int
    ) -> torch.Tensor | None:
        size = self.page_size
        lens = seq_lens - prefix_lens
        old_pages = (prefix_lens + size - 1) // size
        new_pages = (seq_lens + size - 1) // size - old_pages
        taken = int(new_pages.sum())
        if self.need_sort and taken > len(self.free_pages):
            self.merge_and_sort_free()
        if taken > len(self.free_pages):
            return None

        sequence = torch.repeat_interleave(torch.arange(len(lens)), lens, output_size=total)
        first_token = (lens.cumsum(0) - lens)[sequence]
        position = prefix_lens[sequence] + torch.arange(total) - first_token
        # The n-th new page of a sequence; negative for what still goes into its last page.
        nth = position // size - old_pages[sequence]
        first_page = (new_pages.cumsum(0) - new_pages)[sequence]
        if taken == 0:
            pages = torch.zeros_like(nth)
        else:
            pages = self.free_pages[(first_page + nth).clamp(0, taken - 1)]
        in_last_page = last_loc[sequence] + 1 + position - prefix_lens[sequence]
        slots = torch.where(nth < 0, in_last_page, pages * size + position % size)
        self.free_pages = self.free_pages[taken:]
        return slots.to(torch.int64)
