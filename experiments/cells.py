"""The cells of a specification: one load each, and the server that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from experiments.request_row import RequestMode
from experiments.spec import CellsSpec, EngineSpec
from sglang_stream.config import PlacementName
from sglang_stream.errors import InvalidRequest
from sglang_stream.policy import PolicyName


class Server(NamedTuple):
    """What a server is started with that cells differ in."""

    policy: PolicyName
    placement: PlacementName

    def flags(self, engine: EngineSpec) -> list[str]:
        """What `sglang-stream serve` is told, caching reports and metrics for the rows among it."""
        workers = ["--workers", str(engine.prefill_workers)]
        if engine.decode_workers:
            workers = ["--prefill-workers", str(engine.prefill_workers)]
            workers += ["--decode-workers", str(engine.decode_workers)]
        flags: dict[str, object] = {
            "--stream-policy": self.policy,
            "--placement": self.placement,
            "--preemption": engine.preemption,
            "--invalidation": engine.invalidation,
            "--stream-host-memory-gb": engine.host_memory_gb,
            "--stream-pass-ms": engine.pass_ms,
            "--stream-pass-tokens": engine.pass_tokens,
            "--chunked-prefill-size": engine.batch_tokens,
            "--page-size": engine.page,
            "--max-total-tokens": engine.kv_tokens,
        }
        told = [(flag, value) for flag, value in flags.items() if value is not None]
        reports = ["--enable-cache-report", "--enable-metrics"]
        return [*workers, *(str(x) for pair in told for x in pair), *reports, *engine.flags]


@dataclass(frozen=True)
class Cell:
    """One load. `policy`: None unless it is streamed."""

    mode: RequestMode
    policy: PolicyName | None
    placement: PlacementName
    qps: float
    seed: int

    @property
    def name(self) -> str:
        how = f"{self.mode} {self.policy}" if self.policy else self.mode
        return f"{how}, {self.placement}, {self.qps:g} QPS, seed {self.seed}"


def server_of(cell: Cell, spec: CellsSpec) -> Server:
    """Without streams it is one whose order is SGLang's own, or the first: with no stream open all
    are alike."""
    others = "default" if "default" in spec.policies else spec.policies[0]
    return Server(cell.policy or others, cell.placement)


def cells_of(spec: CellsSpec) -> list[Cell]:
    """All cells, those of one server together."""
    cells = [
        Cell(mode, policy, placement, qps, seed)
        for placement in spec.placements
        for qps in spec.qps
        for seed in spec.seeds
        for mode in spec.modes
        for policy in (spec.policies if mode == "streaming" else (None,))
    ]
    servers = list(dict.fromkeys(server_of(cell, spec) for cell in cells))
    return sorted(cells, key=lambda cell: servers.index(server_of(cell, spec)))


def require_one_server(cells: Sequence[Cell], base_url: str) -> None:
    """Raises InvalidRequest if cells need servers with different flags, and there is only one."""
    policies = {cell.policy for cell in cells if cell.policy is not None}
    placements = {cell.placement for cell in cells}
    for what, names in (("policies", policies), ("placements", placements)):
        if len(names) > 1:
            raise InvalidRequest(
                f"--base-url {base_url}: cells.{what} are flags of a server, and this one is "
                f"running already: name the one that it has, of {', '.join(sorted(names))}, or "
                "leave --base-url away to have a server started for each",
                param="--base-url",
            )
