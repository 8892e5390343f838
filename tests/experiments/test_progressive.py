from __future__ import annotations

import asyncio
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from experiments.progressive import corpus as corpus_module
from experiments.progressive.corpus import Corpus, build_corpus, first_sentence, hold_out
from experiments.progressive.measure import (
    ORDERS,
    Measured,
    Searched,
    find_documents,
    out_of_order,
    search,
)
from experiments.progressive.report import search_table, streaming_table
from experiments.progressive.run import main
from experiments.workload.revisions import Revisions
from retrieval_clients.anns import SearchSettings
from retrieval_clients.passages import Passage, PassageSettings
from sglang_stream.errors import InvalidRequest, StreamError

WORDS = "table row column matrix vector server request reply socket thread lock queue".split()
PASSAGES = [
    Passage("p==1", f"m.f{i}", part, f"Moves a {a} to the {b} that holds {c} number {i}. More.")
    for i, (a, b, c) in enumerate((a, b, c) for a in WORDS for b in WORDS for c in WORDS[:4])
    for part in (0, 1)
]


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr(corpus_module, "installed_passages", lambda cache, settings: PASSAGES)
    return build_corpus(tmp_path, PassageSettings(), "ivf", 5, seed=1)


def printed(table: Table) -> str:
    out = StringIO()
    Console(file=out, width=140).print(table)
    return out.getvalue()


def test_a_question_is_the_sentence_a_docstring_begins_with() -> None:
    text = "Returns the rows of\na table, in their order. Then more."
    assert first_sentence(Passage("p==1", "m.f", 0, text)) == (
        "Returns the rows of a table, in their order."
    )
    assert first_sentence(Passage("p==1", "docs/a.md", 0, text)) is None
    assert first_sentence(Passage("p==1", "description", 0, text)) is None
    assert first_sentence(Passage("p==1", "m.f", 0, "Short. Text.")) is None


def test_no_part_of_a_questions_docstring_stays_in_the_index() -> None:
    asked, kept = hold_out(PASSAGES, 10, seed=3)
    names = {passage.name for passage, _ in asked}
    assert len(names) == 10
    assert len(kept) == len(PASSAGES) - 20
    assert names.isdisjoint(p.name for p in kept)
    assert hold_out(PASSAGES, 10, seed=3) == (asked, kept)
    assert hold_out(PASSAGES, 10, seed=4)[0] != asked


def test_more_questions_than_there_are_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match="--questions 9999"):
        hold_out(PASSAGES, 9999, seed=0)


def test_a_search_becomes_a_trace_with_its_times(built: Corpus) -> None:
    searched = Searched()
    question = built.questions[0]

    async def run() -> list[list[str]]:
        settings = SearchSettings(k=4, with_recall=True)
        found = search(built.index, question, settings, searched)
        return [[hit.id for hit in top] async for top in found]

    lists = asyncio.run(run())
    trace = searched.trace(question)
    assert (trace.query_id, trace.query, trace.mode) == (question.id, question.text, "update")
    assert [[d.id for d in step.documents] for step in trace.steps] == lists
    assert [step.at_s for step in trace.steps] == [top.at_s for top in searched.lists]
    assert searched.began_s < searched.last_s <= searched.ended_s
    assert searched.steps >= len(lists)


def test_documents_are_found_where_they_stand() -> None:
    opening, tail = [9, 9], [8]
    pieces = [[1, 2], [3], [1, 2, 3, 4]]  # one begins as another does
    prompt = [*opening, *pieces[2], *pieces[1], *pieces[0], *tail]
    assert find_documents(prompt, pieces) == [2, 1, 0]
    assert find_documents([*opening, *tail], []) == []


@pytest.mark.parametrize("prompt", [[9, 1, 2, 8], [9, 1, 2, 7, 3, 8]])
def test_a_prompt_that_is_not_the_lists_is_an_error(prompt: list[int]) -> None:
    with pytest.raises(StreamError, match="document 2 of 2"):
        find_documents(prompt, [[1, 2], [3]])


def test_the_share_out_of_order_is_the_least_to_move() -> None:
    assert out_of_order([0, 1, 2, 3]) == 0
    assert out_of_order([1, 2, 3, 0]) == 0.25
    assert out_of_order([3, 2, 1, 0]) == 0.75
    assert out_of_order(range(12)) == 0
    assert out_of_order([]) == 0


def measured(order: str, same: bool = True) -> Measured:
    return Measured(
        question="q",
        order="sticky" if order == "sticky" else "relevance",
        documents=8,
        lists=4,
        steps=7,
        is_stable=True,
        first_recall=0.5,
        last_recall=1.0,
        last_list_s=2.0,
        search_s=3.5,
        updates=4,
        prompt_tokens=1200,
        lcp_tokens=990,
        invalidated_tokens=1583,
        computed_tokens=2779,
        ready_tokens=1196,
        out_of_order=0.25 if order == "sticky" else 0.0,
        waiting_ttft_s=0.8,
        streaming_ttft_s=0.06,
        same_tokens=same,
    )


def test_the_table_states_the_pace_and_both_orders() -> None:
    text = printed(streaming_table([measured(order) for order in ORDERS], "IVF", 500))
    for figure in ("step-ms 500", "made to last 500 ms", "25.0%", "1,583", "0.060 s", "1 of 1"):
        assert figure in text


def test_answers_that_differ_are_not_hidden() -> None:
    rows = [measured("relevance"), measured("sticky", same=False)]
    assert "ONLY 0 of 1" in printed(streaming_table(rows, "IVF", 500))


def test_the_changes_of_the_lists_are_told(built: Corpus) -> None:
    searched = Searched()

    async def run() -> None:
        settings = SearchSettings(k=4, with_recall=True)
        async for _ in search(built.index, built.questions[0], settings, searched):
            pass

    asyncio.run(run())
    trace = searched.trace(built.questions[0])
    revisions = Revisions(4, inserted=1.5, moved=0.0, depth=0.5, returned=0.0, flips=0.0)
    text = printed(search_table([trace], [(0.5, 1.0)], [7], revisions, "IVF", 0))
    for figure in ("own speed", "0.500, 1.000", "1.50"):
        assert figure in text


def test_a_server_of_ones_own_needs_its_tokenizer() -> None:
    with pytest.raises(InvalidRequest, match="--model-path"):
        main(["--base-url", "http://localhost:30000"])
