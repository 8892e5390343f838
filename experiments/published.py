"""The published figures of Stream2LLM, to compare with.

Source: arXiv 2604.16395, the folder `tables/` of its public artifact. Llama-3.1-8B-Instruct on two
H200 (tensor parallel), Poisson arrivals, one output token, a token budget of 2,048 (crawler) or
8,192 (ANNS) an iteration. TTFT counts from the last chunk to the first token. Published are the
seconds of waiting and of streaming in vLLM's own order (`default`), and for the policies how many
times faster than waiting they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

PublishedName = Literal["crawler", "anns"]
PERCENTS = (50, 95, 99)

_Triple = tuple[float, float, float]  # P50, P95, P99

_SECONDS: dict[PublishedName, dict[float, dict[str, _Triple]]] = {
    "crawler": {
        0.5: {"default": (0.0298, 0.2185, 0.6234), "waiting": (0.1164, 0.8366, 1.7688)},
        1.0: {"default": (0.0298, 0.2694, 0.6713), "waiting": (0.1313, 1.0415, 2.0930)},
        2.0: {"default": (0.0374, 0.3779, 0.8932), "waiting": (0.1815, 1.5646, 2.4897)},
        4.0: {"default": (0.0722, 1.9569, 4.4535), "waiting": (0.7521, 4.3418, 5.4011)},
    },
    "anns": {
        0.25: {"default": (0.1166, 0.5726, 1.8198), "waiting": (0.2062, 0.8810, 3.1063)},
        0.5: {"default": (0.1297, 0.5623, 2.1651), "waiting": (0.2060, 1.0526, 3.2740)},
        1.0: {"default": (0.1563, 0.7394, 2.7436), "waiting": (0.2545, 2.0116, 3.9873)},
        2.0: {"default": (0.2713, 2.1384, 3.8154), "waiting": (0.3831, 3.6789, 5.2298)},
    },
}
_SPEED_UPS: dict[PublishedName, dict[float, dict[str, _Triple]]] = {
    "crawler": {
        0.5: {
            "fcfs": (3.891, 4.410, 3.351),
            "lcas": (3.953, 4.280, 3.130),
            "mcps": (3.943, 3.350, 2.680),
        },
        1.0: {
            "fcfs": (4.271, 4.874, 3.503),
            "lcas": (4.367, 4.600, 3.413),
            "mcps": (4.317, 2.927, 2.241),
        },
        2.0: {
            "fcfs": (4.811, 5.977, 3.946),
            "lcas": (4.748, 5.479, 3.964),
            "mcps": (4.850, 3.001, 1.902),
        },
        4.0: {
            "fcfs": (11.021, 7.012, 2.594),
            "lcas": (10.838, 5.852, 3.683),
            "mcps": (7.630, 1.572, 1.042),
        },
    },
    "anns": {
        0.25: {
            "fcfs": (1.799, 1.687, 1.670),
            "lcas": (1.822, 1.699, 1.703),
            "mcps": (1.835, 1.499, 1.488),
        },
        0.5: {
            "fcfs": (1.622, 1.816, 1.522),
            "lcas": (1.568, 1.703, 1.648),
            "mcps": (1.532, 1.643, 1.850),
        },
        1.0: {
            "fcfs": (1.575, 2.630, 1.454),
            "lcas": (1.653, 2.493, 1.748),
            "mcps": (1.538, 1.278, 1.429),
        },
        2.0: {
            "fcfs": (1.423, 2.258, 1.472),
            "lcas": (1.402, 1.807, 1.359),
            "mcps": (1.303, 1.534, 1.277),
        },
    },
}


def published_ttft_s(table: PublishedName, qps: float) -> Mapping[str, _Triple]:
    """Seconds of TTFT at P50, P95 and P99, by `waiting` or the policy's name; empty at a rate that
    is not published."""
    seconds = _SECONDS[table].get(qps, {})
    return seconds | {
        policy: _divided(seconds["waiting"], times)
        for policy, times in _SPEED_UPS[table].get(qps, {}).items()
    }


def published_speed_up(table: PublishedName, qps: float) -> Mapping[str, _Triple]:
    """How many times faster than waiting each policy is, likewise."""
    seconds = _SECONDS[table].get(qps)
    if seconds is None:
        return {}
    own = {"default": _divided(seconds["waiting"], seconds["default"])}
    return own | _SPEED_UPS[table][qps]


def _divided(over: _Triple, under: _Triple) -> _Triple:
    return over[0] / under[0], over[1] / under[1], over[2] / under[2]
