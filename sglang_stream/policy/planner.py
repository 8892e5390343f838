"""Which open streams are computed in the next iteration, and whose KV makes room.

Two phases (Stream2LLM, section 4): *decide* walks the rank and takes what fits the token budget
and the KV that could be had; *acquire* finds that KV, first what is available, then by preempting
from the lowest rank upward. Full requests come before open streams; open streams are served first
come, first served, those with nothing to compute last. A preempted stream counts among these until
something arrives for it: it takes KV that nobody holds, but no other stream's. Two streams that do
not fit together would otherwise take each other's KV for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sglang_stream.policy.types import Decision, FullView, Pass, PoolView, StreamView


def rank(streams: Iterable[StreamView]) -> list[StreamView]:
    """Streams by priority: sealed ones, those that work, the others; by arrival in each group."""
    return sorted(streams, key=lambda s: (not s.sealed, not s.works, s.arrival))


def choose_victims(ranked: Sequence[StreamView], deficit: int) -> tuple[str, ...]:
    """The fewest streams from the end of `ranked` whose KV covers `deficit`; all if it cannot."""
    victims: list[str] = []
    for stream in reversed(ranked):
        if deficit <= 0:
            break
        if stream.held:
            victims.append(stream.stream_id)
            deficit -= stream.held
    return tuple(victims)


def plan(
    full: Sequence[FullView],
    streams: Iterable[StreamView],
    pool: PoolView,
    *,
    pass_tokens: int,
    page_size: int,
) -> Decision:
    """The next iteration, from the full requests at the head of the queue and all streams.

    Args:
        full: waiting full requests in the order in which the engine will admit them, as many as
            the iteration could admit.
        streams: every stream that holds KV or has tokens to compute, except those computed now.
        pool: KV that is available to full requests and to open streams.
        pass_tokens: the most tokens of open streams in one iteration.
        page_size: a pass computes whole pages; smaller slices are left for later.

    A full request that does not fit even without any stream keeps all KV for itself: open streams
    then get no pass, and the streams whose KV it may use are preempted, the least of them first.
    """
    ranked = rank(streams)
    need = sum(request.need for request in full)
    if need > pool.available:
        # A waiting sealed stream is preempted too, or several of them could block each other.
        return Decision(victims=choose_victims(ranked, need - pool.available))

    spare = pool.spare - need
    taken: list[Pass] = []
    victims: list[str] = []
    budget = pass_tokens
    lower = len(ranked)  # ranked[lower:] has been preempted
    for index, stream in enumerate(ranked):
        if stream.sealed or not stream.missing:
            continue
        if budget < page_size or index >= lower:
            break
        want = min(stream.missing, budget)
        want -= want % page_size
        room = want + page_size  # the allocator may round each request up by a page
        while stream.works and room > spare and lower > index + 1:
            lower -= 1
            if ranked[lower].held:
                victims.append(ranked[lower].stream_id)
                spare += ranked[lower].held
        if room > spare:
            want = spare - page_size
            want -= want % page_size
        if want < page_size:
            break
        taken.append(Pass(stream.stream_id, want))
        budget -= want
        spare -= want + page_size
    return Decision(tuple(victims), tuple(taken))
