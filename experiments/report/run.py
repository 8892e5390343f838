"""`sglang-stream report`: tables, figures and one page from rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from experiments import display
from experiments.command import run_command
from experiments.report.against_engine import against_engine
from experiments.report.figures import Drawing, drawings_of, recompute_against_swap
from experiments.report.load import Rows, load_rows
from experiments.report.measures import by_setting, goodput_limit_s, measured, unanswered
from experiments.report.page import Section, as_png, as_svg, page, section_of, section_of_both
from experiments.report.table import Table
from experiments.report.tables import tables_of
from sglang_stream.config import load_profile, profile_names
from sglang_stream.errors import InvalidRequest


class Written(NamedTuple):
    """A file of the report, its place inside the folder and its content."""

    name: str
    content: bytes


def main(args: list[str]) -> int:
    """Reports with these command-line arguments; returns the exit status."""
    return run_command(report, "report", args)


def report(
    rows: Annotated[
        list[Path],
        typer.Argument(help="Files that `replay` and `simulate` wrote.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("report"),
    goodput: Annotated[
        str | None,
        typer.Option(
            help="An objective in milliseconds: ttft:300.", show_default="the specifications'"
        ),
    ] = None,
    profile: Annotated[
        list[str],
        typer.Option(help="Draw what recomputing and swapping take by it. May be repeated."),
    ] = [],  # noqa: B006
) -> None:
    """Write tables (Markdown, CSV), figures (SVG, PNG) and one HTML page.

    Rows of several files are put together; what is compared with each other is
    of the same machine, workload and placement, measured or simulated. Where a
    workload is there both ways, one table has the simulator against the engine:

      sglang-stream report simulated.jsonl measured.jsonl
    """
    known = load_rows(rows)
    limit_s = known.goodput_ttft_s if goodput is None else goodput_limit_s(goodput)
    profiles = [*profile, *_profiles_of(known)]
    notes = left_out(known)
    files = list(files_of(known, limit_s, list(dict.fromkeys(profiles)), notes))
    for file in files:
        _write(out / file.name, file.content)
    console = display.console()
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print(f"{len(files)} files; the page is {out / 'index.html'}", soft_wrap=True)


def files_of(
    rows: Rows, goodput_ttft_s: float | None, profiles: list[str], notes: list[str]
) -> Iterator[Written]:
    """All files of a report; the page begins with `notes`."""
    sections: list[Section] = []
    every = measured(rows.requests)
    for machines, table in against_engine(every):
        sections.append(section_of_both(machines, table))
        yield from _files(slug(("against-engine", *machines)), [table], [])
    known = {("simulator", name): load_profile(name) for name in _profiles_of(rows)}
    for setting, cells in by_setting(every).items():
        profile = known.get((setting.source, setting.machine))
        tables = list(tables_of(setting, cells, rows, goodput_ttft_s, profile))
        drawings = list(drawings_of(setting, cells, rows))
        sections.append(section_of(setting, tables, drawings))
        yield from _files(slug(setting), tables, drawings)
    costs = [recompute_against_swap(load_profile(name)) for name in profiles]
    yield from _files("profiles", [], costs)
    yield Written("index.html", page(sections, costs, rows, notes).encode())


def left_out(rows: Rows) -> list[str]:
    """What of the rows no table or figure has, in sentences."""
    notes = []
    if rows.broken_off:
        notes.append(f"Left out: {rows.broken_off:,} rows of cells that were broken off.")
    for cell in unanswered(rows.requests):
        notes.append(
            f"Left out: {cell.setting}, {cell.how.name} at {cell.how.qps:g} QPS, where none of "
            f"{len(cell.rows):,} requests was answered ({cell.rows[0].failed})."
        )
    return notes


def slug(parts: Iterable[str | None]) -> str:
    """The fields of a setting as the name of a folder."""
    text = "-".join(part for part in parts if part).lower()
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def _files(folder: str, tables: list[Table], drawings: list[Drawing]) -> Iterator[Written]:
    for table in tables:
        yield Written(f"{folder}/{table.name}.md", table.as_markdown().encode())
        yield Written(f"{folder}/{table.name}.csv", table.as_csv().encode())
    for drawing in drawings:
        yield Written(f"{folder}/{drawing.name}.svg", as_svg(drawing.figure))
        yield Written(f"{folder}/{drawing.name}.png", as_png(drawing.figure))


def _profiles_of(rows: Rows) -> list[str]:
    """The package's profiles that rows were simulated with."""
    machines = {row.machine for row in rows.requests if row.source == "simulator"}
    return sorted(machines & set(profile_names()))


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as e:
        raise InvalidRequest(f"--out {path}: {e.strerror}", param="--out") from e
