"""The flags of the subcommands about workers, and of the workers that a router is told of; their
defaults are those of `EngineConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sglang_stream.config import EngineConfig
from sglang_stream.messages import Role
from sglang_stream.policy.types import Invalidation, PolicyName, Preemption

ENGINE = EngineConfig()

_SERVER = "Server"
_LIMITS = "Limits"
_WORKERS = "Workers"
_SCHEDULING = "Scheduling of open streams"

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
        help="Tokens of open streams computed in one iteration, at most.",
        rich_help_panel=_LIMITS,
    ),
]
PassMs = Annotated[
    float | None,
    typer.Option(
        "--stream-pass-ms",
        min=0.001,
        help="How long an iteration that computes open streams may be predicted to take: a request "
        "that is complete waits for little more.",
        show_default="the profile's, else 50, up to 10 times a forward's fixed cost where "
        "complete requests are rare",
        rich_help_panel=_SCHEDULING,
    ),
]
StreamPolicy = Annotated[
    PolicyName,
    typer.Option(
        "--stream-policy",
        help="Who is computed first. fcfs: complete requests, then open streams, by arrival. lcas: "
        "the same by the arrival of the last chunk. mcps: most computed tokens first. srpf: "
        "complete ones, then shortest remaining prefill, with ageing. slack: open streams by the "
        "time that is left until their predicted end. default: by arrival alone.",
        rich_help_panel=_SCHEDULING,
    ),
]
PreemptionKind = Annotated[
    Preemption,
    typer.Option(
        "--preemption",
        help="How an open stream gives up its KV when memory is short: computed again, copied to "
        "host memory and back, or the cheaper (auto). off: only to complete requests.",
        rich_help_panel=_SCHEDULING,
    ),
]
HostMemoryGb = Annotated[
    float,
    typer.Option(
        "--stream-host-memory-gb",
        min=0,
        help="GiB of host memory for the KV of preempted streams, of each GPU.",
        rich_help_panel=_SCHEDULING,
    ),
]
InvalidationKind = Annotated[
    Invalidation,
    typer.Option(
        "--invalidation",
        help="What becomes of KV that an update has made useless: the first to be evicted (a list "
        "that flips back finds it again), or freed at once.",
        rich_help_panel=_SCHEDULING,
    ),
]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="What prefill and swaps take on this machine: a file that `sglang-stream calibrate` "
        "wrote, or a name.",
        show_default="learned while it works",
        rich_help_panel=_SCHEDULING,
    ),
]
WorkerUrls = Annotated[
    list[str],
    typer.Option(
        "--worker",
        help="A worker that prefills and decodes, http://HOST:PORT. May be repeated.",
        show_default=False,
        rich_help_panel=_WORKERS,
    ),
]
PrefillUrls = Annotated[
    list[str],
    typer.Option(
        "--prefill",
        metavar="URL [PORT]",
        help="A prefill worker, and its bootstrap port if it does not tell the right one. May be "
        "repeated.",
        show_default=False,
        rich_help_panel=_WORKERS,
    ),
]
DecodeUrls = Annotated[
    list[str],
    typer.Option(
        "--decode",
        help="A decode worker. May be repeated.",
        show_default=False,
        rich_help_panel=_WORKERS,
    ),
]
WorkerRole = Annotated[
    Role,
    typer.Option("--role", help="Whether the worker computes prompts, answers, or both."),
]
UnifiedWorkers = Annotated[
    int,
    typer.Option(
        "--workers",
        min=1,
        help="How many workers that prefill and decode.",
        rich_help_panel=_WORKERS,
    ),
]
PrefillWorkers = Annotated[
    int,
    typer.Option(
        "--prefill-workers",
        min=0,
        help="How many workers that only prefill, in place of those that do both; their KV moves "
        "to the decode workers.",
        rich_help_panel=_WORKERS,
    ),
]
DecodeWorkers = Annotated[
    int,
    typer.Option(
        "--decode-workers",
        min=0,
        help="How many workers that only decode.",
        rich_help_panel=_WORKERS,
    ),
]
WorkerLog = Annotated[
    Path | None,
    typer.Option(
        "--worker-log",
        help="File for the worker's log; of several workers, each adds its name.",
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
