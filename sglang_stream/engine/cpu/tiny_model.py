"""A random Llama of 30 M parameters with its own tokenizer: the model of the demo and the tests.

It knows nothing, but is made so that its greedy tokens can tell right KV from wrong:

- attention is sharp (each query looks at a few keys, wherever they are), so one other token
  anywhere in a long prompt usually changes the greedy continuation, while float32 rounding (other
  chunk boundaries, other batches) stays some 1e-5 of the spread of the logits;
- the ends of a text and all pieces that are not printable text by themselves have a zero row in
  the output layer, so that a generation runs to `max_tokens` and each token shows at once.

The bytes written depend on the seed only: weights come from PCG64's raw integers (NumPy keeps that
sequence fixed) and are uniform, so no platform's `log` or `cos` takes part.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from sglang_stream.engine.cpu.corpus import paragraphs

VERSION = 2
"""Of the bytes written with one seed; part of the cache folder's name."""

VOCABULARY = 8192
CONTEXT = 32768
HIDDEN = 512
INTERMEDIATE = 4608
LAYERS = 3
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 64

# Standard deviations of the weights, as multiples of 1 / sqrt(inputs). Query and key make an
# attention logit of standard deviation 4; the output projection makes up for averaged values.
_SCALES = {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 4.0, "down_proj": 0.5}

_PARAGRAPHS = 6000
_BOS, _EOS, _TURN, _TURN_END = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def default_tiny_model() -> Path:
    """The model with seed 0 in the user's cache folder; built there (some 5 s) if not present.

    The folder is `sglang-stream/tiny-llama-<version>` under `$XDG_CACHE_HOME` or `~/.cache`. It
    appears complete or not at all, also when two processes build it at once.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-stream"
    target = root / f"tiny-llama-{VERSION}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        build_tiny_model(draft)
        draft.chmod(0o755)
        draft.rename(target)
    except OSError:
        # Another process may have put its folder there first; its bytes are the same.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def build_tiny_model(directory: Path, *, seed: int = 0) -> Path:
    """Write the model (bfloat16, 60 MB) and its tokenizer into `directory`; returns `directory`.

    The same seed gives the same bytes. A folder that is not there is made; files of these names
    are overwritten. Raises OSError where it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(seed)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())
    _write_json(directory / "config.json", _model_config(tokenizer))
    _write_json(directory / "generation_config.json", _generation_config(tokenizer))
    weights = dict(_weights(seed, _silent_ids(tokenizer)))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `VOCABULARY` tokens; it puts the BOS token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(text, special=True, normalized=False) for text in (_BOS, _EOS, _TURN, _TURN_END)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs(_PARAGRAPHS, seed), trainer)
    bos = tokenizer.token_to_id(_BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS}:1 $B:1", special_tokens=[(_BOS, bos)]
    )
    return tokenizer


def _silent_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that greedy decoding must not choose: special tokens and bytes that are no text."""
    special = {tokenizer.token_to_id(text) for text in (_BOS, _EOS, _TURN, _TURN_END)}
    texts = {i: tokenizer.decode([i]) for i in range(VOCABULARY) if i not in special}
    unprintable = {i for i, text in texts.items() if not (text.isprintable() or text.isspace())}
    halves = {i for i, text in texts.items() if "\N{REPLACEMENT CHARACTER}" in text}
    return sorted(special | unprintable | halves)


def _weights(seed: int, silent: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as in Hugging Face's Llama; matrices are [outputs, inputs]."""
    source = np.random.PCG64(seed)

    def uniform(outputs: int, inputs: int, deviation: float) -> torch.Tensor:
        raw = source.random_raw(outputs * inputs) >> np.uint64(40)
        centred = (raw.astype(np.float32) - np.float32(2**23)) * np.float32(2.0**-23)
        values = centred.reshape(outputs, inputs) * np.float32(3**0.5 * deviation)
        return torch.from_numpy(values).to(torch.bfloat16)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield "model.embed_tokens.weight", uniform(VOCABULARY, HIDDEN, 1.0)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", ones.clone()
        yield f"{prefix}.post_attention_layernorm.weight", ones.clone()
        for block, name, outputs, inputs in (
            ("self_attn", "q_proj", HEADS * HEAD_DIM, HIDDEN),
            ("self_attn", "k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn", "v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn", "o_proj", HIDDEN, HEADS * HEAD_DIM),
            ("mlp", "gate_proj", INTERMEDIATE, HIDDEN),
            ("mlp", "up_proj", INTERMEDIATE, HIDDEN),
            ("mlp", "down_proj", HIDDEN, INTERMEDIATE),
        ):
            deviation = _SCALES.get(name, 1.0) * inputs**-0.5
            yield f"{prefix}.{block}.{name}.weight", uniform(outputs, inputs, deviation)
    yield "model.norm.weight", ones.clone()
    head = uniform(VOCABULARY, HIDDEN, HIDDEN**-0.5)
    head[silent] = 0
    yield "lm_head.weight", head


def _model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **_token_ids(tokenizer),
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"do_sample": False, **_token_ids(tokenizer)}


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.token_to_id(_BOS),
        "eos_token_id": [tokenizer.token_to_id(_EOS), tokenizer.token_to_id(_TURN_END)],
        "pad_token_id": tokenizer.token_to_id(_EOS),
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "pad_token": _EOS,
        "additional_special_tokens": [_TURN, _TURN_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": _CHAT_TEMPLATE,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(default_tiny_model())
