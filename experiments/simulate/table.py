"""What chunks, updates and seals do to the streams of one worker.

The counterpart of `sglang_stream/engine/table.py`.
"""

from __future__ import annotations

from heapq import heappop, heappush

from experiments.simulate.holdings import Holdings, Stream
from experiments.simulate.pool import Node, Prompt
from experiments.workload.shapes import common_tokens
from sglang_stream.messages import Mode
from sglang_stream.policy import SealPredictor, Survival


class StreamTable:
    """The streams of a worker. `now`: when its loop last looked for events. `foresees`: what
    updates are likely to replace."""

    def __init__(self, kv: Holdings, *, foresees: bool = True) -> None:
        self.kv = kv
        self.now = 0.0
        self.live: dict[str, Stream] = {}
        self.open_count = 0
        self._arrivals = 0
        self._predictor = SealPredictor()
        self._survival = Survival()
        self._foresees = foresees
        self._dues: list[tuple[float, str]] = []

    def arrive(self) -> int:
        """The next place in the order of arrival, of streams, chunks and requests alike."""
        self._arrivals += 1
        return self._arrivals

    def next_due_s(self) -> float | None:
        """When the next seal is predicted; None if none is."""
        while self._dues:
            due_s, stream_id = self._dues[0]
            stream = self.live.get(stream_id)
            if (
                due_s >= self.now
                and stream is not None
                and stream.due_s == due_s
                and not stream.sealed
            ):
                return due_s
            heappop(self._dues)
        return None

    def open(self, stream_id: str, mode: Mode, opening: Prompt) -> Stream:
        """Begins a stream."""
        arrival = self.arrive()
        stream = Stream(
            stream_id,
            mode,
            arrival,
            opening,
            opening,
            tokens_of(opening),
            latest=arrival,
            since_s=self.now,
            last_chunk_s=self.now,
        )
        self.live[stream_id] = stream
        self.open_count += 1
        self._predict(stream)
        self.kv.hold(stream)
        return stream

    def append(self, stream: Stream, documents: Prompt) -> None:
        """Adds a chunk."""
        was_ready = self.kv.is_ready(stream)
        stream.prompt += documents
        stream.tokens += tokens_of(documents)
        stream.usage.chunks += 1
        self._arrived(stream, was_ready)
        self.kv.hold(stream)

    def update(self, stream: Stream, documents: Prompt) -> None:
        """Replaces the context."""
        prompt = stream.opening + documents
        lcp = common_tokens(stream.prompt, prompt)
        if stream.usage.updates:
            self._survival.updated(lcp, stream.tokens)
        was_ready = self.kv.is_ready(stream)
        stream.usage.updates += 1
        stream.usage.lcp_tokens += lcp
        self._arrived(stream, was_ready)
        given_up = self.kv.replace(stream, prompt, tokens_of(prompt), lcp)
        stream.usage.invalidated_tokens += given_up

    def seal(self, stream: Stream) -> None:
        """Ends the context."""
        stream.sealed = True
        stream.usage.ready_tokens = max(stream.held, stream.saved)
        self.open_count -= 1
        self._predictor.sealed(stream.usage.chunks + stream.usage.updates)
        stream.since_s = self.now
        self.kv.rank(stream)

    def admitted(self, stream: Stream) -> None:
        """Its request has its own lock now."""
        self.kv.forget(stream)

    def finish(self, stream: Stream) -> None:
        """Its generation is over."""
        del self.live[stream.id]

    def pass_done(self, stream: Stream, prompt: Prompt, start: int, end: int, leaf: Node) -> None:
        """The KV of the tokens from `start` to `end` of what then was the prompt is in the tree,
        locked up to `leaf`. The stream may have changed meanwhile."""
        stream.in_flight = False
        stream.usage.passes += 1
        stream.usage.computed_tokens += end - start
        lcp = min(end, common_tokens(stream.prompt, prompt))
        stream.usage.recomputed_tokens += max(0, min(stream.reach, end) - start)
        stream.reach = max(stream.reach, lcp)
        self.kv.computed(stream, leaf, fits=lcp == end)
        if lcp < end:
            stream.usage.invalidated_tokens += end - max(lcp, start)

    def _arrived(self, stream: Stream, was_ready: bool) -> None:
        if stream.usage.chunks + stream.usage.updates > 1:
            gap = max(0.0, self.now - stream.last_chunk_s)
            stream.gaps_s += gap
            self._predictor.gap(gap)
        if was_ready:
            stream.since_s = self.now
        stream.preempted = False
        stream.last_chunk_s = self.now
        stream.latest = self.arrive()
        self._predict(stream)

    def _predict(self, stream: Stream) -> None:
        chunks = stream.usage.chunks + stream.usage.updates
        stream.due_s = self._predictor.due_s(chunks, stream.last_chunk_s, stream.gaps_s)
        heappush(self._dues, (stream.due_s, stream.id))
        if stream.mode == "update" and self._foresees:
            stream.stays = self._survival.part(self._predictor.to_come(chunks))


def tokens_of(prompt: Prompt) -> int:
    return sum(document.tokens for document in prompt)
