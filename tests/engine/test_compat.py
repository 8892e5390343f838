from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_stream.config import EngineConfig
from sglang_stream.engine.compat import check_server_args, check_version
from sglang_stream.engine.plugin import CACHE_BACKEND


def args(**changed: Any) -> SimpleNamespace:
    plain: dict[str, Any] = {
        "enable_dp_attention": False,
        "dp_size": 1,
        "pp_size": 1,
        "enable_hierarchical_cache": False,
        "enable_lmcache": False,
        "enable_flexkv": False,
        "speculative_algorithm": None,
        "enable_lora": None,
        "lora_paths": None,
        "enable_mixed_chunk": False,
        "enable_streaming_session": False,
        "disable_radix_cache": False,
        "disaggregation_mode": "null",
        "disaggregation_decode_enable_radix_cache": False,
        "disaggregation_decode_enable_offload_kvcache": False,
        "optimistic_prefill_attempts": 0,
        "prefill_only_disable_kv_cache": False,
        "radix_cache_backend": CACHE_BACKEND,
    }
    return SimpleNamespace(**{**plain, **changed})


def test_plain_settings_are_accepted() -> None:
    check_server_args(args(), CACHE_BACKEND)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"pp_size": 2}, "--pp-size"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm"),
        ({"lora_paths": ["a"]}, "--enable-lora"),
        ({"radix_cache_backend": "flexkv"}, "--radix-cache-backend flexkv"),
    ],
)
def test_what_streams_do_not_support_is_refused_by_name(changed: Any, flag: str) -> None:
    with pytest.raises(SystemExit, match=flag):
        check_server_args(args(**changed), CACHE_BACKEND)


def test_another_sglang_is_refused() -> None:
    check_version("0.5.17")
    with pytest.raises(SystemExit, match=r"0\.5\.18"):
        check_version("0.5.18")


def test_settings_travel_through_the_environment() -> None:
    config = EngineConfig(port=5000, pass_tokens=64)
    assert EngineConfig.from_environment(config.to_json()) == config
    assert EngineConfig.from_environment("1") == EngineConfig()
    for bad in ("yes", '{"ports": 1}', '{"port": "x"}'):
        with pytest.raises(ValueError, match="SGLANG_STREAM"):
            EngineConfig.from_environment(bad)
