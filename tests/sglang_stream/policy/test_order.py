from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sglang_stream.policy import POLICIES, Order, View

NAMES = [str(i) for i in range(8)]


class KeptOrder(RuleBasedStateMachine):
    """An order that is kept is the one that a sort would give, after any changes."""

    def __init__(self) -> None:
        super().__init__()
        self.orders = {name: Order(policy) for name, policy in POLICIES.items()}
        self.views: dict[str, View] = {}

    @rule(
        name=st.sampled_from(NAMES),
        tokens=st.integers(0, 5),
        held=st.integers(0, 5),
        full=st.booleans(),
        seconds=st.floats(0, 3),
    )
    def put(self, name: str, tokens: int, held: int, full: bool, seconds: float) -> None:
        view = View(name, int(name), tokens, held, full, latest=tokens, since_s=seconds)
        self.views[name] = view
        for order in self.orders.values():
            order.put(view)

    @rule(name=st.sampled_from(NAMES))
    def drop(self, name: str) -> None:
        self.views.pop(name, None)
        for order in self.orders.values():
            order.drop(name)

    @invariant()
    def sorted_by_policy(self) -> None:
        for name, order in self.orders.items():
            assert order.views == sorted(self.views.values(), key=POLICIES[name])
            for place, view in enumerate(order.views):
                assert order.place(view.id) == place
            assert all(order.place(n) is None for n in NAMES if n not in self.views)


TestKeptOrder = KeptOrder.TestCase
