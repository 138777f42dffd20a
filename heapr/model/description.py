"""What describes a model in its folder, beside the weights: configuration, generation settings, tokenizer.

In: a folder. Out: transformers' configuration and tokenizer. Every mistake that can be seen in them is
refused here.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from heapr.errors import ConfigError
from heapr.model import deepseek_moe
from heapr.model.model_files import INDEX, WEIGHTS
from heapr.model.ragged_type import register_ragged
from heapr.words import first_line

logger = logging.getLogger(__name__)

TOKENIZER_FILES = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template.*",
    "additional_chat_templates/*", "tokenization_*.py",
]  # fmt: skip
CONFIG_FILE, GENERATION_FILE, ADAPTER_FILE = "config.json", "generation_config.json", "adapter_config.json"
# What transformers raises over a config.json with values that cannot be
UNUSABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ZeroDivisionError,
    RuntimeError,
    StrictDataclassError,
)


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of a model whose weights are whole and the folder's own.

    Raises:
        ConfigError: there is none, or it describes something else.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise ConfigError(
            f"folder '{folder}' holds an adapter ({ADAPTER_FILE}), which is put on a model or not, depending"
            " on what is installed; merge it into the model's weights and give the result, or remove its"
            " files"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"folder '{folder}' has no config.json, so it is not a Hugging Face model; give one that has"
        )
    deepseek_moe.register()
    try:
        register_ragged(folder)
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except ConfigError:
        raise
    except UNUSABLE as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ConfigError(
                f"the model in '{folder}' needs the Python code beside its weights, which is not run unasked;"
                " read it, and if you trust it, give model.trust_remote_code=true"
            ) from error
        raise ConfigError(f"config.json in '{folder}' cannot be used: {first_line(error)}") from error
    _check_fields(config, folder, trust_remote_code)
    _check_generation(folder)
    return config


def _check_fields(config: PretrainedConfig, folder: Path, trust_remote_code: bool) -> None:
    """Fields that make other weights or other code than the folder's, or that no gradient goes through.

    Raises:
        ConfigError: there is one.
    """
    parts = (getattr(part, "quantization_config", None) for part in (config, config.get_text_config()))
    quantization = next((part for part in parts if part is not None), None)
    if quantization is not None and not quantization:
        raise ConfigError(
            f"config.json in '{folder}' has a quantization_config that says nothing; remove this field"
        )
    if quantization is not None:
        method = (
            quantization.get("quant_method", "unknown")
            if isinstance(quantization, dict)
            else type(quantization).__name__
        )
        raise ConfigError(
            f"the weights in '{folder}' are quantised ({method}), and gradients need them whole; give a"
            " bfloat16 or float32 copy"
        )
    if getattr(config, "transformers_weights", None):
        raise ConfigError(
            f"config.json in '{folder}' names its weights in `transformers_weights`, which other tools do not"
            f" read; name that file {WEIGHTS} or {INDEX} and remove this field"
        )
    elsewhere = [name for name in (getattr(config, "auto_map", None) or {}).values() if "--" in str(name)]
    if trust_remote_code and elsewhere:
        raise ConfigError(
            f"config.json in '{folder}' takes its Python code from elsewhere ({elsewhere[0]}), where it may"
            " change; copy the code beside the weights and name it in auto_map without what stands before"
            " `--`"
        )


def _check_generation(folder: Path) -> None:
    """transformers reads the generation settings with the weights, and refuses some only then.

    Raises:
        ConfigError: it refuses them.
    """
    if not (folder / GENERATION_FILE).is_file():
        return
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except UNUSABLE as error:
        raise ConfigError(
            f"{GENERATION_FILE} in '{folder}' cannot be used: {first_line(error)}; correct or remove it"
        ) from error


def read_tokenizer(
    folder: Path, config: PretrainedConfig, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer; transformers answers a missing one with an empty one, which is refused here."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"the tokenizer in '{folder}' cannot be used: {first_line(error)}") from error
    if max(tokenizer.get_vocab().values(), default=0) <= 1:
        raise ConfigError(
            f"folder '{folder}' has no tokenizer; put the model's own tokenizer files (tokenizer.json ...)"
            " there"
        )
    _leave_out_tokens_without_embedding(tokenizer, folder, config.get_text_config().vocab_size)
    return tokenizer


def copy_tokenizer(original: Path, folder: Path) -> None:
    """The tokenizer's files as they are: what transformers writes of a tokenizer in memory, other versions
    and other tools do not read."""
    for path in sorted({path for pattern in TOKENIZER_FILES for path in original.glob(pattern)}):
        copy = folder / path.relative_to(original)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _leave_out_tokens_without_embedding(
    tokenizer: PreTrainedTokenizerBase, folder: Path, num_embeddings: int
) -> None:
    """Added tokens whose ids are past the model's embeddings, such as one for padding: the tokenizer forgets
    them, so that a text in which they stand is read as ordinary text. Nothing else may be past the
    embeddings.

    Raises:
        ConfigError: ordinary tokens are, or one that the tokenizer puts around every text.
    """
    past = {token: number for token, number in tokenizer.get_vocab().items() if number >= num_embeddings}
    if not past:
        return
    first = min(past, key=past.__getitem__)
    what = f"'{first}' with id {past[first]}" + (f" and {len(past) - 1} more" if len(past) > 1 else "")
    what = f"the tokenizer in '{folder}' has tokens past the model's {num_embeddings} embeddings: {what}"
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not past.keys() <= added or backend is None:
        raise ConfigError(f"{what}; use the model's own tokenizer")
    if max(tokenizer("").input_ids, default=0) >= num_embeddings:
        raise ConfigError(
            f"{what}, which it puts around every text; use the model's own tokenizer, or one without this"
            " token"
        )
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < num_embeddings]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    for role, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str) and token in past:
            setattr(tokenizer, role, None)
    logger.info(
        "%-9s %s; they are added ones and not used: in a text they are read as ordinary text", "model", what
    )
