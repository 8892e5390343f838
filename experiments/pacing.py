"""Moments of `perf_counter` to wait for."""

from __future__ import annotations

import asyncio
import time


async def until(moment: float) -> None:
    """Sleeps until a moment of `perf_counter`; not at all if it has passed."""
    left = moment - time.perf_counter()
    if left > 0:
        await asyncio.sleep(left)
