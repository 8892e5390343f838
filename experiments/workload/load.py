"""The queries that a specification asks for, generated or from traces, in the common form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice

from experiments.spec import WorkloadSpec
from experiments.workload.contents import (
    Contents,
    RandomContents,
    TextContents,
    Tokenize,
    identity,
)
from experiments.workload.generator import generate
from experiments.workload.published import WORKLOADS
from experiments.workload.shapes import Document, Query, Step
from retrieval_clients.traces import Trace, anns_traces, crawler_traces, recorded_traces
from sglang_stream.errors import InvalidRequest

_CHARACTERS_PER_TOKEN = 4  # of English text, for the tokenizers of current models
_RECORDED = ".jsonl"


def by_characters(text: str) -> int:
    """About how many tokens a text has, where no tokenizer is at hand."""
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def queries_of(
    workload: WorkloadSpec, count_tokens: Callable[[str], int] = by_characters
) -> list[Query]:
    """The queries of a workload, tokens divided by its `scale` and times multiplied by its `delay`.

    `count_tokens` is for traces. Raises InvalidRequest for traces that cannot be read, and if there
    are fewer than asked for.
    """
    if workload.trace is not None:
        return _scaled(workload, from_traces(traces_of(workload), count_tokens))
    generated = generate(
        workload.kind, workload.queries, workload.seed, workload.revisions, workload.rest
    )
    return _scaled(workload, generated)


def queries_with_contents(
    workload: WorkloadSpec, tokenize: Tokenize
) -> tuple[list[Query], Contents]:
    """Those queries and what they say: random ids, or the traces' texts. Raises likewise."""
    if workload.trace is None:
        return queries_of(workload), RandomContents(workload.seed)
    traces = traces_of(workload)
    contents = TextContents(traces, tokenize)
    return _scaled(workload, from_traces(traces, contents.count)), contents


def traces_of(workload: WorkloadSpec) -> list[Trace]:
    """The first traces of a workload that has some, as many as it asks for. Raises InvalidRequest
    if they cannot be read or are too few, of the other mode, or two of one query."""
    path = workload.trace
    assert path is not None
    if path.suffix == _RECORDED:
        found = recorded_traces(path, workload.on_bad)
    elif workload.kind == "crawler":
        found = crawler_traces(path, workload.on_bad)
    else:
        found = anns_traces(path, workload.on_bad)
    traces = list(islice(found, workload.queries))
    mode = WORKLOADS[workload.kind].mode
    known: set[str] = set()
    for trace in traces:
        if trace.query_id in known:
            raise InvalidRequest(
                f"{path} has two traces of {trace.query_id}: rows tell queries by their query_id, "
                "leave one of them",
                param="workload.trace",
            )
        known.add(trace.query_id)
        if trace.mode != mode:
            raise InvalidRequest(
                f"{path}: {trace.query_id} is a trace of mode {trace.mode}, and workload.kind "
                f"{workload.kind} is of mode {mode}",
                param="workload.kind",
            )
    if len(traces) < workload.queries:
        raise InvalidRequest(
            f"{path} has {len(traces)} queries with content, not {workload.queries}: set "
            "workload.queries to that",
            param="workload.queries",
        )
    return traces


def from_traces(traces: Iterable[Trace], count_tokens: Callable[[str], int]) -> list[Query]:
    """Traces in the common form. A text is counted once, however often it occurs."""
    counted: dict[str, int] = {}
    queries = []
    for trace in traces:
        steps = []
        for at_s, texts in trace.steps:
            documents = []
            for text in texts:
                name = identity(text.text)
                if name not in counted:
                    counted[name] = count_tokens(text.text)
                documents.append(Document(name, counted[name]))
            steps.append(Step(at_s, tuple(documents)))
        question = count_tokens(trace.query)
        queries.append(Query(trace.query_id, trace.mode, tuple(steps), question_tokens=question))
    return queries


def _scaled(workload: WorkloadSpec, queries: Iterable[Query]) -> list[Query]:
    return [scaled(query, workload.scale, workload.delay) for query in queries]


def scaled(query: Query, scale: float, delay: float) -> Query:
    """The query with its tokens divided by `scale`, each piece keeping one at least, and its times
    multiplied by `delay`."""

    def fewer(tokens: int) -> int:
        return max(round(tokens / scale), min(tokens, 1))

    return replace(
        query,
        steps=tuple(
            Step(at_s * delay, tuple(Document(d.id, fewer(d.tokens)) for d in documents))
            for at_s, documents in query.steps
        ),
        opening_tokens=fewer(query.opening_tokens),
        question_tokens=fewer(query.question_tokens),
    )
