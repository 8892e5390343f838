"""What the commands of this package have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

ModelPath = Annotated[
    str | None,
    typer.Option(
        "--model-path",
        "--model",
        help="A model that SGLang takes.",
        show_default="a small random one, float32",
    ),
]


def run_command(
    command: Callable[..., None],
    name: str,
    args: Sequence[str],
    context_settings: dict[str, Any] | None = None,
) -> int:
    """Runs `sglang-stream NAME` with these arguments; returns the exit status."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(context_settings=context_settings)(command)
    try:
        app(list(args), prog_name=f"sglang-stream {name}")
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return 0
