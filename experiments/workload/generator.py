"""Queries like the published ones, from a seed: the same seed and number give the same queries.

Tokens, retrieval times, chunks and gaps of a query follow the published percentiles and means
(`quantiles`). What is not published is modelled so:

Times. Gaps are independent of each other and of their number. What the published retrieval times
leave after the gaps is one more wait: 2.0 of 9.2 s with the crawler, 3.9 of 4.5 s with ANNS in the
mean. It is independent of the gaps and has, as a log-normal, the mean and the variance that they
leave; with the crawler they leave no variance, that is, the published gaps, added up, spread as
the published retrieval times do, 2 s earlier. By default it is the time to the first chunk:

    |<-- the rest -->|<- gap ->|<- gap ->|        rest="first"
    |<- gap ->|<- gap ->|<-- the rest -->|        rest="last"
    began     chunk     chunk            chunk

"last" is how the published ANNS traces are replayed: a row's list is sent when its time is over,
and a search goes on long after its list has settled. Gaps are then those before the last.

Tokens. Documents of a query are independent log-normal ones, as wide as makes their sum's spread
the published one; then each query's documents are scaled together so that all queries have the
published percentiles. Tokens count the whole final prompt, opening and question included. In
update mode they are those of the last list, and what `Revisions` does to the lists before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.workload.published import WORKLOADS, PublishedWorkload, WorkloadKind
from experiments.workload.quantiles import (
    Floats,
    Ints,
    Quantiles,
    WholeNumbers,
    counted,
    log_normal,
    stratified,
    through,
)
from experiments.workload.revisions import MEASURED, Revisions, revise
from experiments.workload.shapes import Document, Query, Step
from sglang_stream.messages import Mode

Rest = Literal["first", "last"]

# A system prompt of a sentence and a short question: assumed, 1 % of the median prompt.
OPENING_TOKENS = 32
QUESTION_TOKENS = 32
# The context length of Llama 3.1, the model of the published runs.
MOST_TOKENS = 131_072
_DIGITS = 6  # of seconds


def generate(
    kind: WorkloadKind,
    count: int,
    seed: int,
    revisions: Revisions = MEASURED,
    rest: Rest = "first",
) -> list[Query]:
    """`count` queries of this workload. `revisions` shape update lists only."""
    model = _fitted(WORKLOADS[kind])
    digest = hashlib.sha256(f"workload/{kind}/{seed}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    chunks = model.chunks.values(stratified(rng, count))
    times = _times(model, chunks, rest, rng)
    lists = _lists(model.mode, chunks, revisions, rng)
    weights = _weights(model, lists, rng)
    # The more a query's documents weigh, the more tokens it has: their shares stay as drawn.
    finals = [float(w[final].sum()) for w, (*_, final) in zip(weights, lists, strict=True)]
    tokens = np.sort(model.tokens.values(stratified(rng, count)))
    totals = np.rint(tokens[_ranks(np.array(finals))])
    queries = []
    for number, at_s in enumerate(times):
        name = f"{kind}-{seed}-{number}"
        documents = _documents(name, weights[number], lists[number][-1], int(totals[number]))
        steps = (
            Step(s, tuple(documents[i] for i in shown))
            for s, shown in zip(at_s, _shown(model.mode, lists[number]), strict=True)
        )
        queries.append(Query(name, model.mode, tuple(steps), OPENING_TOKENS, QUESTION_TOKENS))
    return queries


@dataclass(frozen=True)
class _Model:
    """The distributions of a workload. `rest`: of the time that the gaps leave."""

    mode: Mode
    tokens: Quantiles
    retrieval: Quantiles
    gaps: Quantiles
    rest: Quantiles
    chunks: WholeNumbers


def _fitted(published: PublishedWorkload) -> _Model:
    chunks = counted(published.chunks, published.queries)
    gaps, retrieval = through(published.gap_s), through(published.retrieval_s)
    # Of a sum of n independent gaps: E[n] Var[gap] + E[gap]^2 Var[n].
    per_gap = (published.chunks.mean - 1) * gaps.squared_variation
    per_count = chunks.squared_variation * published.chunks.mean**2
    gap_variance = published.gap_s.mean**2 * (per_gap + per_count)
    variance = published.retrieval_s.mean**2 * retrieval.squared_variation - gap_variance
    mean = published.retrieval_s.mean - (published.chunks.mean - 1) * published.gap_s.mean
    rest = log_normal(mean, max(variance, 0.0) / mean**2)
    tokens = through(published.tokens, MOST_TOKENS)
    return _Model(published.mode, tokens, retrieval, gaps, rest, chunks)


def _times(model: _Model, chunks: Ints, rest: Rest, rng: np.random.Generator) -> list[list[float]]:
    """When the chunks of each query arrive, in seconds after it began."""
    gaps = model.gaps.values(stratified(rng, int((chunks - 1).sum())))
    own_gaps = np.split(gaps, np.cumsum(chunks - 1)[:-1])
    gap_sums = np.array([float(own.sum()) for own in own_gaps])
    drafts = gap_sums + model.rest.values(stratified(rng, len(chunks)))
    # The drafts are spread almost as published; with their ranks kept they are so exactly.
    wholes = np.sort(model.retrieval.values(stratified(rng, len(chunks))))[_ranks(drafts)]
    times = []
    for own, gap_sum, draft, whole in zip(own_gaps, gap_sums, drafts, wholes, strict=True):
        # Rare: where the gaps alone are longer than the whole, everything is drawn together.
        scale = whole / draft if gap_sum > whole else 1.0
        left = whole - gap_sum * scale
        waits = [left, *own * scale] if rest == "first" else [*own * scale, left]
        times.append([round(float(at_s), _DIGITS) for at_s in np.cumsum(waits)])
    return times


def _lists(
    mode: Mode, chunks: Ints, revisions: Revisions, rng: np.random.Generator
) -> list[list[list[int]]]:
    """The numbers of the documents in each list of each query; the last list is the prompt's.
    The pages of an append query are one list."""
    if mode == "append":
        return [[list(range(count))] for count in chunks]
    return [revise(revisions, int(count), rng) for count in chunks]


def _shown(mode: Mode, lists: list[list[int]]) -> list[list[int]]:
    """The documents of each step: one page after the other, or the lists."""
    return [[i] for i in lists[-1]] if mode == "append" else lists


def _weights(model: _Model, lists: list[list[list[int]]], rng: np.random.Generator) -> list[Floats]:
    """The relative length of each document that a query ever has.

    Of a sum of n independent documents the squared variation is that of one, divided by the mean
    n, plus that of n.
    """
    mean = float(np.mean([len(final) for *_, final in lists]))
    of_count = model.chunks.squared_variation if model.mode == "append" else 0.0
    one = log_normal(1.0, mean * (model.tokens.squared_variation - of_count))
    known = [1 + max(map(max, own)) for own in lists]
    return np.split(one.values(stratified(rng, sum(known))), np.cumsum(known)[:-1])


def _documents(name: str, weights: Floats, final: list[int], total: int) -> list[Document]:
    """The documents of a query; those of the `final` list have, with opening and question,
    `total` tokens (but one each at least), the others as many as their weight says."""
    spare = max(total - OPENING_TOKENS - QUESTION_TOKENS - len(final), 0)
    unit = spare / weights[final].sum()
    tokens = 1 + np.rint(weights * unit).astype(int)
    # Rounded together, so that the sum is exact.
    tokens[final] = 1 + np.diff(np.rint(np.cumsum(weights[final]) * unit), prepend=0).astype(int)
    return [Document(f"{name}/{i}", int(count)) for i, count in enumerate(tokens)]


def _ranks(values: Floats) -> Ints:
    """The place of each value among all, from 0 for the lowest."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks
