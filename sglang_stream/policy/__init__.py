"""Pure scheduling policy: no SGLang, no clock, no I/O; decisions are frozen values."""

from sglang_stream.policy.cost import Copying, CostModel, Prefill
from sglang_stream.policy.order import Order
from sglang_stream.policy.planner import Planner, Preemption
from sglang_stream.policy.policies import POLICIES, Policy, PolicyName
from sglang_stream.policy.predict import SealPredictor
from sglang_stream.policy.types import Budget, Decision, Pass, PoolView, Victim, View

__all__ = [
    "POLICIES",
    "Budget",
    "Copying",
    "CostModel",
    "Decision",
    "Order",
    "Pass",
    "Planner",
    "Policy",
    "PolicyName",
    "PoolView",
    "Preemption",
    "Prefill",
    "SealPredictor",
    "Victim",
    "View",
]
