"""The flags of every command that runs a router; their defaults are those of `RouterConfig`."""

from __future__ import annotations

import os
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from sglang_stream.config import (
    ADMIN_KEY_VARIABLE,
    SECRET_VARIABLE,
    PlacementName,
    RouterConfig,
)

ROUTER = RouterConfig()

_SERVER = "Server"
_LIMITS = "Limits"
_WORKERS = "Workers"
_ACCESS = "Access"
_FAILURES = "When workers fail"

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
ApiKeyFile = Annotated[
    str | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help="Keys that callers must send, one a line, NAME:KEY or KEY. The admin's key comes from "
        "SGLANG_STREAM_ADMIN_KEY in the environment.",
        show_default="no keys",
        rich_help_panel=_ACCESS,
    ),
]
SharePrefixes = Annotated[
    bool,
    typer.Option(
        "--share-prefixes/--own-prefixes",
        help="One prefix cache for all API keys, instead of one for each.",
        rich_help_panel=_ACCESS,
    ),
]
MaxConcurrent = Annotated[
    int | None,
    typer.Option(
        "--max-concurrent-requests",
        min=1,
        help="Answers generated at once; more wait.",
        show_default="no limit",
        rich_help_panel=_LIMITS,
    ),
]
QueueSize = Annotated[
    int,
    typer.Option("--queue-size", min=0, help="Calls that may wait.", rich_help_panel=_LIMITS),
]
QueueTimeout = Annotated[
    float,
    typer.Option(
        "--queue-timeout-secs",
        min=0.001,
        help="Seconds for which one may wait.",
        rich_help_panel=_LIMITS,
    ),
]
RequestTimeout = Annotated[
    float,
    typer.Option(
        "--request-timeout-secs",
        min=0.001,
        help="Seconds that an answer may take.",
        rich_help_panel=_LIMITS,
    ),
]
CbFailures = Annotated[
    int,
    typer.Option(
        "--cb-failure-threshold",
        min=1,
        help="Failures of a worker within the window after which it is left alone.",
        rich_help_panel=_FAILURES,
    ),
]
CbSuccesses = Annotated[
    int,
    typer.Option(
        "--cb-success-threshold",
        min=1,
        help="Successes after which it is used as before.",
        rich_help_panel=_FAILURES,
    ),
]
CbTimeout = Annotated[
    float,
    typer.Option(
        "--cb-timeout-duration-secs",
        min=0.001,
        help="Seconds for which it is left alone.",
        rich_help_panel=_FAILURES,
    ),
]
CbWindow = Annotated[
    float,
    typer.Option(
        "--cb-window-duration-secs",
        min=0.001,
        help="The window, in seconds.",
        rich_help_panel=_FAILURES,
    ),
]
MaxRetries = Annotated[
    int,
    typer.Option(
        "--retry-max-retries",
        min=0,
        help="How often a call that failed is tried again.",
        rich_help_panel=_FAILURES,
    ),
]
InitialBackoff = Annotated[
    float,
    typer.Option(
        "--retry-initial-backoff-ms",
        min=0.001,
        help="Milliseconds before the first time.",
        rich_help_panel=_FAILURES,
    ),
]
MaxBackoff = Annotated[
    float,
    typer.Option(
        "--retry-max-backoff-ms",
        min=0.001,
        help="The most between two times.",
        rich_help_panel=_FAILURES,
    ),
]
BackoffMultiplier = Annotated[
    float,
    typer.Option(
        "--retry-backoff-multiplier",
        min=1,
        help="By how much each wait is longer than the one before.",
        rich_help_panel=_FAILURES,
    ),
]
JitterFactor = Annotated[
    float,
    typer.Option(
        "--retry-jitter-factor",
        min=0,
        max=1,
        help="The share of a wait that is random.",
        rich_help_panel=_FAILURES,
    ),
]
LogLevel = Annotated[
    str,
    typer.Option("--log-level", help="debug, info, warning or error.", rich_help_panel=_SERVER),
]
LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json/--log-text",
        help="Logs as one JSON object a line.",
        rich_help_panel=_SERVER,
    ),
]
Host = Annotated[str, typer.Option("--host", help="The router's address.", rich_help_panel=_SERVER)]
Port = Annotated[
    int,
    typer.Option("--port", min=0, max=65535, help="The router's port.", rich_help_panel=_SERVER),
]
Placement = Annotated[
    PlacementName,
    typer.Option(
        "--placement",
        help="How a stream's worker is chosen: by the seconds until it could have computed the "
        "prompt (stream_aware), in turn, by the least load, or by the longest cached prefix.",
        rich_help_panel=_WORKERS,
    ),
]
BufferGb = Annotated[
    float,
    typer.Option(
        "--stream-buffer-gb",
        min=0.001,
        help="Memory of the router for copies of prompts, from which a stream is replayed when "
        "its worker is lost.",
        rich_help_panel=_LIMITS,
    ),
]
WorkerWait = Annotated[
    float,
    typer.Option(
        "--worker-wait-s",
        min=0,
        help="Seconds for which a call waits for a worker when none is ready.",
        rich_help_panel=_LIMITS,
    ),
]

ROUTER_FLAGS = {
    "host": Host,
    "port": Port,
    "placement": Placement,
    "max_open_streams": OpenStreams,
    "max_body_bytes": BodyBytes,
    "max_chunk_bytes": ChunkBytes,
    "stream_buffer_gb": BufferGb,
    "idle_timeout_s": IdleTimeout,
    "max_idle_timeout_s": MaxIdleTimeout,
    "resume_grace_s": ResumeGrace,
    "worker_wait_s": WorkerWait,
    "api_key_file": ApiKeyFile,
    "share_prefixes": SharePrefixes,
    "max_concurrent_requests": MaxConcurrent,
    "queue_size": QueueSize,
    "queue_timeout_secs": QueueTimeout,
    "request_timeout_secs": RequestTimeout,
    "cb_failure_threshold": CbFailures,
    "cb_success_threshold": CbSuccesses,
    "cb_timeout_duration_secs": CbTimeout,
    "cb_window_duration_secs": CbWindow,
    "retry_max_retries": MaxRetries,
    "retry_initial_backoff_ms": InitialBackoff,
    "retry_max_backoff_ms": MaxBackoff,
    "retry_backoff_multiplier": BackoffMultiplier,
    "retry_jitter_factor": JitterFactor,
    "log_level": LogLevel,
    "log_json": LogJson,
}
"""The flags of every command that runs a router, by the setting that each one makes."""


def with_router_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of a router. It is called with the `RouterConfig` that they make,
    with what is secret from the environment, as `settings`."""
    hints = get_type_hints(command, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY)
        for name, parameter in signature(command).parameters.items()
        if name != "settings"
    ]
    parameters += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=getattr(ROUTER, name), annotation=flag)
        for name, flag in ROUTER_FLAGS.items()
    ]

    def called(**given: Any) -> None:
        settings = RouterConfig(
            **{name: given.pop(name) for name in ROUTER_FLAGS},
            secret=os.environ.get(SECRET_VARIABLE) or None,
            admin_api_key=os.environ.get(ADMIN_KEY_VARIABLE) or None,
        )
        command(**given, settings=settings)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return called
