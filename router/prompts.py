"""Token ids from the bodies of stream calls. Long texts are tokenised in a thread."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from router.schemas import ChunksBody, DocumentBody, GenerateBody, OpenBody, text_of, token_array
from router.tokenizer import ModelTexts
from sglang_stream.errors import BodyTooLarge
from sglang_stream.prompt import Opening

_TOKENISED_HERE = 4096  # characters, about 1 ms; longer texts would hold up the event loop
_CHARACTER_IDS = 8  # more than the bytes of any character
R = TypeVar("R")


class PromptBuilder:
    """The prompts of one model. `max_text_bytes`: of one chunk or document in UTF-8.

    Its methods raise Malformed for ids outside the vocabulary, BodyTooLarge for long texts, and
    what `PromptAssembler` raises.
    """

    def __init__(self, model: ModelTexts, vocab_size: int, max_text_bytes: int) -> None:
        self._assembler = model.assembler
        self._defaults = model.defaults
        self._decode = model.decode
        self._vocab_size = vocab_size
        self._max_text_bytes = max_text_bytes

    def is_whole(self, ids: list[int]) -> bool:
        """Whether the text of `ids` ends with a whole character."""
        return not self._decode(ids[-_CHARACTER_IDS:]).endswith("\N{REPLACEMENT CHARACTER}")

    def defaults(self, opening: Opening) -> Mapping[str, float]:
        """The model's own sampling defaults, which hold for chats only, as in SGLang."""
        return self._defaults if opening.kind == "chat" else {}

    async def opening(self, body: OpenBody) -> Opening:
        """What stands before the context."""
        if body.input_ids is not None:
            return self._assembler.open_ids(self._given(body.input_ids))
        if body.prompt is not None:
            return await _computed(len(body.prompt), self._assembler.open_text, body.prompt)
        messages = [m.model_dump(exclude_unset=True) for m in body.messages or ()]
        size = len(body.preamble or "") + sum(len(str(m.get("content"))) for m in messages)
        return await _computed(size, self._assembler.open_chat, messages, body.preamble)

    async def chunks(self, body: ChunksBody) -> array[int]:
        """What an append adds."""
        if body.chunks is None:
            return self._given(body.input_ids or [])
        return await self._tokenised(body.chunks, self._chunk_ids)

    async def documents(self, texts: Sequence[str]) -> array[int]:
        """The context of an update, given its documents in the order of the prompt."""
        return await self._tokenised(texts, self._assembler.context)

    def context(self, input_ids: list[int]) -> array[int]:
        """The context of an update that is given as ids."""
        return self._given(input_ids)

    async def tail(self, opening: Opening, body: GenerateBody) -> array[int]:
        """What follows the context: the question and what the chat template puts after it.

        Checks `stop_token_ids` too: one outside the vocabulary may end the worker.
        """
        token_array(body.stop_token_ids or [], self._vocab_size, "stop_token_ids")
        size = len(body.question or "")
        tail = await _computed(size, self._assembler.tail, opening, body.question)
        return tail if body.input_ids is None else self._given(body.input_ids) + tail

    def _given(self, input_ids: list[int]) -> array[int]:
        return token_array(input_ids, self._vocab_size)

    async def _tokenised(
        self, texts: Sequence[Any], tokenise: Callable[[Sequence[Any]], array[int]]
    ) -> array[int]:
        size = 0
        for text in map(text_of, texts):
            self._check_size(text)
            size += len(text)
        return await _computed(size, tokenise, texts)

    def _chunk_ids(self, chunks: Sequence[str | DocumentBody]) -> array[int]:
        ids: array[int] = array("i")
        for chunk in chunks:
            plain = isinstance(chunk, str)
            tokenise = self._assembler.chunk if plain else self._assembler.document
            ids.extend(tokenise(text_of(chunk)))
        return ids

    def _check_size(self, text: str) -> None:
        limit = self._max_text_bytes
        if len(text) > limit or (len(text) * 4 > limit and len(text.encode()) > limit):
            raise BodyTooLarge(f"a text of {len(text)} characters: the limit is {limit} bytes")


async def _computed(size: int, work: Callable[..., R], *args: Any) -> R:
    """`work(*args)`, here or in a thread by the characters of its texts."""
    if size <= _TOKENISED_HERE:
        return work(*args)
    return await asyncio.to_thread(work, *args)
