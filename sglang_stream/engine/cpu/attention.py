"""Attention on the CPU: n new tokens after a cached prefix of p cost n x (n + p).

SGLang's `torch_native` backend (`layers/attention/torch_native_backend.py`) computes a query for
every token of the prefix as well, and throws those away. Here the new queries only are computed,
in two parts that need no mask, each with torch's flash attention for CPUs:

                keys:  prefix [0, p)          new [p, p + n)
    queries [p, p+n):  all of it              causal: i <= j
                       '--- merged by their log-sum-exp ---'

In the first part, and in decoding, the query heads that share a key head are laid behind one
another as more queries of that head, so that keys and values are never copied per query head.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class CpuAttentionBackend(TorchNativeAttnBackend):
    """`torch_native`, faster for decoder self-attention over all keys.

    Cross attention, bidirectional attention, sliding windows and values of another size than the
    keys are left to the parent.
    """

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        *,
        scaling: float | None = None,
        causal: bool = False,
        **others: Any,
    ) -> torch.Tensor:
        """Fills `output` [tokens, heads, size] from `query` of the same shape.

        `k_cache`, `v_cache`: [slots, key heads, size]. Sequence i of the batch holds the slots
        `req_to_token[req_pool_indices[i], : seq_lens[i]]`, the last `extend_seq_lens[i]` of them
        new.
        """
        if not causal or not _is_plain(query, v_cache, encoder_lens, others):
            return super()._run_sdpa_forward_extend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling=scaling,
                causal=causal,
                **others,
            )
        start = 0
        for row, length, new in zip(
            req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True
        ):
            if new == 0:
                continue
            slots = req_to_token[row, :length]
            q = query[start : start + new]
            k, v = gather(k_cache, slots, q.dtype), gather(v_cache, slots, q.dtype)
            output[start : start + new] = extend_attention(q, k, v, scaling)
            start += new
        return output

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        *,
        scaling: float | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """As for extending, with one new token of each sequence."""
        if not _is_plain(query, v_cache, encoder_lens, others):
            return super()._run_sdpa_forward_decode(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                encoder_lens,
                scaling=scaling,
                **others,
            )
        for i, (row, length) in enumerate(
            zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)
        ):
            slots = req_to_token[row, :length]
            q = query[i : i + 1]
            k, v = gather(k_cache, slots, q.dtype), gather(v_cache, slots, q.dtype)
            output[i : i + 1] = full_attention(q, k, v, scaling)[0]
        return output


def _is_plain(
    query: torch.Tensor,
    v_cache: torch.Tensor,
    encoder_lens: torch.Tensor | None,
    others: dict[str, Any],
) -> bool:
    return (
        encoder_lens is None
        and not others.get("is_cross_attn")
        and others.get("sliding_window_size") is None
        and query.shape[-1] == v_cache.shape[-1]
    )


def gather(cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[slots, key heads, size] of the pool at `slots`, as [key heads, slots, size] in `dtype`.

    `index_select` copies each slot as one run of bytes, four times faster than indexing does.
    """
    return cache.index_select(0, slots).to(dtype).movedim(1, 0)


def extend_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Causal attention of the last n of L tokens: `q` [n, heads, size], `k` and `v`
    [key heads, L, size]; returns [n, heads, size].
    """
    prefix = k.shape[1] - q.shape[0]
    new, new_lse = causal_attention(q, k[:, prefix:], v[:, prefix:], scale)
    if prefix == 0:
        return new
    old, old_lse = full_attention(q, k[:, :prefix], v[:, :prefix], scale)
    # The weight of a part is the share of its exponentials in the sum over both.
    weight = torch.sigmoid(old_lse - new_lse).unsqueeze(-1)
    return torch.lerp(new.to(weight.dtype), old.to(weight.dtype), weight)


def full_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query sees every key: `q` [n, heads, size], `k` and `v` [key heads, L, size].

    Returns the output [n, heads, size] and the log-sum-exp of its logits [n, heads].
    """
    n, heads, size = q.shape
    groups = heads // k.shape[0]
    folded = q.view(n, -1, groups, size).permute(1, 2, 0, 3).reshape(-1, groups * n, size)
    output, lse = _flash(folded[None], k[None], v[None], scale=scale)
    output, lse = output.reshape(heads, n, size), lse.reshape(heads, n)
    return output.movedim(1, 0), lse.movedim(1, 0)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query i sees keys 0 to i: `q` [n, heads, size], `k` and `v` [key heads, n, size]; returns
    what `full_attention` returns.
    """
    groups = q.shape[1] // k.shape[0]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    output, lse = _flash(q.movedim(1, 0)[None], k[None], v[None], is_causal=True, scale=scale)
    return output[0].movedim(1, 0), lse[0].movedim(1, 0)
