"""The files in a model's folder that describe it: configuration, generation settings, tokenizer.

In: a folder. Out: transformers' configuration and tokenizer. Every mistake that can be seen in them is
refused here.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from heapr.files import write_json
from heapr.inputs import ADAPTER_FILE, CONFIG_FILE, check_has_config
from heapr.model import deepseek_moe
from heapr.model.model_files import INDEX, NOT_JSON, WEIGHTS
from heapr.model.quantised import without_quantization
from heapr.model.ragged_type import register_ragged
from heapr.words import first_line

logger = logging.getLogger(__name__)

TOKENIZER_FILES = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template.*",
    "additional_chat_templates/*", "tokenization_*.py",
]  # fmt: skip
GENERATION_FILE = "generation_config.json"
JSON_TYPES = {"model_type": str, "architectures": list, "auto_map": dict, "quantization_config": dict}
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# Far more than any model has. With a billion, transformers would fill the memory before it could refuse.
LARGEST_COUNTS = {
    "num_hidden_layers": 2000, "num_experts": 65536, "num_local_experts": 65536, "n_routed_experts": 65536,
    "num_labels": 65536,
}  # fmt: skip
FILE_ENDINGS = (".json", ".safetensors", ".jinja", ".model", ".tiktoken", ".txt")
# What transformers 5 writes in it, and what it reads just the same.
NEWER_CLASS, OLDER_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
NEWER_TOKENS, OLDER_TOKENS = "extra_special_tokens", "additional_special_tokens"
# What transformers raises for a config.json with impossible values.
UNUSABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    ZeroDivisionError,
    RuntimeError,
    StrictDataclassError,
)


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of a model whose weights are in the folder itself, as it is without quantisation.

    Raises:
        ConfigError: there is no such configuration, or it cannot be used.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise ConfigError(
            f"folder '{folder}' holds an adapter ({ADAPTER_FILE}), which may or may not be applied, depending"
            " on what is installed; merge it into the model's weights and give the result, or remove its"
            " files"
        )
    check_has_config(folder)
    _check_are_files(folder)
    _check_json(folder)
    deepseek_moe.register()
    try:
        register_ragged(folder)
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except ConfigError:
        raise
    except (RecursionError, *UNUSABLE) as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ConfigError(
                f"the model in '{folder}' needs the Python code beside its weights, which is not run by"
                " default; read it, and if you trust it, give model.trust_remote_code=true"
            ) from error
        # The first line of this one names the field, and the others say what is wrong with it.
        lines = str(error).split() if isinstance(error, StrictDataclassError) else [first_line(error)]
        reason = " ".join(lines)
        raise ConfigError(f"config.json in '{folder}' cannot be used: {reason}") from error
    if not isinstance(config.get_text_config(), PretrainedConfig):
        raise ConfigError(
            f"config.json in '{folder}' has a text_config, which a {config.model_type} model does not have;"
            " take it out, or get the file again"
        )
    _check_fields(config, folder, trust_remote_code)
    _check_generation(folder)
    return without_quantization(config)


def _check_are_files(folder: Path) -> None:
    """Refuse a pipe, which would be waited for, and a device or a folder where a file should be.

    Raises:
        ConfigError: there is one.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in FILE_ENDINGS and not path.is_file():
            raise ConfigError(
                f"'{path}' should be a file with the model's settings, tokenizer or weights, and it is a"
                " folder, a pipe, or a link to nothing; get the model again"
            )


