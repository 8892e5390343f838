"""How the list of a progressive search changes: new documents come in and push others off its end,
documents change places, and a list flips back to the one before.

    A B C D  ->  A X B C  ->  A B C D  ->  A C B D
             X at 1, D out    flips back   C moves up
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retrieval_clients.traces import Trace


@dataclass(frozen=True)
class Revisions:
    """Of lists that change.

    `documents`: of a list. `flips`: share of the updates, from the third list on, that bring back
    the list before the last one. In each other update: `inserted`, the mean number of documents
    that come in, and `moved`, of those that change places (together 1 or more, since a list that
    has not changed is no update). `depth`: the mean place of these, 0 the top and 1 the end of the
    list. `returned`: share of the documents coming in that an earlier list had.
    """

    documents: int
    inserted: float
    moved: float
    depth: float
    returned: float
    flips: float

    def __post_init__(self) -> None:
        if self.documents < 1 or (self.documents == 1 and not self.inserted):
            raise ValueError("documents: 1 or more, and 2 or more where none comes in")
        if self.inserted < 0 or self.moved < 0 or self.inserted + self.moved <= 0:
            raise ValueError("inserted and moved: 0 or more each, and one of them above 0")
        if not all(0 <= share <= 1 for share in (self.depth, self.returned, self.flips)):
            raise ValueError("depth, returned and flips are shares, from 0 to 1")


# Of 300 searches of an inverted file over passages of documentation, measured by
# `sglang-stream progressive --no-engine --questions 300`: a wider search only finds nearer
# documents, so none that has gone comes back, and none changes its place among the others. (With a
# graph: 1.99 come in, at 0.56.) Other searches rerank, or lose what they had: give theirs.
MEASURED = Revisions(documents=8, inserted=2.35, moved=0.0, depth=0.54, returned=0.0, flips=0.0)


def revise(revisions: Revisions, lists: int, rng: np.random.Generator) -> list[list[int]]:
    """So many lists of a search, each different from the one before; documents are numbered in the
    order in which they first occur."""
    made = [list(range(revisions.documents))]
    known = revisions.documents
    while len(made) < lists:
        if len(made) > 1 and rng.random() < revisions.flips:
            made.append(made[-2])
            continue
        new, known_then = _edited(made, known, revisions, rng)
        if new != made[-1]:
            made.append(new)
            known = known_then
    return made


def _edited(
    made: Sequence[list[int]], known: int, revisions: Revisions, rng: np.random.Generator
) -> tuple[list[int], int]:
    """The last list after some edits, and how many documents are known then."""
    new = list(made[-1])
    mean = revisions.inserted + revisions.moved
    edits = 1 + rng.poisson(max(mean - 1, 0))
    insertions = rng.binomial(edits, revisions.inserted / mean)
    for _ in range(edits - insertions):
        place = max(int(len(new) * _place(revisions.depth, rng)), 1)
        if place < len(new):
            new[place - 1], new[place] = new[place], new[place - 1]
    gone = sorted({d for documents in made for d in documents} - set(made[-1]))
    for number in range(insertions):
        place = int(len(new) * _place(revisions.depth, rng))
        document = known + number
        if gone and rng.random() < revisions.returned:
            document = gone.pop(int(rng.integers(len(gone))))
        new = [*new[:place], document, *new[place:-1]]
    return _renumbered(new, known)


def _renumbered(new: list[int], known: int) -> tuple[list[int], int]:
    """The list with those of its documents that are not `known` numbered without gaps: one that
    came in may have been pushed out by the same update's next."""
    numbers = {d: known + i for i, d in enumerate(sorted(d for d in new if d >= known))}
    return [numbers.get(d, d) for d in new], known + len(numbers)


def _place(mean: float, rng: np.random.Generator) -> float:
    """Between 0 and 1 (never 1): a power of a uniform number that has this mean."""
    mean = min(max(mean, 0.01), 0.99)
    return float(rng.random() ** ((1 - mean) / mean))


def measure_revisions(traces: Iterable[Trace]) -> Revisions:
    """What recorded update traces show, to generate others like them.

    Raises ValueError if there is no update in which a list changed.
    """
    sizes: list[int] = []
    inserted = returnable = returned = moved = edited = flipped = flippable = 0
    places: list[float] = []
    for trace in traces:
        lists = list(_changed(trace))
        sizes += map(len, lists)
        seen = set(lists[0]) if lists else set()
        for i in range(1, len(lists)):
            old, new = lists[i - 1], lists[i]
            flippable += i > 1
            if i > 1 and new == lists[i - 2]:
                flipped += 1
                continue
            coming = set(new) - set(old)
            moving = out_of_place(old, new)
            edited += 1
            inserted += len(coming)
            returnable += len(coming) if seen - set(old) else 0
            returned += len(coming & seen)
            moved += len(moving)
            seen |= coming
            last = max(len(new) - 1, 1)
            places += [at / last for at, d in enumerate(new) if d in coming or d in moving]
    if not edited:
        raise ValueError("no list of these traces ever changes")
    return Revisions(
        documents=round(float(np.mean(sizes))),
        inserted=inserted / edited,
        moved=moved / edited,
        depth=float(np.mean(places)) if places else 0.5,
        returned=returned / returnable if returnable else 0.0,
        flips=flipped / flippable if flippable else 0.0,
    )


def _changed(trace: Trace) -> Iterator[tuple[str, ...]]:
    """The ids of each list that is not the one before."""
    before = None
    for step in trace.steps:
        ids = tuple(document.id for document in step.documents)
        if ids != before:
            yield ids
        before = ids


def out_of_place(old: Sequence[str], new: Sequence[str]) -> set[str]:
    """The fewest documents of both lists that must change places to turn one order into the
    other: those outside a longest rising run of their places in the old list."""
    place = {d: i for i, d in enumerate(old)}
    common = [d for d in new if d in place]
    ends: list[int] = []  # the lowest place that a run of each length ends with
    lengths: list[int] = []
    for document in common:
        length = bisect_left(ends, place[document])
        ends[length : length + 1] = [place[document]]
        lengths.append(length)
    kept: set[str] = set()
    wanted = len(ends) - 1
    for document, length in zip(reversed(common), reversed(lengths), strict=True):
        if length == wanted:
            kept.add(document)
            wanted -= 1
    return set(common) - kept
