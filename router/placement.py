"""Which worker takes a stream, and which one decodes it: pure, also used by the simulator.

`stream_aware` predicts for each prefill worker the seconds until it could be done with the prompt:

    (prompt tokens still to compute there + those of this prompt that it has not cached
     + tokens of open streams that must be computed again because their KV has to make room
     + tokens that its open streams are still to bring)
    / its speed

and takes the least. A shared prefix thus draws a stream to the worker that has it, until that
worker's queue costs more than computing the prefix anew. Workers that tie, as on a cold cache,
take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_stream.config import PlacementName

_TYPICAL_TOKENS_PER_S = 2000.0  # only until a worker has told its own
_SAME_S = 0.005  # predictions closer than this are a tie
_TO_COME = 512  # tokens that an open stream is expected to bring yet: a page or two


@dataclass(frozen=True)
class WorkerView:
    """A worker as it is placed by; sizes in KV tokens.

    `todo_tokens`: prompt tokens to compute, of requests and open streams. `tokens_per_s`: its
    prefill speed, 0 if not known. `free_tokens`: KV that is free or can be evicted;
    `held_tokens`: KV of open streams. `requests`: running and queued. `streams`: open ones.
    `shared_tokens`: how much of the new prompt it has cached.
    """

    name: str
    todo_tokens: int = 0
    tokens_per_s: float = 0.0
    free_tokens: int = 0
    held_tokens: int = 0
    requests: int = 0
    streams: int = 0
    shared_tokens: int = 0


@dataclass(frozen=True)
class Choice:
    """The worker chosen and why: `prefix`, `load`, `turn` or `only`."""

    name: str
    reason: str


def choose_prefill(
    policy: PlacementName, workers: Sequence[WorkerView], prompt_tokens: int, turn: int
) -> Choice:
    """The worker that is to hold a new stream of which `prompt_tokens` are known.

    `turn` counts the streams placed so far. Raises ValueError without workers.
    """
    if not workers:
        raise ValueError("no prefill workers to choose from")
    if len(workers) == 1:
        return Choice(workers[0].name, "only")
    in_turn = [*workers[turn % len(workers) :], *workers[: turn % len(workers)]]
    match policy:
        case "round_robin":
            return Choice(in_turn[0].name, "turn")
        case "least_loaded":
            return Choice(min(in_turn, key=_load).name, "load")
        case "prefix":
            best = max(in_turn, key=lambda w: (w.shared_tokens, *(-x for x in _load(w))))
            return Choice(best.name, "prefix" if best.shared_tokens else "load")
        case "stream_aware":
            return _stream_aware(in_turn, prompt_tokens)


def choose_decode(
    policy: PlacementName, workers: Sequence[WorkerView], need: int, turn: int
) -> Choice:
    """The worker that is to decode a request of `need` KV tokens, prompt and answer.

    One that has room for it comes before one that has not; then the one with the fewest requests
    for its free KV. Raises ValueError without workers.
    """
    if not workers:
        raise ValueError("no decode workers to choose from")
    if len(workers) == 1:
        return Choice(workers[0].name, "only")
    in_turn = [*workers[turn % len(workers) :], *workers[: turn % len(workers)]]
    if policy == "round_robin":
        return Choice(in_turn[0].name, "turn")
    best = min(in_turn, key=lambda w: (w.free_tokens < need, w.requests, -w.free_tokens))
    return Choice(best.name, "load")


def predicted_s(worker: WorkerView, prompt_tokens: int) -> float:
    """Seconds until `worker` could have computed a prompt of `prompt_tokens`, after what it has."""
    speed = worker.tokens_per_s or _TYPICAL_TOKENS_PER_S
    missing = max(0, prompt_tokens - worker.shared_tokens)
    displaced = min(worker.held_tokens, max(0, missing - worker.free_tokens))
    to_come = worker.streams * _TO_COME
    return (worker.todo_tokens + missing + displaced + to_come) / speed


def _stream_aware(workers: Sequence[WorkerView], prompt_tokens: int) -> Choice:
    ranked = sorted(
        workers, key=lambda w: (round(predicted_s(w, prompt_tokens) / _SAME_S), w.streams)
    )
    best = ranked[0]
    if best.shared_tokens and best.shared_tokens == max(w.shared_tokens for w in workers):
        return Choice(best.name, "prefix")
    runner_up = ranked[1]
    tied = abs(predicted_s(best, prompt_tokens) - predicted_s(runner_up, prompt_tokens)) < _SAME_S
    return Choice(best.name, "turn" if tied and best.streams == runner_up.streams else "load")


def _load(worker: WorkerView) -> tuple[int, int, int]:
    return worker.todo_tokens, worker.requests, worker.streams
