from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from router.tokenizer import load_model_texts
from sglang_stream.errors import WorkerUnavailable


@pytest.fixture
def server(tokenizer_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A server's description of itself, with a copy of the tokenizer for its model."""
    path = tmp_path / "model"
    shutil.copytree(tokenizer_dir, path)
    return {"tokenizer_path": str(path), "model_path": str(path)}


def test_the_sampling_defaults_of_a_model(server: dict[str, Any]) -> None:
    assert load_model_texts(server).defaults == {}
    config = {"temperature": 0.6, "top_p": 0.9, "max_length": 10, "do_sample": True}
    Path(server["model_path"], "generation_config.json").write_text(json.dumps(config))
    defaults = load_model_texts(server).defaults
    assert (defaults["temperature"], defaults["top_p"]) == (0.6, 0.9)
    assert defaults.keys() <= {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    assert load_model_texts({**server, "sampling_defaults": "openai"}).defaults == {}


def test_a_template_of_the_workers_own(server: dict[str, Any], tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}({{ m['content'] }}){% endfor %}")
    opening = load_model_texts({**server, "chat_template": str(template)}).assembler.open_chat(
        [{"role": "user", "content": "a"}], None
    )
    assert len(opening.tokens) == len("(a)(")
    assert opening.closing == ")"


def test_the_ids_are_those_of_transformers(server: dict[str, Any]) -> None:
    assembler = load_model_texts(server).assembler
    tokenizer = AutoTokenizer.from_pretrained(server["tokenizer_path"])
    for text in ("plain words", "a <s> in the text", " é\n\n日本 ", "x" * 5000):
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert assembler.chunk(text).tolist() == plain
        assert assembler.open_text(text).tokens.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokenizer_path": "/nowhere/at/all"},
        {"chat_template": "vicuna"},
        {"chat_template": "/nowhere.jinja"},
    ],
)
def test_files_that_are_not_there(server: dict[str, Any], wrong: dict[str, str]) -> None:
    with pytest.raises(WorkerUnavailable, match=next(iter(wrong.values()))):
        load_model_texts({**server, **wrong})
