"""The flags of the subcommands; their defaults are those of `sglang_stream.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sglang_stream.config import EngineConfig, RouterConfig

ENGINE = EngineConfig()
ROUTER = RouterConfig(worker_url="")

_SERVER = "Server"
_LIMITS = "Limits"

ModelPath = Annotated[
    str,
    typer.Option(
        "--model-path",
        "--model",
        help="A folder with the model, or its name on Hugging Face.",
        show_default=False,
    ),
]
StreamHost = Annotated[
    str, typer.Option("--stream-host", help="Where the worker listens for chunks.")
]
StreamPort = Annotated[
    int,
    typer.Option(
        "--stream-port", min=0, max=65535, help="Its port; 0 takes a free one, which routers find."
    ),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        "--max-prompt-tokens",
        min=1,
        help="Tokens of one stream's prompt.",
        show_default="the model's context length",
        rich_help_panel=_LIMITS,
    ),
]
PassTokens = Annotated[
    int,
    typer.Option(
        "--stream-pass-tokens",
        min=1,
        help="Tokens of open streams computed in one iteration: a request that is complete "
        "never waits for more.",
        rich_help_panel=_LIMITS,
    ),
]
OpenStreams = Annotated[
    int,
    typer.Option(
        "--max-open-streams", min=1, help="Streams open at once.", rich_help_panel=_LIMITS
    ),
]
BodyBytes = Annotated[
    int,
    typer.Option(
        "--max-body-bytes", min=1, help="Bytes of one HTTP request.", rich_help_panel=_LIMITS
    ),
]
ChunkBytes = Annotated[
    int,
    typer.Option(
        "--max-chunk-bytes",
        min=1,
        help="Bytes of text of one chunk or document.",
        rich_help_panel=_LIMITS,
    ),
]
IdleTimeout = Annotated[
    float,
    typer.Option(
        "--idle-timeout-s",
        min=0.001,
        help="Seconds without a call after which a stream is dropped.",
        rich_help_panel=_LIMITS,
    ),
]
MaxIdleTimeout = Annotated[
    float,
    typer.Option(
        "--max-idle-timeout-s",
        min=0.001,
        help="The longest such time that a stream may ask for.",
        rich_help_panel=_LIMITS,
    ),
]
ResumeGrace = Annotated[
    float,
    typer.Option(
        "--resume-grace-s",
        min=0,
        help="Seconds for which an answer whose client is gone waits for the same request_id.",
        rich_help_panel=_LIMITS,
    ),
]
Host = Annotated[str, typer.Option("--host", help="The router's address.", rich_help_panel=_SERVER)]
Port = Annotated[
    int,
    typer.Option("--port", min=0, max=65535, help="The router's port.", rich_help_panel=_SERVER),
]
WorkerUrl = Annotated[
    str,
    typer.Option("--worker", help="The worker's address, http://HOST:PORT.", show_default=False),
]
WorkerLog = Annotated[
    Path | None,
    typer.Option(
        "--worker-log",
        help="File for the worker's log.",
        show_default="in a new temporary folder",
        rich_help_panel=_SERVER,
    ),
]
StartTimeout = Annotated[
    float,
    typer.Option(
        "--start-timeout-s",
        min=0.001,
        help="Seconds that the worker may take to be healthy.",
        rich_help_panel=_SERVER,
    ),
]
