"""Which open streams are computed in the next iteration, and whose KV makes room.

Two phases (Stream2LLM, section 4). *Decide* walks the rank and takes what fits the iteration's
budget and the KV that could be had; *acquire* finds that KV, first what is free or can be evicted,
then by preempting from the lowest rank upward, each victim by the cheaper of recompute and swap
for that victim.

In memory, full requests come before open streams under every policy: the rank decides who is
computed first, never whether an open stream may keep a full request out. A *parked* stream, which
has lost its KV and to which nothing has come since, takes KV that nobody holds, but no other
stream's: two streams that do not fit together would take each other's KV for ever.

What updates are likely to replace (`View.unsure`) is computed while nothing else is to do and every
stream has its KV, in KV that nobody holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_stream.policy.cost import CostModel
from sglang_stream.policy.policies import Key, Policy
from sglang_stream.policy.types import Budget, Decision, Pass, PoolView, Preemption, Victim, View

_LEAST_TOKENS = 64
"""What an iteration without full requests computes, however slow the machine is."""

_JOINING = 2
"""How many times a forward's fixed cost a slice may take to share it with one that ends there.

Several that take the fixed cost each are done as soon, in the mean, one after the other as they
are together; at twice that the first ones gain more than the last one loses.
"""

_STRETCH = 16
"""An iteration may be longer by this part of its tokens where that ends a request: a rest of a few
tokens, such as a question after a chunk, would take the fixed cost of an iteration of its own.
"""


class Planner:
    """Plans by a policy, with a machine's costs (None as long as they are not known)."""

    def __init__(
        self, policy: Policy, preemption: Preemption, cost: CostModel | None = None
    ) -> None:
        self._policy = policy
        self._preemption: Preemption = preemption
        self.cost = cost

    def plan(
        self, full: Sequence[View], ranked: Sequence[View], pool: PoolView, budget: Budget
    ) -> Decision:
        """The next iteration.

        Args:
            full: waiting full requests in the order in which the engine will admit them, as many
                as the iteration could admit.
            ranked: every stream in the order of the policy; sealed ones that wait are among them.
            pool: KV that is available to full requests and to open streams.
            budget: what open streams may compute. Its seconds are also those of the full requests
                that come before them.

        A full request that does not fit even without any stream keeps all KV for itself: open
        streams then get no pass, and the streams whose KV it may use are preempted, the least
        of them first.
        """
        need = sum(view.need for view in full)
        if need > pool.available:
            victims = self._for_full(full, ranked, need - pool.available, pool)
            first = tuple(view.id for view in full[:1] if view.restore)
            return Decision(tuple(victims), first)
        spare = pool.spare - need
        decision = self._passes(full, ranked, pool, budget, spare)
        if decision.passes or full or budget.decoding or any(view.parked for view in ranked):
            return decision
        return self._passes(full, ranked, pool, budget, spare, unsure=True)

    def together(self, full: Sequence[View], tokens: int) -> tuple[int, int]:
        """How many of the waiting `full` requests, from the first, share the next iteration, and
        how many tokens it gets: `tokens`, or a few more.

        Where one of them gets its last slice, a slice of the next one would only delay its first
        token if it is long, or if the next one needs as many further iterations in any case: it
        begins an iteration later.
        """
        if self.cost is None:
            return len(full), tokens
        prefill = self.cost.prefill
        longest_s = _JOINING * prefill.base_s
        left = tokens
        ends = False
        for index, view in enumerate(full):
            if left <= 0:
                return index, tokens
            new = view.missing if view.missing <= left + tokens // _STRETCH else left
            rest = view.missing - new
            spares = not rest or _iterations(rest, tokens) < _iterations(view.missing, tokens)
            if ends and (not spares or prefill.work_s(new, view.ready) > longest_s):
                return index, tokens
            if new > left:
                return index + 1, tokens + new - left
            ends = ends or not rest
            left -= new
        return len(full), tokens

    def make_room(self, ranked: Sequence[View], deficit: int, pool: PoolView) -> list[Victim]:
        """The fewest streams from the end of `ranked`, open ones first, whose KV covers `deficit`
        tokens; all if it cannot."""
        return self._for_full((), ranked, deficit, pool)

    def _for_full(
        self, full: Sequence[View], ranked: Sequence[View], deficit: int, pool: PoolView
    ) -> list[Victim]:
        # A waiting sealed stream is preempted too, or several of them could block each other; it
        # is wanted soon, so its KV is not copied but left to be evicted.
        first = full[0].id if full else None
        victims: list[Victim] = []
        for sealed in (False, True):
            for view in reversed(ranked):
                if deficit <= 0:
                    return victims
                if view.full is sealed and view.held and not view.busy and view.id != first:
                    victims.append(Victim(view.id, not sealed and self._swaps(view, pool)))
                    deficit -= view.held
        return victims

    def _passes(
        self,
        full: Sequence[View],
        ranked: Sequence[View],
        pool: PoolView,
        budget: Budget,
        spare: int,
        *,
        unsure: bool = False,
    ) -> Decision:
        tokens, seconds = budget.tokens, budget.seconds
        prefill = self.cost.prefill if self.cost is not None else None
        ahead: list[tuple[Key, float]] = []  # full requests and what they take, the last one first
        if prefill is not None:
            seconds -= prefill.base_s
            works = [(self._policy(v), prefill.work_s(v.missing, v.ready)) for v in full]
            ahead = sorted(works, reverse=True)
        restores = [view.id for view in full if view.restore]
        passes: list[Pass] = []
        victims: list[Victim] = []
        lower = len(ranked)  # ranked[lower:] has been looked at for victims
        for index, view in enumerate(ranked):
            if index >= lower or tokens < pool.page:
                break
            goal = view.tokens if unsure else view.tokens - view.unsure
            if view.full or view.busy or goal - view.ready < pool.page:
                continue
            want = min(goal - view.ready, tokens)
            if prefill is not None:
                while ahead and ahead[-1][0] < self._policy(view):
                    seconds -= ahead.pop()[1]
                within = prefill.tokens_within(seconds, view.ready)
                if not passes and not full:
                    within = max(within, _LEAST_TOKENS)
                want = min(want, within)
            want -= want % pool.page
            if want < pool.page:
                break
            room = view.restore + want + pool.page  # each request may be rounded up by a page
            takes = not unsure and not view.parked and self._preemption != "off"
            found: list[Victim] = []
            had, reached = spare, lower
            while takes and room > had and reached > index + 1:
                reached -= 1
                victim = ranked[reached]
                if victim.held and not victim.full and not victim.busy:
                    found.append(Victim(victim.id, self._swaps(victim, pool)))
                    had += victim.held
            if room > had:
                want = had - view.restore - pool.page
                want -= want % pool.page
                if want < pool.page:
                    if takes:
                        break
                    continue
            victims += found
            spare, lower = had, reached
            if view.restore:
                restores.append(view.id)
            passes.append(Pass(view.id, want))
            tokens -= want
            spare -= view.restore + want + pool.page
            if prefill is not None:
                seconds -= prefill.work_s(want, view.ready)
        return Decision(tuple(victims), tuple(restores), tuple(passes), spare)

    def _swaps(self, view: View, pool: PoolView) -> bool:
        if view.held > pool.host or view.saved >= view.held:
            return False  # no room for a copy, or there is one already
        if self._preemption == "auto":
            return self.cost is not None and self.cost.swap_is_cheaper(view.held)
        return self._preemption == "swap"


def _iterations(missing: int, tokens: int) -> int:
    """How many of `tokens` each compute `missing` ones, at least one, the last one stretched."""
    return -(-max(missing - tokens // _STRETCH, 1) // tokens)
