from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.spec import WorkloadSpec
from experiments.workload.contents import VOCABULARY, RandomContents, TextContents
from experiments.workload.generator import generate
from experiments.workload.load import (
    by_characters,
    from_traces,
    queries_of,
    queries_with_contents,
    scaled,
    traces_of,
)
from experiments.workload.shapes import Document, Query, Step, common_tokens
from retrieval_clients.traces import Trace, TraceDocument, TraceStep, write_trace
from sglang_stream.errors import InvalidRequest


def words(text: str) -> list[int]:
    """A tokenizer: each word is its length."""
    return [len(word) for word in text.split()]


def count_words(text: str) -> int:
    return len(text.split())


A = TraceDocument("a", "one two three")
B = TraceDocument("b", "four five")
A_AGAIN = TraceDocument("other", A.text)
A_CHANGED = TraceDocument("a", "it has changed by now")
SEARCH = Trace(
    "q0",
    "why is that",
    "update",
    (TraceStep(1.0, (A, B)), TraceStep(2.0, (A_AGAIN, B)), TraceStep(3.0, (A_CHANGED, B))),
)


def recorded(tmp_path: Path, *traces: Trace) -> Path:
    path = tmp_path / "traces.jsonl"
    for trace in traces:
        write_trace(path, trace)
    return path


def test_traces_take_the_common_form() -> None:
    (query,) = from_traces([SEARCH], count_words)
    assert (query.query_id, query.mode) == ("q0", "update")
    assert [step.at_s for step in query.steps] == [1.0, 2.0, 3.0]
    assert [[d.tokens for d in step.documents] for step in query.steps] == [[3, 2], [3, 2], [5, 2]]
    assert (query.opening_tokens, query.question_tokens, query.prompt_tokens) == (0, 3, 10)


def test_documents_are_the_same_by_their_content() -> None:
    (query,) = from_traces([SEARCH], count_words)
    first, second, third = (step.documents for step in query.steps)
    assert first == second
    assert common_tokens(second, third) == 0
    assert second[1] == third[1]


def test_each_text_is_counted_once() -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return 1

    from_traces([SEARCH, SEARCH], count)
    assert sorted(t for t in counted if t != SEARCH.query) == sorted(
        [A.text, B.text, A_CHANGED.text]
    )


def test_each_text_is_tokenised_once_and_none_while_a_load_runs() -> None:
    seen: list[str] = []

    def tokenize(text: str) -> list[int]:
        seen.append(text)
        return words(text)

    contents = TextContents([SEARCH], tokenize)
    (query,) = from_traces([SEARCH], contents.count)
    contents.question(query)
    for step in query.steps:
        for document in step.documents:
            contents.document(document)
    assert sorted(seen) == sorted([SEARCH.query, A.text, B.text, A_CHANGED.text])


def test_text_contents_are_the_ids_of_the_texts() -> None:
    contents = TextContents([SEARCH], words)
    (query,) = from_traces([SEARCH], count_words)
    assert [contents.document(d) for d in query.steps[0].documents] == [[3, 3, 5], [4, 4]]
    assert contents.question(query) == [3, 2, 4]
    assert contents.opening(query) == []
    half = scaled(query, 2, 1)
    assert [contents.document(d) for d in half.steps[0].documents] == [[3, 3], [4]]


def test_random_contents_are_told_by_seed_and_identity() -> None:
    contents, again = RandomContents(3), RandomContents(3)
    first, second = generate("crawler", 2, 0)
    document = Document("d", 1000)
    ids = contents.document(document)
    assert ids == again.document(document)
    assert len(ids) == 1000
    assert all(type(i) is int and i in VOCABULARY for i in ids)
    assert ids != contents.document(Document("e", 1000))
    assert ids != RandomContents(4).document(document)
    assert contents.opening(first) != contents.opening(second)
    assert len(contents.opening(first)) == first.opening_tokens
    assert len(contents.question(first)) == first.question_tokens