def _check_json(folder: Path) -> None:
    """Check what transformers takes for granted about the JSON of config.json.

    Raises:
        ConfigError: the file is no JSON object, or one of its fields is of another JSON type.
    """
    try:
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, *NOT_JSON) as error:
        raise ConfigError(
            f"{CONFIG_FILE} in '{folder}' cannot be used: {first_line(error)}; get it again"
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(
            f"{CONFIG_FILE} in '{folder}' cannot be used: it holds a {type(fields).__name__}, not an"
            " object; get it again"
        )
    for name, kind in JSON_TYPES.items():
        value = fields.get(name)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(
                f"{CONFIG_FILE} in '{folder}' has {name}={json.dumps(value):.40}, which is not a"
                f" {kind.__name__}; correct this field, or get the file again"
            )
    of_text = fields.get("text_config")
    for part in (fields, of_text if isinstance(of_text, dict) else {}):
        _check_counts(part, folder)


def _check_counts(fields: Mapping[str, Any], folder: Path) -> None:
    """Refuse counts in config.json that no model has.

    Raises:
        ConfigError: there is one.
    """
    for name, largest in LARGEST_COUNTS.items():
        value = fields.get(name)
        if isinstance(value, int | float) and value > largest:
            raise ConfigError(
                f"{CONFIG_FILE} in '{folder}' has {name}={value}, and heapr reads at most {largest};"
                " correct it, or get the file again"
            )


def _check_fields(config: PretrainedConfig, folder: Path, trust_remote_code: bool) -> None:
    """Refuse fields that point to weights or code outside the folder.

    Raises:
        ConfigError: there is such a field.
    """
    if getattr(config, "transformers_weights", None):
        raise ConfigError(
            f"config.json in '{folder}' names its weights in `transformers_weights`, which other tools do not"
            f" read; name that file {WEIGHTS} or {INDEX} and remove this field"
        )
    auto_map = getattr(config, "auto_map", None) or {}
    elsewhere = [name for name in auto_map.values() if "--" in str(name)]
    if trust_remote_code and elsewhere:
        raise ConfigError(
            f"config.json in '{folder}' takes its Python code from elsewhere ({elsewhere[0]}), where it may"
            " change; copy the code beside the weights and remove everything up to `--` from auto_map"
        )


def _check_generation(folder: Path) -> None:
    """Refuse generation settings that transformers would refuse only later, with the weights.

    Raises:
        ConfigError: transformers cannot use them.
    """
    if not (folder / GENERATION_FILE).is_file():
        return
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (RecursionError, *UNUSABLE) as error:
        raise ConfigError(
            f"{GENERATION_FILE} in '{folder}' cannot be used: {first_line(error)}; correct or remove it"
        ) from error


def read_tokenizer(
    folder: Path, config: PretrainedConfig, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        ConfigError: it cannot be used, belongs to another model, or is missing, in which case transformers
            returns an empty one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises Exception itself
        raise ConfigError(
            f"the tokenizer in '{folder}' cannot be used: {first_line(error)}; get its files again"
        ) from error
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise ConfigError(
            f"{TOKENIZER_CONFIG_FILE} in '{folder}' has model_max_length={longest!r}, and"
            " that is no number; correct it, or get the file again"
        )
    if max(tokenizer.get_vocab().values(), default=0) <= 1:
        raise ConfigError(
            f"folder '{folder}' has no tokenizer; put the model's own tokenizer files (tokenizer.json ...)"
            " there"
        )
    _leave_out_tokens_without_embedding(tokenizer, folder, config.get_text_config().vocab_size)
    return tokenizer


def copy_tokenizer(original: Path, folder: Path) -> None:
    """Copy the tokenizer's files, chat templates included.

    They stay as they are, but for names in tokenizer_config.json that transformers 5 alone reads.
    """
    paths = {path for pattern in TOKENIZER_FILES for path in original.glob(pattern)}
    for path in sorted(paths):
        copy = folder / path.relative_to(original)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    _write_older_names(folder / TOKENIZER_CONFIG_FILE)


def _write_older_names(path: Path) -> None:
    """Replace names that transformers 5 writes by those that all versions, llama.cpp and MLX read.

    Args:
        path: of a tokenizer_config.json; left as it is if it has no such name, or does not exist.
    """
    if not path.is_file():
        return
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    changed = dict(fields)
    if fields.get("tokenizer_class") == NEWER_CLASS:
        changed["tokenizer_class"] = OLDER_CLASS
    # A list; older versions read a mapping under this name.
    if isinstance(fields.get(NEWER_TOKENS), list):
        changed[OLDER_TOKENS] = changed.pop(NEWER_TOKENS)
    if changed != fields:
        write_json(path, changed)


def _leave_out_tokens_without_embedding(
    tokenizer: PreTrainedTokenizerBase, folder: Path, num_embeddings: int
) -> None:
    """Make the tokenizer forget added tokens, such as one for padding, past the model's embeddings.

    Where they occur in a text, they are then read as ordinary text.

    Raises:
        ConfigError: an ordinary token, or one that the tokenizer puts around every text, is past the
            embeddings.
    """
    past = {token: number for token, number in tokenizer.get_vocab().items() if number >= num_embeddings}
    if not past:
        return
    first = min(past, key=past.__getitem__)
    what = (
        f"the tokenizer in '{folder}' has tokens past the model's {num_embeddings} embeddings: '{first}' with"
        f" id {past[first]}"
    )
    if len(past) > 1:
        what += f" and {len(past) - 1} more"
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
        "%-9s %s; they are added tokens and not used: in a text they are read as ordinary text", "model", what
    )
