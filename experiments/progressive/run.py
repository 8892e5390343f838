"""`sglang-stream progressive`: a progressive search over real passages, streamed to the engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from experiments import display
from experiments.client import MeasuredClient
from experiments.command import run_command
from experiments.progressive import report
from experiments.progressive.corpus import Corpus, Question, build_corpus
from experiments.progressive.measure import (
    ORDERS,
    Measured,
    Searched,
    measure,
    search,
    tokenizer,
)
from experiments.rows import Row, RowFile, manifest
from experiments.server import default_model, running_server
from experiments.workload.revisions import measure_revisions
from retrieval_clients.anns import IndexKind, SearchSettings
from retrieval_clients.passages import PassageSettings
from retrieval_clients.traces import Trace, write_trace
from sglang_stream.errors import EngineFailure, InvalidRequest

_FLAGS = ("--enable-cache-report",)


@dataclass(frozen=True)
class Server:
    """Where the engine is, or with which model to start one."""

    base_url: str | None
    model: str
    flags: list[str]
    max_tokens: int


class Kept:
    """Where rows and searches are written while they come. A file of rows that is there is replaced
    by the first row, one of traces is added to."""

    def __init__(self, out: Path | None, head: Row, traces: Path | None) -> None:
        self._out = out
        self._head = head
        self._traces = traces
        self._file: RowFile | None = None

    def row(self, measured: Measured) -> None:
        """Adds what was measured of a question. Raises InvalidRequest if it cannot be written."""
        if self._out is None:
            return
        if self._file is None:
            self._file = RowFile(self._out)
            self._file.add(self._head)
        self._file.add(measured.row())

    def search(self, question: Question, searched: Searched) -> None:
        """Adds the trace of a search that has ended. Raises likewise."""
        if self._traces is not None:
            write_trace(self._traces, searched.trace(question))


def main(args: list[str]) -> int:
    """Measures with these command-line arguments; returns the exit status."""
    return run_command(progressive, "progressive", args)


def progressive(
    index: Annotated[
        IndexKind, typer.Option(help="An inverted file (nprobe grows) or a graph (efSearch grows).")
    ] = "ivf",
    questions: Annotated[int, typer.Option(min=1, help="How many are asked.")] = 20,
    k: Annotated[int, typer.Option("--k", min=1, help="Documents of a list.")] = 8,
    step_ms: Annotated[
        float, typer.Option(min=0, help="Milliseconds that each step of the search takes at least.")
    ] = 500.0,
    growth: Annotated[
        float, typer.Option(min=1.01, help="Each step's effort, as a multiple of the last one's.")
    ] = 2.0,
    stable_steps: Annotated[
        int, typer.Option(min=1, help="Steps without a change after which a search ends.")
    ] = 3,
    passages: Annotated[
        int, typer.Option(min=100, help="Passages that there must be at least.")
    ] = 20_000,
    passage_chars: Annotated[
        int, typer.Option(min=250, help="The longest passage, in characters.")
    ] = 1000,
    embedding_model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a sentence-transformers model.", show_default="TF-IDF and SVD"
        ),
    ] = None,
    engine: Annotated[
        bool, typer.Option(help="Stream into an engine, or only see how the lists change.")
    ] = True,
    base_url: Annotated[
        str | None,
        typer.Option(help="A server that runs already.", show_default="one is started"),
    ] = None,
    model_path: Annotated[
        str | None,
        typer.Option(
            "--model-path",
            "--model",
            help="The model to serve, or that --base-url serves (for its tokenizer).",
            show_default="a small random one, float32",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the choice of questions.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The rows, as JSON lines.", show_default="none")
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(help="Add the searches to this file, as traces.", show_default="none"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where passages and vectors are kept.", show_default="~/.cache"),
    ] = None,
) -> None:
    """Search the documentation of the installed packages, and read while the list is refined.

    Each question is the first sentence of a docstring that is not in the
    index. Its lists are streamed into the engine as they come, in the
    retriever's order ([bold]relevance[/]) and with those that stay left where they
    are ([bold]sticky[/]), and asked for again by a plain request on an empty cache,
    whose greedy tokens must be the same:

      sglang-stream progressive --questions 20 --step-ms 500 --out rows.jsonl

    How the lists of many searches change, for generating others like them:

      sglang-stream progressive --no-engine --questions 500 --traces traces.jsonl
    """
    if base_url is not None and model_path is None:
        raise InvalidRequest(
            "--base-url needs --model-path: its tokenizer tells where each document stands",
            param="--model-path",
        )
    console = display.console()
    settings = SearchSettings(
        k=k, growth=growth, stable_steps=stable_steps, step_s=step_ms / 1000, with_recall=True
    )
    if out is not None:
        RowFile(out, append=True)  # what cannot be written is told before the long work
    with display.progress() as progress:
        step = progress.add_task("collecting and indexing passages", total=None)
        corpus = build_corpus(
            cache or _cache_folder(),
            PassageSettings(at_least=passages, max_chars=passage_chars),
            index,
            questions,
            seed,
            embedding_model,
        )
        progress.remove_task(step)
        what = f"{index.upper()} over {len(corpus.index.documents):,} passages, k {k}"
        model = model_path or (default_model() if engine else "")
        flags = [*_FLAGS, *([] if model_path else ["--dtype", "float32"])]
        searched = {"searched": what, "step_ms": step_ms, "growth": growth}
        head = {**manifest(model, flags, seed), **searched, "stable_steps": stable_steps}
        kept = Kept(out, head, traces)
        if engine:
            server = Server(base_url, model, flags, max_tokens)
            measured, found = _stream(progress, corpus, settings, server, kept)
        else:
            measured, found = [], asyncio.run(_search_only(progress, corpus, settings, kept))
    made = [s.trace(q) for q, s in zip(corpus.questions, found, strict=True)]
    if measured:
        console.print(report.streaming_table(measured, what, step_ms))
    _print_changes(console, made, found, what, step_ms)
    wrong = sum(not m.same_tokens for m in measured)
    if wrong:
        raise EngineFailure(f"{wrong} of {len(measured)} streamed answers are not the plain ones")


def _stream(
    progress: Progress,
    corpus: Corpus,
    settings: SearchSettings,
    server: Server,
    kept: Kept,
) -> tuple[list[Measured], list[Searched]]:
    """Both orders of each question in turn; the searches of the first."""
    step = progress.add_task("starting the server", total=None)
    with ExitStack() as stack:
        url = server.base_url or stack.enter_context(running_server(server.model, server.flags))
        total = len(ORDERS) * len(corpus.questions)
        progress.reset(step, description="questions, by waiting and streaming", total=total)
        tokenize = tokenizer(server.model)

        async def run() -> tuple[list[Measured], list[Searched]]:
            rows: list[Measured] = []
            searches: list[Searched] = []
            async with MeasuredClient(url) as client:
                for question in corpus.questions:
                    for order in ORDERS:
                        measured, searched = await measure(
                            client,
                            corpus.index,
                            question,
                            order,
                            settings,
                            server.max_tokens,
                            tokenize,
                        )
                        rows.append(measured)
                        kept.row(measured)
                        if order == ORDERS[0]:
                            searches.append(searched)
                            kept.search(question, searched)
                        progress.advance(step)
            return rows, searches

        return asyncio.run(run())


async def _search_only(
    progress: Progress, corpus: Corpus, settings: SearchSettings, kept: Kept
) -> list[Searched]:
    step = progress.add_task("questions", total=len(corpus.questions))
    searches = [Searched() for _ in corpus.questions]
    for question, searched in zip(corpus.questions, searches, strict=True):
        async for _ in search(corpus.index, question, settings, searched):
            pass
        kept.search(question, searched)
        progress.advance(step)
    return searches


def _print_changes(
    console: Console, made: Sequence[Trace], found: Sequence[Searched], what: str, step_ms: float
) -> None:
    try:
        revisions = measure_revisions(made)
    except ValueError:
        console.print(f"No list of {len(made)} searches of {what} changed.")
        return
    recalls = [(s.lists[0].recall or 0.0, s.lists[-1].recall or 0.0) for s in found]
    steps = [s.steps for s in found]
    console.print(report.search_table(made, recalls, steps, revisions, what, step_ms))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-stream"
