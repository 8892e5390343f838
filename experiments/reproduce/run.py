"""`sglang-stream reproduce`: every specification, simulated or real, and the report of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from experiments import display
from experiments.command import run_command
from experiments.replay.run import main as replay
from experiments.report.run import main as report
from experiments.rows import source_commit
from experiments.simulate.run import main as simulate
from experiments.spec import load_spec, spec_fields
from sglang_stream.config import profile_names
from sglang_stream.errors import InvalidRequest

SPECS = Path(__file__).parents[1] / "specs"
_REAL = "_cpu"  # how the names of those end that run on the real engine, the small model on a CPU
_SMALL = ("--queries", "40", "--seeds", "1")  # some minutes for each specification


class Step(NamedTuple):
    """A specification and where its rows go. `profile`: None to run it on the real engine."""

    spec: Path
    rows: Path
    profile: str | None


def main(args: list[str]) -> int:
    """Reproduces with these command-line arguments; returns the exit status."""
    return run_command(reproduce, "reproduce", args)


def reproduce(
    out: Annotated[Path, typer.Option(help="The folder of the rows and the report.")] = Path(
        "reproduced"
    ),
    specs: Annotated[
        Path,
        typer.Option(help="A folder of specifications.", show_default="those of the package"),
    ] = SPECS,
) -> None:
    """Simulate and run the evaluation, and write its report.

    A specification whose name ends with the name of a profile (h200_tp2) is
    simulated with it; one that ends with _cpu runs on the real engine, with the
    small model, 40 queries and one seed. What is complete in the folder is kept, so a run that was
    broken off goes on.
    """
    console = display.console()
    steps = steps_of(specs, out)
    for step in steps:
        console.print(f"[bold]{step.spec.stem}[/]: {step.profile or 'on the real engine'}")
        status = _run(step)
        if status:
            raise typer.Exit(status)
    raise typer.Exit(report([*(str(step.rows) for step in steps), "--out", str(out)]))


def steps_of(specs: Path, out: Path) -> list[Step]:
    """What is to be done, simulations first. Raises InvalidRequest for a specification whose name
    does not tell how it is to be run, and if there is none."""
    steps: list[Step] = []
    for spec in sorted(specs.glob("*.toml")):
        named = [p for p in profile_names() if spec.stem.endswith("_" + p.replace("-", "_"))]
        if not named and not spec.stem.endswith(_REAL):
            raise InvalidRequest(
                f"{spec}: end its name with {_REAL} or the name of a profile: "
                f"{', '.join(profile_names())}",
                param="--specs",
            )
        profile = max(named, key=len) if named else None
        steps.append(Step(spec, out / "rows" / f"{spec.stem}.jsonl", profile))
    if not steps:
        raise InvalidRequest(f"--specs {specs}: there is no .toml", param="--specs")
    return sorted(steps, key=lambda step: step.profile is None)


def _run(step: Step) -> int:
    """The exit status. A simulation is quick and starts anew unless it is complete."""
    common = (str(step.spec), "--out", str(step.rows))
    if step.profile is None:
        return replay([*common, *_SMALL])
    if is_simulated(step):
        return 0
    return simulate([*common, "--profile", step.profile, "--events"])


def is_simulated(step: Step) -> bool:
    """Whether its rows are there, of the specification and the source tree as they are now; not if
    that has changes of which nobody knows since when."""
    try:
        with step.rows.open() as lines:
            head = json.loads(next(lines))
    except (OSError, StopIteration, ValueError):
        return False
    wanted = json.loads(json.dumps(spec_fields(load_spec(step.spec))))
    made_of = (head.get("spec"), head.get("profile"), head.get("commit"))
    commit = source_commit()
    return made_of == (wanted, step.profile, commit) and not (commit or "").endswith("-dirty")
