"""Checkpoints of pruned models: Hugging Face folders that load with and without heapr.

In: a pruned model in memory, the folder that describes the original, what was done to it. Out: a folder.
Ragged models get a model type of their own, "heapr_<type>", with a modelling file beside the weights that
imports torch and transformers alone; uniform and masked ones are the family's own class.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Size, Tensor
from transformers import PretrainedConfig, PreTrainedModel

from heapr.errors import ConfigError
from heapr.model.config_file import write_config
from heapr.model.description import GENERATION_FILE, copy_tokenizer
from heapr.model.model_files import write_index
from heapr.model.modelling_file import (
    CAUSAL_LM,
    RAGGED_PREFIX,
    auto_map,
    family_classes,
    module_beside,
    write_modelling_files,
)
from heapr.model.moe import MoEModel
from heapr.model.ragged_type import family_config_class, ragged_classes

REMOTE_MODULES = "transformers_modules."  # where transformers puts Python code from beside weights
MAX_SHARD_SIZE = "5GB"


def save_checkpoint(model: MoEModel, original: Path, folder: Path, *, about: Mapping[str, Any]) -> None:
    """Write a pruned model as a Hugging Face folder: sharded safetensors, and what describes it. Tokenizer
    and generation settings are the original's files as they are; the configuration is the original's with
    what pruning changed.

    Args:
        model: ragged, uniform or masked.
        original: folder with the configuration and the tokenizer of the model that was pruned.
        folder: is made.
        about: what was done; becomes `heapr` in config.json. JSON types only.
    """
    folder.mkdir(parents=True)
    if model.is_ragged:
        _save_ragged(model, folder, about)
    else:
        _save_stock(model.model, folder, about)
    write_index(folder)
    if not type(model.model.config).__module__.startswith(REMOTE_MODULES):
        write_config(original, folder)
    (folder / GENERATION_FILE).unlink(missing_ok=True)
    if (original / GENERATION_FILE).is_file():
        shutil.copyfile(original / GENERATION_FILE, folder / GENERATION_FILE)
    copy_tokenizer(original, folder)


def check_form(config: PretrainedConfig, form: str) -> None:
    """Whether a pruned model of this configuration can be saved in a form.

    Raises:
        ConfigError: it cannot.
    """
    if form == "ragged" and type(config).__module__.startswith(REMOTE_MODULES):
        raise ConfigError(
            f"pruning.form=ragged builds on a class of transformers, but {type(config).__name__} comes from"
            " the Python code beside the weights; use pruning.form=masked, or pruning.save_checkpoint=false"
            " for the plan alone"
        )


def _save_stock(model: PreTrainedModel, folder: Path, about: Mapping[str, Any]) -> None:
    """In the family's own class; of a class of ours, with its file beside the weights."""
    model.config.heapr = dict(about)
    own = type(model).__module__
    # A name in config.json of remote code that was not used would mislead.
    if not own.startswith(REMOTE_MODULES):
        beside = (
            "" if own.startswith("transformers.") else module_beside(type(model), folder).removeprefix(".")
        )
        classes = {"AutoConfig": type(model.config).__name__, "AutoModelForCausalLM": type(model).__name__}
        vars(model.config).pop("auto_map", None)
        if beside:
            model.config.auto_map = {name: f"{beside}.{value}" for name, value in classes.items()}
    # Transformers copies weights to save them: not on a full GPU; tied ones stay one.
    on_cpu: dict[tuple[int, Size], Tensor] = {}
    state = {
        name: on_cpu.setdefault((tensor.data_ptr(), tensor.shape), tensor.cpu())
        for name, tensor in model.state_dict().items()
    }
    if not own.startswith("transformers."):
        # Other tools have a class of their own for such a family, and vLLM's does not tie.
        state |= {name: state[name].clone() for name in _tied(model)}
    model.save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_SIZE)


def _save_ragged(model: MoEModel, folder: Path, about: Mapping[str, Any]) -> None:
    source = model.model
    config_class = family_config_class(source.config)
    model_class = family_classes(config_class)[CAUSAL_LM]
    settings = source.config.to_dict() | {
        "model_type": RAGGED_PREFIX + config_class.model_type,
        "dtype": str(source.dtype).removeprefix("torch."),
        "architectures": [f"Heapr{model_class.__name__}"],
        "auto_map": auto_map(config_class),
        "expert_widths": {layer.name: layer.widths for layer in model.layers},
        "heapr": dict(about),
    }
    ragged_classes(config_class).config.from_dict(settings).save_pretrained(folder)
    write_modelling_files(config_class, folder)
    tied = _tied(source)
    # Left out here, because the writer would note them in the metadata, whose order is not reproducible.
    state = {name: tensor for name, tensor in source.state_dict().items() if name not in tied}
    huggingface_hub.save_torch_state_dict(state, folder, max_shard_size=MAX_SHARD_SIZE)


def _tied(model: PreTrainedModel) -> set[str]:
    """Names of weights that are another one's."""
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return set(model._tied_weights_keys or []) if is_tied else set()
