"""A question's search, streamed into the engine while it goes on, against waiting for its end."""

from __future__ import annotations

import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from experiments.client import MeasuredClient
from experiments.progressive.corpus import Question
from experiments.rows import Row
from experiments.workload.revisions import out_of_place
from retrieval_clients.anns import PassageIndex, SearchSettings, TopK, progressive_search
from retrieval_clients.traces import Trace, TraceDocument, TraceStep
from sglang_stream.errors import StreamError

Order = Literal["relevance", "sticky"]
ORDERS: tuple[Order, ...] = ("relevance", "sticky")
Tokenize = Callable[[str], list[int]]

_SYSTEM = {"role": "system", "content": "Answer from the passages that follow."}
# What the server puts after each document, as part of it.
_DOCUMENT_END = "\n\n"


@dataclass
class Searched:
    """What a search yielded, and the `perf_counter` when it began, at its last list and its end."""

    lists: list[TopK] = field(default_factory=list)
    steps: int = 0
    is_stable: bool = False
    began_s: float = 0.0
    last_s: float = 0.0
    ended_s: float = 0.0

    def trace(self, question: Question) -> Trace:
        """The lists with their times, which include the pace."""
        steps = (
            TraceStep(found.at_s, tuple(TraceDocument(hit.id, hit.text) for hit in found))
            for found in self.lists
        )
        return Trace(question.id, question.text, "update", tuple(steps))


@dataclass(frozen=True)
class Measured:
    """One question in one order. `same_tokens`: whether the streamed answer is that of a plain
    request with the same prompt on an empty cache; both times to first token count from the
    search's end. `out_of_order`: share of the documents that would have to change places for the
    retriever's order. `lists` differ from `updates` where one came before the one before it was
    taken up."""

    question: str
    order: Order
    documents: int
    lists: int
    steps: int
    is_stable: bool
    first_recall: float | None
    last_recall: float | None
    last_list_s: float
    search_s: float
    updates: int
    prompt_tokens: int
    lcp_tokens: int
    invalidated_tokens: int
    computed_tokens: int
    ready_tokens: int
    out_of_order: float
    waiting_ttft_s: float
    streaming_ttft_s: float
    same_tokens: bool

    def row(self) -> Row:
        return {"bench": "progressive", **asdict(self)}


async def search(
    index: PassageIndex, question: Question, settings: SearchSettings, searched: Searched
) -> AsyncIterator[TopK]:
    """The lists of one search, which `searched` tells of."""
    searched.began_s = time.perf_counter()
    async with progressive_search(index, question.vector, settings) as found:
        async for top in found:
            searched.lists.append(top)
            searched.last_s = time.perf_counter()
            yield top
        searched.ended_s = time.perf_counter()
        searched.steps, searched.is_stable = found.steps, found.is_stable


async def measure(
    client: MeasuredClient,
    index: PassageIndex,
    question: Question,
    order: Order,
    settings: SearchSettings,
    max_tokens: int,
    tokenize: Tokenize,
) -> tuple[Measured, Searched]:
    """Streams, then waits, each on an empty cache.

    The waiting request comes after a search of its own would have ended: the search leaves nothing
    running, so it is not repeated. Raises StreamError if the prompt is not the last list's.
    """
    searched = Searched()
    await client.flush()
    streamed = await client.streamed(
        search(index, question, settings, searched),
        max_tokens,
        question=question.text,
        messages=[_SYSTEM],
        mode="update",
        order=order,
    )
    await client.flush()
    waiting = await client.plain(streamed.prompt, max_tokens)
    if waiting.cached_tokens:
        raise StreamError(f"the waiting request found {waiting.cached_tokens} cached tokens")
    assert streamed.usage is not None
    last = searched.lists[-1]
    pieces = [tokenize(hit.text + _DOCUMENT_END) for hit in last]
    measured = Measured(
        question=question.id,
        order=order,
        documents=len(last),
        lists=len(searched.lists),
        steps=searched.steps,
        is_stable=searched.is_stable,
        first_recall=searched.lists[0].recall,
        last_recall=last.recall,
        last_list_s=last.at_s,
        search_s=searched.ended_s - searched.began_s,
        updates=streamed.usage.updates,
        prompt_tokens=len(streamed.prompt),
        lcp_tokens=streamed.usage.lcp_tokens,
        invalidated_tokens=streamed.usage.invalidated_tokens,
        computed_tokens=streamed.usage.computed_tokens,
        ready_tokens=streamed.usage.ready_tokens,
        out_of_order=out_of_order(find_documents(streamed.prompt, pieces)),
        waiting_ttft_s=waiting.ttft_s,
        # The SDK counts from the last list; the search then went on to see that it is the last.
        streaming_ttft_s=streamed.ttft_s - (searched.ended_s - searched.last_s),
        same_tokens=streamed.tokens == waiting.tokens,
    )
    return measured, searched


def find_documents(prompt: Sequence[int], pieces: Sequence[Sequence[int]]) -> list[int]:
    """Which document stands where in a prompt: their numbers in its order.

    `pieces`: the tokens of each. Raises StreamError unless all of them stand there, one directly
    after the other.
    """
    places = [_find(prompt, piece) for piece in pieces]
    at = min(places, default=0)
    left = dict(enumerate(map(tuple, pieces)))
    found: list[int] = []
    while left:
        # The longest first: a document may be the beginning of another.
        fitting = [i for i, piece in left.items() if tuple(prompt[at : at + len(piece)]) == piece]
        if not fitting:
            raise StreamError(
                f"document {len(found) + 1} of {len(pieces)} in the prompt is none of the list's"
            )
        number = max(fitting, key=lambda i: len(left[i]))
        at += len(left.pop(number))
        found.append(number)
    return found


def out_of_order(numbers: Sequence[int]) -> float:
    """The least share of the documents to move so that their numbers rise; 0 without any."""
    names = [str(number) for number in numbers]
    return len(out_of_place(sorted(names, key=int), names)) / len(names) if names else 0.0


def _find(prompt: Sequence[int], piece: Sequence[int]) -> int:
    """Where the tokens of `piece` first stand in the prompt, its end if nowhere."""
    whole, part = array("i", prompt).tobytes(), array("i", piece).tobytes()
    size = array("i").itemsize
    at = whole.find(part)
    while at % size and at >= 0:
        at = whole.find(part, at + 1)
    return at // size if at >= 0 else len(prompt)


def tokenizer(model_path: str) -> Tokenize:
    """How the server tokenises a document with this model."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(model_path)
    return lambda text: list(loaded.encode(text, add_special_tokens=False))
