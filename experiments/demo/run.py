"""`sglang-stream demo`: a question over pages that are still being fetched, against waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.client import Answer, MeasuredClient
from experiments.demo.report import Row, table
from experiments.demo.scenarios import QUESTION, Scenario, crawl_scenario, search_scenario
from experiments.demo.site import arrival_delays, make_pages, serve_site
from experiments.server import default_model, running_server
from experiments.tokens import load_tokenizer
from sglang_stream.errors import StreamError

Arrived = Callable[[], None]
_SYSTEM = {"role": "system", "content": "Answer from the pages that follow."}


def main(args: list[str]) -> int:
    """Runs the demo with these command-line arguments; returns the exit status."""
    app = typer.Typer(add_completion=False)
    app.command()(demo)
    result = typer.main.get_command(app).main(
        args, prog_name="sglang-stream demo", standalone_mode=False
    )
    return result if isinstance(result, int) else 0


def demo(
    model_path: Annotated[
        str | None, typer.Option(help="Any model that SGLang takes. Default: a small random one.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of requests per scenario.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the pages' delays.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Keep the rows here, as JSON lines.")] = None,
) -> int:
    """Ask a question over pages that are still being fetched: by waiting for all, and streaming.

    Serves a small site on this machine, whose pages take about 0.7 s after one another, crawls it,
    and asks. Then the same for a search whose result list changes. Every measured request starts
    with an empty cache; both ways of a pair ask for the very same tokens.
    """
    console = Console()
    try:
        rows = _measure(console, model_path, repeats, max_tokens, seed)
    except StreamError as e:
        console.print(f"[red]The demo failed:[/red] {e.message}")
        return 1
    if out is not None:
        out.write_bytes(b"".join(msgspec.json.encode(r.fields()) + b"\n" for r in rows))
    console.print(table(rows))
    if all(r.same_tokens for r in rows):
        return 0
    console.print("[red]Some pairs differ. In float32 on one machine they must not.[/red]")
    return 1


def _measure(
    console: Console, model_path: str | None, repeats: int, max_tokens: int, seed: int
) -> list[Row]:
    with _progress(console) as progress:
        step = progress.add_task("preparing the model and the pages", total=None)
        model = model_path or default_model()
        tokenizer = load_tokenizer(model)
        pages = make_pages(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
        progress.update(step, description="starting the server")
        flags = ["--enable-cache-report", *(() if model_path else ("--dtype", "float32"))]
        rows: list[Row] = []
        with (
            running_server(model, flags) as url,
            serve_site(pages, arrival_delays(len(pages), seed)) as site,
        ):
            progress.remove_task(step)
            for scenario in (crawl_scenario(site.urls, pages), search_scenario(pages)):
                rows += asyncio.run(
                    _compare(progress, url, scenario, tokenizer, repeats, max_tokens)
                )
    return rows


async def _compare(
    progress: Progress, url: str, scenario: Scenario, tokenizer: Any, repeats: int, max_tokens: int
) -> list[Row]:
    """Waiting and streaming in turn, after one rehearsal that tells the prompt's tokens."""
    rows: list[Row] = []
    total = progress.add_task(scenario.title, total=repeats)
    async with MeasuredClient(url) as client:
        rehearsal = await _stream(progress, client, scenario, "a rehearsal", 1)
        changed = _find_last(rehearsal.prompt, tokenizer, scenario.last_document)
        for repeat in range(1, repeats + 1):
            waiting = await _wait(progress, client, scenario, rehearsal.prompt, max_tokens)
            streaming = await _stream(progress, client, scenario, "streaming", max_tokens)
            if streaming.prompt != waiting.prompt:
                # The chunks came in another order: compare with their own prompt.
                await client.flush()
                waiting = await client.plain(streaming.prompt, max_tokens)
            await client.flush()
            await client.plain(streaming.prompt[:changed], 1)
            limit = await client.plain(streaming.prompt, max_tokens)
            assert streaming.usage is not None
            rows.append(
                Row(
                    scenario=scenario.name,
                    title=scenario.title,
                    repeat=repeat,
                    waiting_ttft_s=waiting.ttft_s,
                    streaming_ttft_s=streaming.ttft_s,
                    limit_ttft_s=limit.ttft_s,
                    prompt_tokens=len(streaming.prompt),
                    ready_tokens=streaming.usage.ready_tokens,
                    changed_tokens=len(streaming.prompt) - changed,
                    cached_tokens=waiting.cached_tokens or 0,
                    same_tokens=waiting.tokens == streaming.tokens == limit.tokens,
                )
            )
            progress.advance(total)
    return rows


async def _stream(
    progress: Progress, client: MeasuredClient, scenario: Scenario, name: str, max_tokens: int
) -> Answer:
    """One streamed request on an empty cache."""
    await client.flush()
    with _arrivals(progress, scenario, name) as arrived:
        return await client.streamed(
            _counted(scenario.retrieve(), arrived),
            max_tokens,
            question=QUESTION,
            messages=[_SYSTEM],
            mode=scenario.name,
        )


async def _wait(
    progress: Progress,
    client: MeasuredClient,
    scenario: Scenario,
    prompt: tuple[int, ...],
    max_tokens: int,
) -> Answer:
    """Retrieves everything, then one ordinary request with the same tokens on an empty cache."""
    await client.flush()
    t0 = 0.0
    with _arrivals(progress, scenario, "waiting") as arrived:
        async for _ in _counted(scenario.retrieve(), arrived):
            t0 = time.perf_counter()
        answer = await client.plain(prompt, max_tokens, t0)
    if answer.cached_tokens:
        raise StreamError(f"the waiting request found {answer.cached_tokens} cached tokens")
    return answer


async def _counted(items: AsyncIterator[Any], arrived: Arrived) -> AsyncIterator[Any]:
    async for item in items:
        arrived()
        yield item


def _find_last(prompt: tuple[int, ...], tokenizer: Any, text: str) -> int:
    """Where the tokens of a document begin in the prompt; its last place."""
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))[:64]
    for start in range(len(prompt) - len(ids), -1, -1):
        if prompt[start : start + len(ids)] == ids:
            return start
    raise StreamError("the last document is not in the prompt")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


@contextmanager
def _arrivals(progress: Progress, scenario: Scenario, name: str) -> Iterator[Arrived]:
    """Shows the items of one retrieval as they arrive, while it lasts."""
    unit = "pages" if scenario.name == "append" else "lists"
    task = progress.add_task(f"  {name}: {unit}", total=scenario.items)
    try:
        yield lambda: progress.advance(task)
    finally:
        progress.remove_task(task)
