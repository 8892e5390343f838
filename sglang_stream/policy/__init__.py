"""Pure scheduling policy: no SGLang, no clock, no I/O; decisions are frozen values."""

from sglang_stream.policy.cost import Copying, CostModel, Decode, Prefill, Rest
from sglang_stream.policy.order import Order
from sglang_stream.policy.pace import Pace, Turns
from sglang_stream.policy.planner import Planner
from sglang_stream.policy.policies import POLICIES, Policy
from sglang_stream.policy.predict import SealPredictor
from sglang_stream.policy.survival import Survival
from sglang_stream.policy.types import (
    Budget,
    Decision,
    Invalidation,
    Pass,
    PolicyName,
    PoolView,
    Preemption,
    Victim,
    View,
)

__all__ = [
    "POLICIES",
    "Budget",
    "Copying",
    "CostModel",
    "Decision",
    "Decode",
    "Invalidation",
    "Order",
    "Pace",
    "Pass",
    "Planner",
    "Policy",
    "PolicyName",
    "PoolView",
    "Preemption",
    "Prefill",
    "Rest",
    "SealPredictor",
    "Survival",
    "Turns",
    "Victim",
    "View",
]
