"""From texts to token ids: the prompt of a stream, piece by piece.

    opening.tokens | document | document | ... | question + opening.closing
    '- template up to the context                 '- template from the context on

Each document is tokenised once, alone, and kept by its content. So an update costs the tokens of
its new documents only, and the longest common prefix of two prompts falls on a border between
documents, never inside one because of a tokeniser's merges. The ids of a prompt are therefore
those of its pieces put together, which may differ from those of the whole text tokenised at once.
"""

from __future__ import annotations

import secrets
from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, Protocol, TypeVar

from sglang_stream.errors import InvalidRequest
from sglang_stream.messages import digest

Document = str | Mapping[str, Any]
"""A document as a caller writes it: its text, or a mapping with `text` and perhaps `id`."""

K = TypeVar("K", bound=Hashable)

DOCUMENT_END = "\n\n"


class TextTokenizer(Protocol):
    """What is asked of a tokenizer; the fast ones of `transformers` satisfy it."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True)
class Text:
    """One piece of context: a document (a blank line follows it) or a text taken verbatim."""

    id: str | None
    text: str
    is_document: bool


@dataclass(frozen=True)
class Opening:
    """The tokens before the context, and the text that must follow the question.

    `closing` is what the chat template puts after the user's text, "" for the other kinds.
    """

    tokens: array[int]
    closing: str
    kind: Literal["chat", "text", "ids"]


class PromptAssembler:
    """Tokenises openings, chunks, documents and questions.

    `cache_tokens`: documents and chunks are kept, least recently used first out, up to so many
    tokens (4 bytes each). Arrays that come from here may be shared: do not change them. Several
    threads may use one assembler.
    """

    def __init__(self, tokenizer: TextTokenizer, cache_tokens: int = 4_000_000) -> None:
        self._tokenizer = tokenizer
        self._cache = _TokenCache(cache_tokens)

    def open_chat(self, messages: Sequence[Mapping[str, Any]], preamble: str | None) -> Opening:
        """The opening of a conversation: `messages`, then a user message that the context begins.

        `preamble` stands in that message before the context. Raises InvalidRequest if the
        template refuses the messages, or does not show the user's text exactly once.
        """
        mark = secrets.token_hex(16)
        last = {"role": "user", "content": (preamble or "") + mark}
        conversation = [*(_with_plain_content(m) for m in messages), last]
        before, *after = self._render(conversation).split(mark)
        if len(after) != 1:
            raise InvalidRequest(
                "the model's chat template changes the user's text, so it cannot be streamed "
                "into: open the stream with 'prompt' or 'input_ids'",
                param="messages",
            )
        return Opening(self._encode(before), after[0], "chat")

    def open_text(self, prompt: str) -> Opening:
        """The opening of a text completion, with the tokens a model wants at the beginning."""
        return Opening(self._encode(prompt, add_special_tokens=True), "", "text")

    def open_ids(self, ids: Sequence[int]) -> Opening:
        """The opening of a completion over token ids. Raises InvalidRequest for what is no id."""
        return Opening(_token_array(ids), "", "ids")

    def chunk(self, text: str) -> array[int]:
        """The ids of a text taken verbatim."""
        return self._cached(text)

    def document(self, text: str) -> array[int]:
        """The ids of a document and the blank line after it."""
        return self._cached(text + DOCUMENT_END)

    def context(self, documents: Sequence[str]) -> array[int]:
        """The ids of all `documents`, in this order."""
        ids: array[int] = array("i")
        for text in documents:
            ids.extend(self.document(text))
        return ids

    def tail(self, opening: Opening, question: str | None) -> array[int]:
        """The ids of what follows the context: the question and the template's closing."""
        return self._encode((question or "") + opening.closing)

    def _cached(self, text: str) -> array[int]:
        key = digest(_utf8(text))
        ids = self._cache.get(key)
        if ids is None:
            ids = self._encode(text)
            self._cache.put(key, ids)
        return ids

    def _encode(self, text: str, add_special_tokens: bool = False) -> array[int]:
        if not text and not add_special_tokens:
            return array("i")
        _utf8(text)
        return array("i", self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _render(self, conversation: list[Mapping[str, Any]]) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except Exception as e:
            # A template is a program that came with the model. Whatever it raises, it is about
            # these messages (roles that do not alternate, say) or about there being no template.
            raise InvalidRequest(
                f"the model's chat template refuses these messages ({e}); the context adds one "
                "user message after them. Change them, or open the stream with 'prompt'",
                param="messages",
            ) from e


class _TokenCache:
    """Token arrays by key, bounded by the number of tokens held; the least recently used goes."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held = 0
        self._entries: OrderedDict[bytes, array[int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: bytes) -> array[int] | None:
        with self._lock:
            ids = self._entries.get(key)
            if ids is not None:
                self._entries.move_to_end(key)
            return ids

    def put(self, key: bytes, ids: array[int]) -> None:
        # An empty text has no tokens but takes an entry, so each counts as one token at least.
        with self._lock:
            if key in self._entries or _weight(ids) > self._capacity:
                return
            self._entries[key] = ids
            self._held += _weight(ids)
            while self._held > self._capacity:
                _, gone = self._entries.popitem(last=False)
                self._held -= _weight(gone)


def arrange(
    previous: Sequence[K], new: Sequence[K], order: Literal["relevance", "sticky"]
) -> list[K]:
    """The order in which the documents `new` stand in the prompt, after `previous`.

    "relevance": as they came. "sticky": those already in the prompt stay in their order there,
    the others follow in theirs, so that less of the prompt changes. Always a permutation of `new`;
    a document that occurs twice counts twice.
    """
    if order == "relevance":
        return list(new)
    left = Counter(new)
    kept: list[K] = []
    for key in previous:
        if left[key] > 0:
            left[key] -= 1
            kept.append(key)
    taken = Counter(kept)
    added: list[K] = []
    for key in new:
        if taken[key] > 0:
            taken[key] -= 1
        else:
            added.append(key)
    return kept + added


def _weight(ids: array[int]) -> int:
    return max(1, len(ids))


def _with_plain_content(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with a content of text parts as one text, joined as SGLang joins them.

    Many templates would print the list itself. Raises InvalidRequest for parts that are no text.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [p.get("text") for p in content if isinstance(p, Mapping) and p.get("type") == "text"]
    if len(texts) != len(content) or not all(isinstance(t, str) for t in texts):
        raise InvalidRequest(
            "a streamed conversation takes text only: every part of a content must be "
            '{"type": "text", "text": ...}',
            param="messages",
        )
    return {**message, "content": " ".join(str(t) for t in texts)}


def _token_array(ids: Sequence[int]) -> array[int]:
    try:
        tokens = array("i", ids)
    except (TypeError, OverflowError) as e:
        raise InvalidRequest(f"not a list of token ids: {e}", param="input_ids") from e
    if tokens and min(tokens) < 0:
        raise InvalidRequest(f"token id {min(tokens)} is negative", param="input_ids")
    return tokens


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        # JSON may carry half of a surrogate pair, which no tokenizer takes.
        raise InvalidRequest(
            f"the text is not valid Unicode at character {e.start}: remove the lone surrogate"
        ) from e
