"""sglang-stream: serving for prompts whose context is still being retrieved."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_stream.sdk import AsyncStream, Stream, StreamUsage, Usage, stream_chat

__all__ = ["AsyncStream", "Stream", "StreamUsage", "Usage", "stream_chat"]


def __getattr__(name: str) -> Any:
    # On demand: SGLang's processes and the policies import this package and need no HTTP client.
    if name in __all__:
        from sglang_stream import sdk

        return getattr(sdk, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
