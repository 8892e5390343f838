"""Token ids on their way from the wire (int32 bytes) to SGLang (`array("q")`)."""

from __future__ import annotations

from array import array

import numpy as np

from sglang_stream.errors import Malformed

_BLOCK = 1 << 14


def unpack_tokens(raw: bytes, vocab_size: int) -> array[int]:
    """The ids in `raw`, checked. Raises Malformed for a truncated buffer or as `check_tokens`."""
    if len(raw) % 4:
        raise Malformed(f"token ids come as int32, but {len(raw)} bytes arrived: send them again")
    tokens = array("q")
    tokens.frombytes(np.frombuffer(raw, dtype="<i4").astype(np.int64).tobytes())
    check_tokens(tokens, vocab_size)
    return tokens


def pack_ids(tokens: array[int]) -> bytes:
    """`array("q")` as little-endian int32 bytes, the inverse of `unpack_tokens`."""
    return np.frombuffer(tokens, np.int64).astype("<i4").tobytes()


def check_tokens(tokens: array[int], vocab_size: int) -> None:
    """Raises Malformed if an id of `tokens` (`array("q")`) is outside [0, vocab_size).

    SGLang does not look: such an id would end the scheduler in the embedding.
    """
    ids = np.frombuffer(tokens, np.int64)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise Malformed(
            f"token id {bad} is outside the model's vocabulary (0 to {vocab_size - 1})",
            param="input_ids",
        )


def common_prefix(a: array[int], b: array[int]) -> int:
    """The number of leading ids that `a` and `b` (both `array("q")`) share.

    Compared in blocks, so that an early difference costs little: 128k equal ids take well under
    100 microseconds.
    """
    length = min(len(a), len(b))
    x, y = np.frombuffer(a, np.int64, length), np.frombuffer(b, np.int64, length)
    for start in range(0, length, _BLOCK):
        differs = x[start : start + _BLOCK] != y[start : start + _BLOCK]
        first = int(differs.argmax())
        if differs[first]:
            return start + first
    return length
