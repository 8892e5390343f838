"""What a worker's reports say: its load, when it expects to answer again, what it has cached."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_stream.messages import PREFIX_BLOCK, Report, Snapshot

_BLOCK_BYTES = 8


class WorkerLoad:
    """The latest report of a worker and its prefix blocks, kept without gaps.

    `busy_until_s`: until when its silence means that it computes, by the clock of `apply`.
    """

    def __init__(self) -> None:
        self.latest = Report(0, 0.0, 0, 0, 0, 0, 0, 0, 0.0)
        self.busy_until_s = 0.0
        self._blocks: set[bytes] = set()
        self._seq: int | None = None

    def apply(self, report: Report, now_s: float) -> bool:
        """Takes a report; False if one before it was missed, so that a snapshot is needed.

        One that comes late, after a snapshot or a report that holds it already, changes nothing.
        """
        if report.seq > self.latest.seq:
            self.latest = report
            self.busy_until_s = now_s + report.busy_s
        if self._seq is None or report.seq <= self._seq:
            return self._seq is not None
        if report.seq != self._seq + 1:
            self._seq = None
            return False
        self._seq = report.seq
        self._blocks.difference_update(_split(report.evicted))
        self._blocks.update(_split(report.cached))
        return True

    def restore(self, snapshot: Snapshot) -> None:
        """Starts anew from all that is cached."""
        self._seq = snapshot.seq
        self._blocks = set(_split(snapshot.cached))

    def shared_tokens(self, blocks: Sequence[bytes]) -> int:
        """How much of a prompt with these prefix blocks is cached, in tokens."""
        shared = 0
        for block in blocks:
            if block not in self._blocks:
                break
            shared += PREFIX_BLOCK
        return shared


def _split(blocks: bytes) -> list[bytes]:
    return [blocks[i : i + _BLOCK_BYTES] for i in range(0, len(blocks), _BLOCK_BYTES)]
