"""Times `common_prefix` on two long prompts that differ in their last token only, the worst case.

`python -m sglang_stream.engine.measure` prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from array import array

from sglang_stream.engine.tokens import common_prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128 * 1024, help="length of each prompt")
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    for seconds in measure(options.tokens, options.repeats):
        print(json.dumps({"tokens": options.tokens, "seconds": seconds}))


def measure(tokens: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` comparisons, after one that is not counted."""
    rng = random.Random(0)
    a = array("q", (rng.randrange(1 << 17) for _ in range(tokens)))
    b = array("q", a)
    b[-1] += 1
    times: list[float] = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        shared = common_prefix(a, b)
        times.append(time.perf_counter() - begin)
        assert shared == tokens - 1
    return times[1:]


if __name__ == "__main__":
    main()
