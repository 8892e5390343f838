"""`sglang-stream workload`: generated queries, and how near they are to the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments import display
from experiments.command import run_command
from experiments.rows import Row, RowFile
from experiments.workload.comparison import compare, table
from experiments.workload.generator import Rest, generate
from experiments.workload.published import WORKLOADS, WorkloadKind
from experiments.workload.shapes import Query


def main(args: list[str]) -> int:
    """Generates with these command-line arguments; returns the exit status."""
    return run_command(workload, "workload", args)


def workload(
    kind: Annotated[
        WorkloadKind | None, typer.Argument(help="Which workload.", show_default="both")
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="How many of each.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Another seed, other queries.")] = 0,
    rest: Annotated[
        Rest, typer.Option(help="Which chunk the time that the gaps leave is spent before.")
    ] = "first",
    out: Annotated[
        Path | None, typer.Option(help="The queries, as JSON lines.", show_default="none")
    ] = None,
) -> None:
    """Generate queries shaped as the published ones, and compare.

    For each published figure of tokens, retrieval times, chunks and gaps the
    table shows that of the generated queries. The same seed and number give the
    same queries:

      sglang-stream workload crawler --queries 4309 --out crawler.jsonl
    """
    file = None if out is None else RowFile(out)
    console = display.console()
    for name in WORKLOADS if kind is None else (kind,):
        made = generate(name, queries, seed, rest=rest)
        console.print(table(name, compare(name, made, rest), queries))
        if file is not None:
            file.extend(map(as_row, made))
    if file is not None:
        console.print(f"The queries are in {file.path}", soft_wrap=True)


def as_row(query: Query) -> Row:
    """A query as it stands in a file."""
    return {
        "query_id": query.query_id,
        "mode": query.mode,
        "opening_tokens": query.opening_tokens,
        "question_tokens": query.question_tokens,
        "steps": [
            {"at_s": at_s, "documents": [[d.id, d.tokens] for d in documents]}
            for at_s, documents in query.steps
        ],
    }
