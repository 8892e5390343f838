"""Texts as token ids, by a model's own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any


def load_tokenizer(model_path: str) -> Any:
    """The tokenizer in a model's folder, or of a name on Hugging Face."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


@dataclass(frozen=True)
class ModelTokenizer:
    """Tokenises texts; the tokenizer is loaded for the first one."""

    model_path: str

    def __call__(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.model_path)
