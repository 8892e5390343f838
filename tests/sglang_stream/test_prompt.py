from __future__ import annotations

from array import array
from collections import Counter
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sglang_stream.errors import InvalidRequest
from sglang_stream.prompt import PromptAssembler, arrange

CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\nDocuments have blank lines after them.\n\n",
    "def encode(text: str) -> list[int]:\n    return tokens\n\n" * 3,
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE with a BOS token, trained on a few lines so that merges cross borders."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")
    fast.chat_template = TEMPLATE
    return fast


class Counting:
    """A tokenizer of one id per character that counts the texts it was given."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.texts.append(text)
        return [ord(c) for c in text]

    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        return "".join(f"[{m['role']}]{m['content']}" for m in conversation) + "[assistant]"


documents = st.lists(st.text(max_size=20), max_size=6)


@given(documents)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_context_is_its_documents_tokens(tokenizer: Any, texts: list[str]) -> None:
    prompt = PromptAssembler(tokenizer)
    alone = [tokenizer.encode(t + "\n\n", add_special_tokens=False) for t in texts]
    assert list(prompt.context(texts)) == [i for ids in alone for i in ids]
    assert list(prompt.context(texts)) == [i for t in texts for i in prompt.document(t)]
    assert tokenizer.decode(prompt.context(texts)) == "".join(t + "\n\n" for t in texts)


@given(documents, documents, documents)
def test_common_prefixes_end_at_or_after_a_document_border(
    same: list[str], old: list[str], new: list[str]
) -> None:
    prompt = PromptAssembler(Counting())
    border = len(prompt.context(same))
    first, second = prompt.context(same + old), prompt.context(same + new)
    assert first[:border] == second[:border] == prompt.context(same)


def test_a_chat_opens_around_the_context(tokenizer: Any) -> None:
    prompt = PromptAssembler(tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    opening = prompt.open_chat(messages, "Read this: ")
    assert opening.kind == "chat"
    assert opening.closing == "<|end|>\n<|assistant|>"
    before = "<|system|>Be brief.<|end|>\n<|user|>Hi<|end|>\n<|user|>Read this: "
    assert tokenizer.decode(opening.tokens) == before
    assert opening.tokens[0] != tokenizer.bos_token_id

    ids = opening.tokens + prompt.context(["D"]) + prompt.tail(opening, "Why?")
    last = {"role": "user", "content": "Read this: D\n\nWhy?"}
    whole = tokenizer.apply_chat_template(
        [*messages, last], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(ids) == whole
    assert tokenizer.decode(prompt.tail(opening, None)) == opening.closing


def test_a_chat_of_nothing_but_the_context(tokenizer: Any) -> None:
    opening = PromptAssembler(tokenizer).open_chat([], None)
    assert tokenizer.decode(opening.tokens) == "<|user|>"


def test_contents_of_text_parts_become_one_text(tokenizer: Any) -> None:
    prompt = PromptAssembler(tokenizer)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    opening = prompt.open_chat([{"role": "user", "content": parts}], None)
    assert tokenizer.decode(opening.tokens) == "<|user|>a b<|end|>\n<|user|>"
    image = [{"type": "image_url", "image_url": {"url": "u"}}]
    with pytest.raises(InvalidRequest, match="text only"):
        prompt.open_chat([{"role": "user", "content": image}], None)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ALTERNATING, "roles must alternate"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "changes the user's"),
        ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "changes the user's"),
        ("fixed", "changes the user's"),
        (None, "chat template"),
    ],
)
def test_templates_that_cannot_be_streamed_into(
    tokenizer: Any, monkeypatch: Any, template: str | None, reason: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        PromptAssembler(tokenizer).open_chat([{"role": "user", "content": "Hi"}], None)
    assert caught.value.param == "messages"


def test_text_and_id_openings(tokenizer: Any) -> None:
    prompt = PromptAssembler(tokenizer)
    text = prompt.open_text("The quick")
    assert list(text.tokens) == tokenizer.encode("The quick")
    assert text.tokens[0] == tokenizer.bos_token_id
    assert list(prompt.open_text("").tokens) == [tokenizer.bos_token_id]
    ids = prompt.open_ids([3, 1, 2])
    assert ids.tokens == array("i", [3, 1, 2])
    for opening in (text, ids):
        assert opening.closing == ""
        assert prompt.tail(opening, None) == array("i")
        assert prompt.tail(opening, "fox") == prompt.chunk("fox")


@pytest.mark.parametrize("ids", [[-1], [2**31], ["a"], [1.5], [None]])
def test_bad_ids(tokenizer: Any, ids: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        PromptAssembler(tokenizer).open_ids(ids)
    assert caught.value.param == "input_ids"


def test_a_chunk_is_verbatim_and_a_document_has_a_blank_line(tokenizer: Any) -> None:
    prompt = PromptAssembler(tokenizer)
    assert tokenizer.decode(prompt.chunk(" fox")) == " fox"
    assert tokenizer.decode(prompt.document(" fox")) == " fox\n\n"
    assert prompt.chunk("") == array("i")
    assert tokenizer.decode(prompt.document("")) == "\n\n"


def test_half_a_character_is_refused(tokenizer: Any) -> None:
    prompt = PromptAssembler(tokenizer)
    for act in (prompt.chunk, prompt.document, prompt.open_text):
        with pytest.raises(InvalidRequest, match="character 1"):
            act("a\ud800")


def test_a_document_is_tokenised_once() -> None:
    counting = Counting()
    prompt = PromptAssembler(counting)
    prompt.context(["a", "b", "a"])
    prompt.context(["b", "c"])
    assert counting.texts == ["a\n\n", "b\n\n", "c\n\n"]


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 30))
def test_the_cache_is_bounded_and_drops_the_least_recently_used(
    lengths: list[int], capacity: int
) -> None:
    """A text of n characters weighs n tokens, an empty one 1; a model of the cache runs beside."""
    counting = Counting()
    prompt = PromptAssembler(counting, cache_tokens=capacity)
    kept: list[int] = []
    for length in lengths:
        tokenised = len(counting.texts)
        assert len(prompt.chunk("x" * length)) == length
        # An empty text needs no tokenizer, cached or not.
        hit = length in kept or length == 0
        assert (len(counting.texts) == tokenised) == hit
        if length in kept:
            kept.remove(length)
        if max(1, length) <= capacity:
            kept.append(length)
        while sum(max(1, n) for n in kept) > capacity:
            kept.pop(0)


keys = st.lists(st.integers(0, 6), max_size=10)


@given(keys, keys, st.sampled_from(["relevance", "sticky"]))
def test_an_arrangement_is_a_permutation(
    previous: list[int], new: list[int], order: Literal["relevance", "sticky"]
) -> None:
    assert Counter(arrange(previous, new, order)) == Counter(new)


@given(keys, keys)
def test_relevance_keeps_the_retrievers_order(previous: list[int], new: list[int]) -> None:
    assert arrange(previous, new, "relevance") == new


@given(keys, keys)
def test_sticky_keeps_what_stays_and_then_adds(previous: list[int], new: list[int]) -> None:
    result = arrange(previous, new, "sticky")
    both = Counter(previous) & Counter(new)
    kept, added = result[: both.total()], result[both.total() :]
    assert Counter(kept) == both
    assert is_subsequence(kept, previous)
    assert is_subsequence(added, new)


def is_subsequence(part: list[int], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(key in rest for key in part)


def test_sticky_by_example() -> None:
    assert arrange(["a", "b", "c"], ["c", "d", "a"], "sticky") == ["a", "c", "d"]
    assert arrange([], ["b", "a"], "sticky") == ["b", "a"]
    assert arrange(["a"], ["b", "a", "a"], "sticky") == ["a", "b", "a"]
    assert arrange(["a", "a"], ["a"], "sticky") == ["a"]
