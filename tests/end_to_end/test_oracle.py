"""Streams through the SDK: the same greedy tokens as one cold request with the same prompt, the
prompt that was meant, and right counters."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from sglang_stream import StreamUsage
from tests.end_to_end.asking import ask, paced
from tests.end_to_end.server import Server
from tests.end_to_end.texts import Prompts, common_prefix, ids, words

HISTORY = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Is anybody there?"},
    {"role": "assistant", "content": "Yes."},
]
OPENINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "messages": {"messages": HISTORY},
    "preamble": {"messages": HISTORY[:1], "preamble": "Which page names it? The pages: "},
    "prompt": {"prompt": "Pages, as they come:\n"},
    "input_ids": {"input_ids": ids("opening", 20)},
}
QUESTION = "\nWhat do the pages say?"
BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@pytest.mark.parametrize("opening", OPENINGS)
@BOTH
def test_append(server: Server, prompts: Prompts, opening: str, asynchronous: bool) -> None:
    chunks = ["", words("one", 40), {"id": "p2", "text": words("two", 40)}, "", {"text": ""}, "end"]
    context = f"{chunks[1]}{words('two', 40)}\n\n\n\nend"
    answer = ask(server, chunks, asynchronous=asynchronous, question=QUESTION, **OPENINGS[opening])
    assert prompts.decode(answer.prompt) == prompts.text(OPENINGS[opening], context, QUESTION)
    assert answer.tokens == server.cold(answer.prompt).tokens
    assert prompts.decode(answer.tokens) == answer.text


@pytest.mark.parametrize("opening", OPENINGS)
@BOTH
def test_update(server: Server, prompts: Prompts, opening: str, asynchronous: bool) -> None:
    a, b, c = (words(name, 40) for name in "abc")
    lists = [[a], [b, a], [], [c, {"id": "b", "text": b}, "", a]]
    answer = ask(
        server,
        lists,
        asynchronous=asynchronous,
        mode="update",
        question=QUESTION,
        **OPENINGS[opening],
    )
    context = f"{c}\n\n{b}\n\n\n\n{a}\n\n"
    assert prompts.decode(answer.prompt) == prompts.text(OPENINGS[opening], context, QUESTION)
    assert answer.tokens == server.cold(answer.prompt).tokens
    assert answer.usage.stream is not None
    assert 1 <= answer.usage.stream.updates <= len(lists)


@BOTH
@pytest.mark.usefixtures("empty_cache")
def test_counters_of_an_append_stream(server: Server, asynchronous: bool) -> None:
    chunks = [ids(("chunk", i), n) for i, n in enumerate((200, 1, 90))]
    opening, question = ids("opening", 30), ids("question", 9)
    answer = ask(
        server,
        paced(server, chunks),
        asynchronous=asynchronous,
        input_ids=opening,
        question_ids=question,
    )
    assert answer.prompt == [*opening, *(t for chunk in chunks for t in chunk), *question]
    assert answer.tokens == server.cold(answer.prompt).tokens
    usage = answer.usage.stream
    assert usage is not None
    assert usage.router_ttft_ms is not None
    assert usage == StreamUsage(
        chunks=3, computed_tokens=321, ready_tokens=321, router_ttft_ms=usage.router_ttft_ms
    )
    assert usage.router_ttft_ms > 0


@pytest.mark.parametrize("order", ["relevance", "sticky"])
@pytest.mark.usefixtures("empty_cache")
def test_counters_of_an_update_stream(server: Server, prompts: Prompts, order: str) -> None:
    """A search whose list changes, loses a document and flips back to what it was."""
    text = {name: words(name, 60) for name in "abcd"}
    lists = ["abc", "dab", "bd", "abc"]
    placed = {"relevance": lists, "sticky": ["abc", "abd", "bd", "bac"]}[order]
    opening = ids("opening", 30)
    answer = ask(
        server,
        paced(server, [[text[name] for name in names] for names in lists]),
        asynchronous=False,
        mode="update",
        order=order,
        input_ids=opening,
        question=QUESTION,
    )
    contexts = ["".join(f"{text[name]}\n\n" for name in names) for names in placed]
    assert prompts.decode(answer.prompt) == prompts.text(
        {"input_ids": opening}, contexts[-1], QUESTION
    )
    assert answer.tokens == server.cold(answer.prompt).tokens

    encoded = {name: prompts.encode(f"{text[name]}\n\n") for name in text}
    versions = [[*opening, *(t for name in names for t in encoded[name])] for names in placed]
    kept = [common_prefix(old, new) for old, new in pairwise(versions)]
    dropped = sum(len(old) - lcp for old, lcp in zip(versions, kept, strict=False))
    # What a list has in common with any list before is found again, not only with the last one.
    computed = sum(
        len(version) - max((common_prefix(version, old) for old in versions[:i]), default=0)
        for i, version in enumerate(versions)
    )
    usage = answer.usage.stream
    assert usage == StreamUsage(
        updates=4,
        lcp_tokens=len(opening) + sum(kept),
        invalidated_tokens=dropped,
        computed_tokens=computed,
        ready_tokens=len(versions[-1]),
        router_ttft_ms=usage.router_ttft_ms if usage else None,
    )


@pytest.mark.usefixtures("empty_cache")
def test_documents_of_one_id_are_one_document_to_sticky(server: Server, prompts: Prompts) -> None:
    """Its text may change: it keeps its place."""
    old, new, other = (words(name, 30) for name in ("old", "new", "other"))
    lists = [
        [{"id": "p", "text": old}, {"id": "q", "text": other}],
        [{"id": "q", "text": other}, {"id": "p", "text": new}],
    ]
    answer = ask(
        server, paced(server, lists), asynchronous=False, mode="update", order="sticky", prompt="Go"
    )
    expected = prompts.text({"prompt": "Go"}, f"{new}\n\n{other}\n\n", "")
    assert prompts.decode(answer.prompt) == expected
    assert answer.tokens == server.cold(answer.prompt).tokens


def test_texts_and_ids_in_one_stream(server: Server, prompts: Prompts) -> None:
    chunks = ["a text ", ids("mixed", 30), " and a text"]
    answer = ask(server, chunks, asynchronous=False, prompt="Mixed: ", question="?")
    middle = f"a text {prompts.decode(ids('mixed', 30))} and a text"
    assert prompts.decode(answer.prompt) == prompts.text({"prompt": "Mixed: "}, middle, "?")
    assert answer.tokens == server.cold(answer.prompt).tokens


def test_nothing_was_retrieved(server: Server, prompts: Prompts) -> None:
    answer = ask(server, [], asynchronous=False, question="Well?")
    assert prompts.decode(answer.prompt) == prompts.text({}, "", "Well?")
    assert answer.tokens == server.cold(answer.prompt).tokens
