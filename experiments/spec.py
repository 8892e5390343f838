"""A specification of an evaluation, from TOML: which workload, which loads, which cells, on what.

sglang-stream replay SPEC.toml       the cells on a real engine
sglang-stream simulate SPEC.toml     the same cells on a machine's profile
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from experiments.request_row import RequestMode
from experiments.workload.generator import Rest
from experiments.workload.published import WorkloadKind
from experiments.workload.revisions import MEASURED, Revisions
from retrieval_clients.traces import OnBad
from sglang_stream.config import PlacementName
from sglang_stream.errors import InvalidRequest
from sglang_stream.policy import Invalidation, PolicyName, Preemption

T = TypeVar("T")

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Some = Annotated[tuple[T, ...], msgspec.Meta(min_length=1)]


class WorkloadSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked. `kind`: the shape, also of a trace. `trace`: a folder (crawler) or a query
    map (anns) on disk, or a recorded file (.jsonl), else generated from `seed`. `on_bad`: what
    becomes of a trace's bad rows. `rest`: where generated retrievals spend the time that the gaps
    leave, before the first chunk or before the last; `revisions`: how generated lists change.
    `scale` divides tokens, `delay` multiplies retrieval times. `arrivals`: a file of gaps in
    seconds, else Poisson. Paths begin at the specification's folder."""

    kind: WorkloadKind
    queries: Count
    trace: Path | None = None
    on_bad: OnBad = "stop"
    rest: Rest = "first"
    revisions: Revisions = MEASURED
    arrivals: Path | None = None
    seed: int = 0
    scale: Positive = 1.0
    delay: Positive = 1.0
    output_tokens: Count = 1


class CellsSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is compared: every mode, streaming under every policy, at every rate, for every seed."""

    modes: Some[RequestMode] = ("waiting", "streaming")
    policies: Some[PolicyName] = ("default", "fcfs", "lcas", "mcps")
    placements: Some[PlacementName] = ("stream_aware",)
    qps: Some[Positive] = (1.0,)
    seeds: Some[int] = (0,)


class EngineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The workers, real or simulated. `kv_tokens`: of a prefill worker's pool; `batch_tokens`: of
    one iteration (SGLang's --chunked-prefill-size); `pass_tokens`: of its passes. With
    `decode_workers` they are apart, else `prefill_workers` unified ones. `host_memory_gb`: GiB of
    each device on an engine, of all together in the simulator. `flags` go to `sglang-stream serve`
    only. Two are the simulator's: `client`, `sdk` awaits the answer to each call before the next,
    `direct` waits for nothing; `compute_all`, policies under which passes compute all of a list
    alike, as published, and not first what is likely to stay."""

    prefill_workers: Count = 1
    decode_workers: Annotated[int, msgspec.Meta(ge=0)] = 0
    kv_tokens: Count | None = None
    batch_tokens: Count = 2048
    pass_tokens: Count = 2048
    page: Count = 1
    preemption: Preemption = "auto"
    invalidation: Invalidation = "soft"
    host_memory_gb: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    pass_ms: Positive | None = None
    client: Literal["sdk", "direct"] = "sdk"
    compute_all: tuple[PolicyName, ...] = ()
    flags: tuple[str, ...] = ()


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name`: also of the row file. `published`: the table of published figures that these rows
    are compared with. `goodput`: objective on TTFT in milliseconds."""

    name: str
    workload: WorkloadSpec
    cells: CellsSpec = CellsSpec()
    engine: EngineSpec = EngineSpec()
    published: Literal["crawler", "anns"] | None = None
    goodput_ttft_ms: Positive | None = None


def load_spec(path: Path) -> Spec:
    """Reads a specification. Raises InvalidRequest that names the file and the field."""

    def from_folder(kind: type, value: Any) -> Any:
        if kind is Path and isinstance(value, str):
            return (path.parent / Path(value).expanduser()).resolve()
        raise NotImplementedError(kind)

    try:
        return msgspec.toml.decode(path.read_bytes(), type=Spec, dec_hook=from_folder)
    except OSError as e:
        raise InvalidRequest(f"{path}: {e.strerror}", param="spec") from e
    except (msgspec.DecodeError, msgspec.ValidationError) as e:
        raise InvalidRequest(f"{path}: {e}", param="spec") from e


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of fields, of structs inside too, that are not the same, as rows hold them."""
    names: list[str] = []
    for key in dict.fromkeys((*one, *other)):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [f"{key}.{inner}" for inner in differing(a, b)]
        elif a != b:
            names.append(key)
    return names


def spec_fields(spec: msgspec.Struct) -> dict[str, Any]:
    """A specification, or a part of it, as a row holds it."""
    return dict(msgspec.to_builtins(spec, enc_hook=str))
