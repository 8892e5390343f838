"""The settings of a worker's stream support and of a router.

Built once where a command starts and handed down. The engine's travels into SGLang's scheduler
processes as JSON in the environment variable `SGLANG_STREAM`; the value `1` means all defaults.
A machine's `Profile` is a JSON file, a user's own or one of `profiles/`.
"""

from __future__ import annotations

import math
from dataclasses import astuple
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Generic, Literal, TypeVar

import msgspec

from sglang_stream.errors import InvalidRequest
from sglang_stream.messages import Role
from sglang_stream.policy.cost import Copying, CostModel, Decode, Prefill, Rest
from sglang_stream.policy.types import Invalidation, PolicyName, Preemption

ENGINE_VARIABLE = "SGLANG_STREAM"
SECRET_VARIABLE = "SGLANG_STREAM_SECRET"
ADMIN_KEY_VARIABLE = "SGLANG_STREAM_ADMIN_KEY"

PlacementName = Literal["stream_aware", "round_robin", "least_loaded", "prefix"]
"""How a stream's prefill worker is chosen (see `router.placement`)."""


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stream support of one worker.

    `host`, `port`: where the socket for chunk events is bound; port 0 takes a free one (a router
    finds it through the worker's `/get_server_info`). `max_streams`: open at once.
    `pass_tokens`: the most tokens of open streams computed in one iteration.
    `pass_ms`: how long an iteration with passes may be predicted to take; None for what
    `policy.pace` finds, 50 at least. `cost`: the machine's costs; None to learn them from the
    forwards and, after a guess, the swaps (`engine.learn`). `policy`, `preemption`,
    `invalidation`: see `policy.types`. `host_memory_gb`: for copies of preempted streams' KV, GiB
    of each tensor-parallel rank. `max_prompt_tokens`: of one stream, None for the model's context
    length. `secret`: only routers that have the same one can reach the socket, and what is said is
    encrypted. `served`: started by `sglang-stream serve`, which tells its users the process's
    number.
    """

    host: str = "127.0.0.1"
    port: int = 0
    max_streams: int = 1024
    max_prompt_tokens: int | None = None
    policy: PolicyName = "slack"
    pass_tokens: int = 2048
    pass_ms: float | None = None
    preemption: Preemption = "auto"
    host_memory_gb: float = 4.0
    invalidation: Invalidation = "soft"
    cost: CostModel | None = None
    credits: int = 256
    secret: str | None = None
    served: bool = False

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


class WorkerAddress(msgspec.Struct, frozen=True):
    """A worker as the operator names it. `role`, `bootstrap_port`: None to ask the worker."""

    url: str
    role: Role | None = None
    bootstrap_port: int | None = None


class RouterConfig(msgspec.Struct, frozen=True):
    """A router in front of one or more workers.

    `max_open_streams`: over all clients. `max_body_bytes` bounds every request body,
    `max_chunk_bytes` the text of one document or chunk. `stream_buffer_gb`: the most memory for
    copies of prompts, from which streams are replayed. `idle_timeout_s`: a stream without calls is
    dropped after it, unless its opener chose another (at most `max_idle_timeout_s`).
    `resume_grace_s`: how long a generation whose client is gone waits, before its first token was
    delivered, for the same `request_id` to come again. `worker_wait_s`: how long a call waits for
    a worker when none is ready. `secret`: what workers and routers share.

    `api_key_file`, `admin_api_key`, `share_prefixes`: see `router.auth`. `max_concurrent_requests`
    answers are generated at once (None: no limit), `queue_size` wait, for at most
    `queue_timeout_secs`; one that takes longer than `request_timeout_secs` is ended. `cb_*`: after
    so many failures within the window a worker is left alone for the time-out, and used again
    after so many successes. `retry_*`: how often and how soon a failed call is tried again.
    """

    workers: tuple[WorkerAddress, ...] = ()
    host: str = "127.0.0.1"
    port: int = 30000
    placement: PlacementName = "stream_aware"
    max_open_streams: int = 1024
    max_body_bytes: int = 32 << 20
    max_chunk_bytes: int = 4 << 20
    stream_buffer_gb: float = 4.0
    idle_timeout_s: float = 60.0
    max_idle_timeout_s: float = 3600.0
    resume_grace_s: float = 10.0
    worker_wait_s: float = 10.0
    secret: str | None = None
    api_key_file: str | None = None
    admin_api_key: str | None = None
    share_prefixes: bool = False
    max_concurrent_requests: int | None = None
    queue_size: int = 256
    queue_timeout_secs: float = 60.0
    request_timeout_secs: float = 1800.0
    cb_failure_threshold: int = 5
    cb_success_threshold: int = 2
    cb_timeout_duration_secs: float = 10.0
    cb_window_duration_secs: float = 60.0
    retry_max_retries: int = 3
    retry_initial_backoff_ms: float = 50.0
    retry_max_backoff_ms: float = 5000.0
    retry_backoff_multiplier: float = 1.5
    retry_jitter_factor: float = 0.2
    log_level: str = "info"
    log_json: bool = False


T = TypeVar("T")


class Figure(
    msgspec.Struct, Generic[T], frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A figure of a profile. `source`: where it is from; `error`: the median relative error of a
    curve that was fitted to measurements, None where nothing was fitted."""

    value: T
    source: str
    error: float | None = None


_NEVER_SLOWER = Figure(Rest(((0.0, 0.0),)), "not measured: taken for never slower")


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a machine with a model on it takes and holds.

    `kind`: measured on it, or derived from published figures. `pass_ms`: how long an iteration
    with passes may be. `kv_bytes_per_token`: over all devices; `kv_tokens`: the KV pool.
    `call`: seconds from a client's call until the scheduler has it, and as long back; None where it
    is not known. `call_rest`: how much longer there and back take together when no answer was asked
    for in a while; `forward_rest`: a prefill after a while without one. `samples`: the file of what
    was measured, beside the profile's own.
    """

    name: str
    kind: Literal["measured", "derived"]
    machine: str
    model: str
    dtype: str
    pass_ms: Figure[float]
    kv_bytes_per_token: Figure[float]
    kv_tokens: Figure[int]
    prefill: Figure[Prefill]
    swap_out: Figure[Copying]
    swap_in: Figure[Copying]
    decode: Figure[Decode]
    call: Figure[float] | None = None
    call_rest: Figure[Rest] = _NEVER_SLOWER
    forward_rest: Figure[Rest] = _NEVER_SLOWER
    samples: str | None = None

    @property
    def cost(self) -> CostModel:
        """What the planner needs of it."""
        return CostModel(self.prefill.value, self.swap_out.value, self.swap_in.value)

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"


PROFILES = files("sglang_stream") / "profiles"


def profile_names() -> list[str]:
    """The profiles that come with the package."""
    return sorted(
        file.name.removesuffix(".json")
        for file in PROFILES.iterdir()
        if file.name.endswith(".json")
    )


def load_profile(name_or_path: str) -> Profile:
    """The profile of that name, or in that file. Raises InvalidRequest if it is none."""
    if name_or_path in profile_names():
        return _decode_profile(name_or_path, (PROFILES / f"{name_or_path}.json").read_bytes())
    path = Path(name_or_path).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _bad_profile(
            name_or_path,
            f"there is no such file or profile. Profiles: {', '.join(profile_names())}; "
            "`sglang-stream calibrate` makes a file",
        ) from None
    except OSError as e:
        raise _bad_profile(name_or_path, e.strerror or str(e)) from e
    return _decode_profile(name_or_path, content)


def _decode_profile(name_or_path: str, content: bytes) -> Profile:
    try:
        profile = msgspec.json.decode(content, type=Profile)
    except msgspec.DecodeError as e:
        raise _bad_profile(name_or_path, f"this is no profile: {e}") from e
    curves = (profile.prefill, profile.swap_out, profile.swap_in, profile.decode)
    for curve in curves:
        numbers = astuple(curve.value)
        if min(numbers) < 0 or not 0 < sum(numbers) < math.inf:
            raise _bad_profile(name_or_path, f"costs are at least 0 and not all 0: {curve.value}")
    for rest in (profile.call_rest, profile.forward_rest):
        if not _is_rest(rest.value):
            raise _bad_profile(
                name_or_path, f"seconds of rest ascend from 0, extras are at least 0: {rest.value}"
            )
    if min(profile.pass_ms.value, profile.kv_bytes_per_token.value, profile.kv_tokens.value) <= 0:
        raise _bad_profile(
            name_or_path, "pass_ms, kv_bytes_per_token and kv_tokens must be above 0"
        )
    return profile


def _is_rest(rest: Rest) -> bool:
    rested_s = [point[0] for point in rest.points]
    return (
        rested_s[:1] == [0]
        and all(before < after < math.inf for before, after in pairwise(rested_s))
        and all(0 <= extra < math.inf for _, extra in rest.points)
    )


def _bad_profile(name_or_path: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"--profile {name_or_path}: {reason}", param="--profile")
