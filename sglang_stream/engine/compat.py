"""What stream support needs of SGLang, refused by name where it is not so."""

from __future__ import annotations

from typing import Any

SGLANG_VERSION = "0.5.17"

# Server arguments that streams do not support yet: (flag, is it in use?)
_UNSUPPORTED: tuple[tuple[str, Any], ...] = (
    ("--enable-dp-attention", lambda a: a.enable_dp_attention),
    ("--dp-size", lambda a: a.dp_size > 1),
    ("--pp-size", lambda a: a.pp_size > 1),
    ("--enable-hierarchical-cache", lambda a: a.enable_hierarchical_cache),
    ("--enable-lmcache", lambda a: a.enable_lmcache),
    ("--enable-flexkv", lambda a: a.enable_flexkv),
    ("--speculative-algorithm", lambda a: a.speculative_algorithm),
    ("--enable-lora", lambda a: a.enable_lora or a.lora_paths),
    ("--enable-mixed-chunk", lambda a: a.enable_mixed_chunk),
    ("--enable-streaming-session", lambda a: a.enable_streaming_session),
    (
        "--disable-radix-cache",
        # SGLang disables it on decode workers, where streams do not need it.
        lambda a: a.disable_radix_cache and a.disaggregation_mode != "decode",
    ),
    (
        "--disaggregation-decode-enable-radix-cache",
        lambda a: a.disaggregation_decode_enable_radix_cache,
    ),
    (
        "--disaggregation-decode-enable-offload-kvcache",
        lambda a: a.disaggregation_decode_enable_offload_kvcache,
    ),
    ("--optimistic-prefill-attempts", lambda a: a.optimistic_prefill_attempts > 0),
    ("--prefill-only-disable-kv-cache", lambda a: a.prefill_only_disable_kv_cache),
)


def check_version(version: str) -> None:
    """Exits with one line unless SGLang is the version that the hooks were written for."""
    if version != SGLANG_VERSION:
        raise SystemExit(
            f"sglang-stream: needs sglang {SGLANG_VERSION}, found {version}: "
            f'pip install "sglang=={SGLANG_VERSION}"'
        )


def check_server_args(server_args: Any, cache_backend: str) -> None:
    """Exits with one line that names the flags which streams do not support."""
    used = [flag for flag, in_use in _UNSUPPORTED if in_use(server_args)]
    if server_args.radix_cache_backend != cache_backend:
        used.append(f"--radix-cache-backend {server_args.radix_cache_backend}")
    if used:
        raise SystemExit(f"sglang-stream: streams do not support {', '.join(used)}: leave it out")
