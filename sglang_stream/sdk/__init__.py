"""The client of streamed requests; needs neither SGLang nor torch."""

from sglang_stream.sdk.answer import StreamUsage, Usage
from sglang_stream.sdk.chat import AsyncStream, Stream, stream_chat

__all__ = ["AsyncStream", "Stream", "StreamUsage", "Usage", "stream_chat"]
