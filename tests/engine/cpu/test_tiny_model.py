from __future__ import annotations

import hashlib
import os
import pydoc
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from sglang_stream.engine.cpu.tiny_model import VOCABULARY, build_tiny_model

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(directory: Path):  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> PreTrainedModel:
    torch.set_num_threads(1)  # more would wait for one another on a busy machine
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompt(tokenizer) -> list[int]:  # type: ignore[no-untyped-def]
    """3,000 tokens of documentation."""
    names = ("argparse", "collections", "email.message", "pathlib")
    text = "".join(pydoc.plain(pydoc.render_doc(name)) for name in names)
    return tokenizer.encode(text)[:3000]


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def test_same_bytes_in_another_process(directory: Path, tmp_path: Path) -> None:
    build = "import sys, pathlib; from sglang_stream.engine.cpu.tiny_model import build_tiny_model"
    subprocess.run(
        [sys.executable, "-c", f"{build}; build_tiny_model(pathlib.Path(sys.argv[1]))", tmp_path],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
    )
    assert set(digests(tmp_path)) == FILES
    assert digests(tmp_path) == digests(directory)


def test_cache_folder_is_built_once_and_whole_when_two_processes_ask(tmp_path: Path) -> None:
    ask = "from sglang_stream.engine.cpu.tiny_model import default_tiny_model as m; print(m())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", ask], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [p.communicate(timeout=300)[0].strip() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert answers[0] == answers[1]
    assert {p.name for p in Path(answers[0]).iterdir()} == FILES
    assert list((tmp_path / "sglang-stream").iterdir()) == [Path(answers[0])]


def test_size(model: PreTrainedModel) -> None:
    assert 28e6 < sum(p.numel() for p in model.parameters()) < 32e6
    assert model.config.max_position_embeddings == 32768
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_tokenizer_loses_nothing_and_compresses(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert len(tokenizer) == VOCABULARY
    for text in ("naïve 日本語 🙂\r\n\ttab  two\x00", "def f(self, *args) -> None: ..."):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    text = pydoc.plain(pydoc.render_doc("argparse"))
    assert len(text) / len(tokenizer.encode(text)) > 3.0


def test_chat_template_marks_turns_with_single_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end), ids.count(tokenizer.bos_token_id)) == (5, 4, 1)
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, prompt: list[int], count: int, piece: int | None = None
) -> list[int]:
    """`count` tokens after `prompt`, which is computed in pieces of `piece` tokens."""
    cache = DynamicCache()
    piece = piece or len(prompt)
    for start in range(0, len(prompt), piece):
        ids = torch.tensor([prompt[start : start + piece]])
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def test_greedy_text_varies_and_does_not_end(model, tokenizer, prompt) -> None:  # type: ignore[no-untyped-def]
    for length in (1, 50, 1500):
        tokens = greedy(model, prompt[:length], 40)
        assert len(set(tokens)) > 30
        assert not set(tokens) & set(tokenizer.all_special_ids)
        assert all("\ufffd" not in tokenizer.decode([t]) for t in tokens)


def test_greedy_tokens_depend_on_every_token_not_on_the_pieces(model, prompt) -> None:  # type: ignore[no-untyped-def]
    plain = greedy(model, prompt, 12)
    assert greedy(model, prompt, 12, piece=1100) == plain
    source = random.Random(3)
    changed = 0
    for _ in range(5):
        other = list(prompt)
        other[source.randrange(2000)] = source.randrange(300, VOCABULARY)
        changed += greedy(model, other, 12) != plain
    assert changed >= 4
