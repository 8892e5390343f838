"""Pure scheduling policy: no SGLang, no clock, no I/O; decisions are frozen values."""

from sglang_stream.policy.planner import choose_victims, plan, rank
from sglang_stream.policy.types import Decision, FullView, Pass, PoolView, StreamView

__all__ = [
    "Decision",
    "FullView",
    "Pass",
    "PoolView",
    "StreamView",
    "choose_victims",
    "plan",
    "rank",
]
