"""Texts and token ids for prompts, and what a prompt's ids say again as text."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

WORDS = (
    "the engine keeps what it has computed while pages of a naïve crawler are still on their way "
    "and then only one question is left: how long does it take from 東京 to the first word?"
).split()


def words(seed: object, count: int) -> str:
    """A text of `count` words that depends on `seed` only; about 2 tokens a word."""
    rng = random.Random(repr(seed))
    return " ".join(f"{rng.choice(WORDS)} {rng.randrange(1000)}" for _ in range(count // 2))


def ids(seed: object, length: int) -> list[int]:
    """Token ids that depend on `seed` only; all are ordinary pieces of text."""
    rng = random.Random(repr(seed))
    return [rng.randrange(300, 4000) for _ in range(length)]


class Prompts:
    """What the small model's prompts look like, worked out apart from the product."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        encoded: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return encoded

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def text(self, opening: Mapping[str, Any], context: str, question: str) -> str:
        """The whole prompt of a stream that was opened with the fields of `opening`."""
        if "input_ids" in opening:
            return self.decode(opening["input_ids"]) + context + question
        if "prompt" in opening:
            return f"<|bos|>{opening['prompt']}{context}{question}"
        last = {"role": "user", "content": opening.get("preamble", "") + context + question}
        turns = [*opening.get("messages", ()), last]
        said = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in turns)
        return f"<|bos|>{said}<|im_start|>assistant\n"


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
