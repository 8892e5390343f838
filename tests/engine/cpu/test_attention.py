from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_stream.engine.cpu.attention import CpuAttentionBackend

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Batch:
    """Sequences whose pages lie anywhere in a pool, as the backends get them."""

    q: torch.Tensor
    pool: dict[str, Any]
    lens: torch.Tensor
    new: torch.Tensor

    def extend(self, backend: TorchNativeAttnBackend, **options: Any) -> torch.Tensor:
        return backend._run_sdpa_forward_extend(
            self.q,
            torch.full_like(self.q, torch.nan),
            **self.pool,
            seq_lens=self.lens,
            extend_prefix_lens=self.lens - self.new,
            extend_seq_lens=self.new,
            **{"causal": True, **options},
        )

    def decode(self, backend: TorchNativeAttnBackend, **options: Any) -> torch.Tensor:
        return backend._run_sdpa_forward_decode(
            self.q, torch.full_like(self.q, torch.nan), **self.pool, seq_lens=self.lens, **options
        )


def make_batch(
    spans: list[tuple[int, int]],
    *,
    groups: int,
    kv_heads: int = 2,
    size: int = 16,
    page_size: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """`spans`: (cached, new) tokens of each sequence."""
    source = torch.Generator().manual_seed(seed)
    pages = [-(-(cached + new) // page_size) for cached, new in spans]
    order = torch.randperm(sum(pages), generator=source).split(pages)
    longest = max(pages) * page_size
    req_to_token = torch.full((len(spans) + 3, longest), -1, dtype=torch.int32)
    rows = torch.randperm(len(spans) + 3, generator=source)[: len(spans)]
    for row, mine in zip(rows.tolist(), order, strict=True):
        slots = (mine[:, None] * page_size + torch.arange(page_size)).flatten()
        req_to_token[row, : len(slots)] = slots.to(torch.int32)
    slots = sum(pages) * page_size
    new = [n for _, n in spans]
    return Batch(
        q=torch.randn(sum(new), groups * kv_heads, size, generator=source).to(dtype),
        pool={
            "k_cache": torch.randn(slots, kv_heads, size, generator=source).to(dtype),
            "v_cache": torch.randn(slots, kv_heads, size, generator=source).to(dtype),
            "req_to_token": req_to_token,
            "req_pool_indices": rows,
        },
        lens=torch.tensor([sum(span) for span in spans]),
        new=torch.tensor(new),
    )


def backends() -> tuple[CpuAttentionBackend, TorchNativeAttnBackend]:
    """Ours and SGLang's, without a model: what is called here uses no state."""
    return object.__new__(CpuAttentionBackend), object.__new__(TorchNativeAttnBackend)


def assert_same(ours: torch.Tensor, stock: torch.Tensor) -> None:
    assert ours.dtype == stock.dtype
    tolerance = TOLERANCE[stock.dtype]
    torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance)


shapes = {
    "groups": st.sampled_from([1, 2, 4, 7]),
    "kv_heads": st.integers(1, 3),
    "size": st.sampled_from([8, 16, 64, 80, 128]),
    "page_size": st.sampled_from([1, 3, 16]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "seed": st.integers(0, 1000),
    "scaling": st.sampled_from([None, 0.05, 0.5]),
}


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(
        st.tuples(st.one_of(st.just(0), st.integers(0, 200)), st.integers(1, 90)),
        min_size=1,
        max_size=4,
    ),
    **shapes,
)
def test_extending_equals_torch_native(
    spans: list[tuple[int, int]], scaling: float | None, groups: int, **shape: Any
) -> None:
    batch = make_batch(spans, groups=groups, **shape)
    ours, stock = backends()
    options = {"scaling": scaling, "enable_gqa": groups > 1}
    assert_same(batch.extend(ours, **options), batch.extend(stock, **options))


@settings(max_examples=40, deadline=None)
@given(cached=st.lists(st.integers(0, 300), min_size=1, max_size=5), **shapes)
def test_decoding_equals_torch_native(
    cached: list[int], scaling: float | None, groups: int, **shape: Any
) -> None:
    batch = make_batch([(length, 1) for length in cached], groups=groups, **shape)
    ours, stock = backends()
    options = {"scaling": scaling, "enable_gqa": groups > 1}
    assert_same(batch.decode(ours, **options), batch.decode(stock, **options))


@pytest.mark.parametrize("option", [{"sliding_window_size": 7}, {"causal": False}])
def test_what_is_not_plain_is_left_to_torch_native(option: dict[str, Any]) -> None:
    batch = make_batch([(20, 9), (0, 5)], groups=2)
    ours, stock = backends()
    options = {"enable_gqa": True, **option}
    assert torch.equal(batch.extend(ours, **options), batch.extend(stock, **options))


def test_a_window_is_kept_in_decoding() -> None:
    batch = make_batch([(20, 1), (3, 1)], groups=2)
    ours, stock = backends()
    options = {"enable_gqa": True, "sliding_window_size": 5}
    assert torch.equal(batch.decode(ours, **options), batch.decode(stock, **options))


def test_a_sequence_without_new_tokens_takes_no_output() -> None:
    whole = make_batch([(4, 3), (5, 0), (0, 2)], groups=2)
    ours, _ = backends()
    output = whole.extend(ours, enable_gqa=True)
    assert not output.isnan().any()


def test_keys_kept_in_another_type_are_converted() -> None:
    batch = make_batch([(30, 4)], groups=2)
    exact = batch.extend(backends()[0], enable_gqa=True)
    for name in ("k_cache", "v_cache"):
        batch.pool[name] = batch.pool[name].to(torch.bfloat16)
    rough = batch.extend(backends()[0], enable_gqa=True)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)