def test_scaling_divides_tokens_and_delay_multiplies_times() -> None:
    step = Step(1.5, (Document("a", 100), Document("b", 3)))
    query = Query("q", "append", (step,), opening_tokens=0, question_tokens=20)
    small = scaled(query, 10, 4)
    assert small.steps == (Step(6.0, (Document("a", 10), Document("b", 1))),)
    assert (small.opening_tokens, small.question_tokens) == (0, 2)
    assert scaled(query, 1, 1) == query


def test_generated_queries_are_those_of_the_spec() -> None:
    spec = WorkloadSpec("crawler", 20, seed=5, scale=10, delay=3)
    assert queries_of(spec) == [scaled(q, 10, 3) for q in generate("crawler", 20, 5)]
    late = WorkloadSpec("anns", 20, rest="last")
    assert queries_of(late) == generate("anns", 20, 0, rest="last")
    assert queries_with_contents(spec, words) == (queries_of(spec), RandomContents(5))


def test_recorded_traces_are_taken_as_many_as_asked_for(tmp_path: Path) -> None:
    second = Trace("q1", "?", "update", SEARCH.steps)
    path = recorded(tmp_path, SEARCH, second)
    (query,) = queries_of(WorkloadSpec("anns", 1, trace=path, scale=2, delay=10), count_words)
    assert query.query_id == "q0"
    assert query.last_chunk_s == 30
    assert [d.tokens for d in query.steps[0].documents] == [2, 1]
    two, contents = queries_with_contents(WorkloadSpec("anns", 2, trace=path), words)
    assert two == from_traces([SEARCH, second], count_words)
    assert contents.document(query.steps[0].documents[1]) == [4]
    with pytest.raises(InvalidRequest, match=r"traces\.jsonl has 2 queries with content, not 3"):
        queries_of(WorkloadSpec("anns", 3, trace=path))


def test_two_traces_of_one_query_are_refused(tmp_path: Path) -> None:
    path = recorded(tmp_path, SEARCH, Trace("q0", "?", "update", SEARCH.steps))
    with pytest.raises(InvalidRequest, match=r"traces\.jsonl has two traces of q0"):
        traces_of(WorkloadSpec("anns", 2, trace=path))
    assert traces_of(WorkloadSpec("anns", 1, trace=path)) == [SEARCH]


def test_a_trace_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    path = recorded(tmp_path, SEARCH)
    with pytest.raises(InvalidRequest, match=r"q0 is a trace of mode update, and workload\.kind"):
        traces_of(WorkloadSpec("crawler", 1, trace=path))


def test_published_traces_are_read_by_kind(tmp_path: Path) -> None:
    (tmp_path / "query_0.csv").write_text(
        "type,query,endTime,content\ntavily_search,why,0.5,\npage_scrape,,1.5,some text\n"
    )
    (crawl,) = queries_of(WorkloadSpec("crawler", 1, trace=tmp_path))
    assert (crawl.mode, crawl.last_chunk_s, crawl.context_tokens(1)) == ("append", 1.5, 3)
    (tmp_path / "0.csv").write_text('StartTime_us,EndTime_us,PipelinePool\n0,500000,"(1)"\n')
    (tmp_path / "retrieved_corpus_content.part.0.json").write_text('{"1": "some text"}')
    found = tmp_path / "map.json"
    found.write_text(json.dumps({"0": {"query": "why", "trace_file": "0.csv"}}))
    (search,) = queries_of(WorkloadSpec("anns", 1, trace=found))
    assert (search.mode, search.last_chunk_s) == ("update", 0.5)


def test_bad_rows_are_skipped_if_the_spec_says_so(tmp_path: Path) -> None:
    path = recorded(tmp_path, SEARCH)
    path.write_text("{\n" + path.read_text())
    with pytest.raises(InvalidRequest, match="line 1"):
        traces_of(WorkloadSpec("anns", 1, trace=path))
    assert traces_of(WorkloadSpec("anns", 1, trace=path, on_bad="skip")) == [SEARCH]


def test_tokens_without_a_tokenizer_are_a_quarter_of_the_characters() -> None:
    assert [by_characters(text) for text in ("", "a", "abcd", "abcde")] == [0, 1, 1, 2]
