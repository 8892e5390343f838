"""The settings of a worker's stream support and of a router.

Built once where a command starts and handed down. The engine's travels into SGLang's scheduler
processes as JSON in the environment variable `SGLANG_STREAM`; the value `1` means all defaults.
"""

from __future__ import annotations

import msgspec

ENGINE_VARIABLE = "SGLANG_STREAM"


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stream support of one worker.

    `host`, `port`: where the socket for chunk events is bound; port 0 takes a free one (a router
    finds it through the worker's `/get_server_info`). `max_streams`: open at once.
    `pass_tokens`: the most tokens of open streams computed in one iteration.
    `max_prompt_tokens`: of one stream, None for the model's context length.
    """

    host: str = "127.0.0.1"
    port: int = 0
    max_streams: int = 1024
    max_prompt_tokens: int | None = None
    pass_tokens: int = 512
    credits: int = 256

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_environment(cls, value: str) -> EngineConfig:
        """The settings in `value`. Raises ValueError with the reason if they are not valid."""
        if value == "1":
            return cls()
        try:
            return msgspec.json.decode(value, type=cls)
        except msgspec.DecodeError as e:
            raise ValueError(f"{ENGINE_VARIABLE} is neither 1 nor valid JSON settings: {e}") from e


class RouterConfig(msgspec.Struct, frozen=True):
    """A router in front of one worker.

    `worker_url`: the worker's HTTP address. `max_open_streams`: over all clients. `max_body_bytes`
    bounds every request body, `max_chunk_bytes` the text of one document or chunk.
    `idle_timeout_s`: a stream without calls is dropped after it, unless its opener chose another
    (at most `max_idle_timeout_s`). `resume_grace_s`: how long a generation whose client is gone
    waits, before its first token was delivered, for the same `request_id` to come again.
    """

    worker_url: str
    host: str = "127.0.0.1"
    port: int = 30000
    max_open_streams: int = 1024
    max_body_bytes: int = 32 << 20
    max_chunk_bytes: int = 4 << 20
    idle_timeout_s: float = 60.0
    max_idle_timeout_s: float = 3600.0
    resume_grace_s: float = 10.0
