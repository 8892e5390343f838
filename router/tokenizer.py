"""The worker's tokenizer and sampling defaults, loaded here from the same files (the one place
that imports transformers)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from sglang_stream.errors import WorkerUnavailable
from sglang_stream.prompt import PromptAssembler

# What SGLang's chat server takes from a model's generation_config.json
# (sglang/srt/configs/model_config.py, get_default_sampling_params).
_MODEL_DEFAULTS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class ModelTexts:
    """What a model needs between texts and tokens. `defaults`: sampling defaults of its chats;
    `decode`: the text of token ids."""

    assembler: PromptAssembler
    defaults: Mapping[str, float]
    decode: Callable[[list[int]], str]


class FastTokenizer:
    """A tokenizer of `transformers` without what it does around the one of `tokenizers` that it
    has, and without the places of the tokens in the text: together two fifths of the time of a
    text of 200 tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self.apply_chat_template = tokenizer.apply_chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, the same as those of the tokenizer of `transformers`."""
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)


def load_model_texts(server: Mapping[str, Any]) -> ModelTexts:
    """Loads what the worker loaded; `server` is SGLang's `/server_info`. Takes seconds.

    Raises WorkerUnavailable if the files cannot be read here.
    """
    path = server["tokenizer_path"]
    trust = bool(server.get("trust_remote_code"))
    revision = server.get("revision")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust, revision=revision)
    except (OSError, ValueError) as e:
        raise WorkerUnavailable(
            f"the worker's tokenizer {path} cannot be loaded here ({e}): make the same files "
            "available to the router"
        ) from e
    template = server.get("chat_template")
    if template is not None:
        tokenizer.chat_template = _read_template(template)
    tokenizer.encode("")  # the first call sets up truncation and padding, which is not thread-safe
    defaults: dict[str, float] = {}
    if server.get("sampling_defaults", "model") == "model":
        defaults = _generation_defaults(server["model_path"], trust, revision)
    assembler = PromptAssembler(FastTokenizer(tokenizer) if tokenizer.is_fast else tokenizer)
    return ModelTexts(assembler, defaults, tokenizer.decode)


def _read_template(template: str) -> str:
    if not template.endswith(".jinja"):
        raise WorkerUnavailable(
            f"the worker uses the chat template {template}: streams take the model's own or a "
            "file that ends in .jinja"
        )
    try:
        return Path(template).read_text().replace("\\n", "\n")
    except OSError as e:
        raise WorkerUnavailable(f"the worker's chat template cannot be read here: {e}") from e


def _generation_defaults(path: str, trust: bool, revision: str | None) -> dict[str, float]:
    try:
        config = GenerationConfig.from_pretrained(
            path, trust_remote_code=trust, revision=revision
        ).to_dict()
    except OSError:
        return {}  # most models have none
    return {name: config[name] for name in _MODEL_DEFAULTS if config.get(name) is not None}
