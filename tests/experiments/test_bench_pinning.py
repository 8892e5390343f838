from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from experiments.bench import pinning
from experiments.bench.pinning import POOL_TOKENS, REQUESTS, STREAMS, Sizes, table
from experiments.bench.run import main
from experiments.rows import Row, read_rows


def text_of(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    Console(file=file, width=140).print(table(rows))
    return file.getvalue()


def row(pair: int, side: str, seconds: float) -> Row:
    idle = side == "idle"
    return {
        "bench": "pinning",
        "pair": pair,
        "side": side,
        "pool": 8000,
        "streams": 200 if idle else 0,
        "held_tokens": 7600 if idle else 0,
        "left_tokens": 3600 if idle else 0,
        "ttft_s": [seconds / 2, seconds],
        "total_s": seconds * 2,
    }


def test_sizes_fill_the_pool() -> None:
    for pool in (POOL_TOKENS, 8191, 5000):
        sizes = Sizes.for_pool(pool, STREAMS)
        assert 0.95 <= sizes.stream * STREAMS / pool < 1
        assert sizes.request * REQUESTS / pool == pytest.approx(0.5, abs=0.001)


def test_ratio_of_medians() -> None:
    rows = [row(p, side, s) for p in range(5) for side, s in (("idle", 1.05), ("none", 1.0))]
    text = text_of(rows)
    assert text.count("1.050 (1.050 to 1.050)") == 2
    assert text.count("met") == 2
    assert "held 95% of the pool" in text
    slow = [row(p, side, s) for p in range(5) for side, s in (("idle", 1.2), ("none", 1.0))]
    assert text_of(slow).count("MISSED") == 2


def test_pairs_without_their_other_side_are_left_out() -> None:
    rows = [row(0, "idle", 1.0), row(0, "none", 1.0), row(1, "idle", 9.0)]
    assert "1,500" in text_of(rows) or "750" in text_of(rows)
    assert "1.000 (1.000 to 1.000)" in text_of(rows)
    assert "ratio" in text_of(rows[2:])


@pytest.mark.long
def test_on_the_running_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small run: the streams held the pool, and had to give of it."""
    monkeypatch.setattr(pinning, "STREAMS", 20)
    monkeypatch.setattr(pinning, "POOL_TOKENS", 2000)
    out = tmp_path / "rows.jsonl"
    assert main(["pinning", "--idle-pairs", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = [row for row in read_rows(out) if row["bench"] == "pinning"]
    assert [(row["pair"], row["side"]) for row in rows] == [
        *((0, "idle"), (0, "none"), (1, "none"), (1, "idle"))
    ]
    for idle in (row for row in rows if row["side"] == "idle"):
        assert idle["held_tokens"] >= 0.95 * 2000
        assert idle["left_tokens"] < idle["held_tokens"]
        assert len(idle["ttft_s"]) == REQUESTS
    assert main(["--show", str(out)]) == 0
    assert capsys.readouterr().out == printed.partition("The rows are in")[0]
