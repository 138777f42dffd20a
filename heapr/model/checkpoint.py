"""Checkpoints of pruned models: Hugging Face folders that load with and without heapr.

In: a pruned model in memory, the original's folder, and what was done to it. Out: a folder. Ragged models get
their own model type, "heapr_<type>", and a modelling file beside the weights that imports torch and
transformers alone; all other forms use the family's own class.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from heapr.errors import ConfigError
from heapr.model.auto_class import CAUSAL_LM
from heapr.model.config_file import write_config
from heapr.model.description import GENERATION_FILE, copy_tokenizer
from heapr.model.experts.dispatch import exchanged
from heapr.model.model_files import write_index
from heapr.model.modelling_file import (
    RAGGED_PREFIX,
    auto_map,
    family_classes,
    module_beside,
    write_modelling_files,
)
from heapr.model.moe import MoEModel
from heapr.model.ragged_type import family_config_class, ragged_classes
from heapr.model.shard_writer import Carried, write_weights

REMOTE_MODULES = "transformers_modules."  # where transformers imports Python code beside weights from
MAX_SHARD_SIZE = "5GB"


def save_checkpoint(
    model: MoEModel,
    original: Path,
    folder: Path,
    *,
    about: Mapping[str, Any],
    carried: Sequence[str] = (),
) -> None:
    """Write a pruned model as a Hugging Face folder: sharded safetensors and the files that describe it.

    The files for the tokenizer and the generation settings are copied from the original (`copy_tokenizer`);
    the configuration is the original's plus what pruning changed.

    Args:
        model: in the form in which it is saved (`pruning.form`).
        original: folder with the configuration and the tokenizer of the model before pruning.
        folder: the new folder; it must not exist.
        about: what was done to the model; becomes `heapr` in config.json. JSON types only.
        carried: tensors in the original's files that the model does not have, prediction heads, to be copied.
    """
    folder.mkdir(parents=True)
    if model.is_ragged:
        _save_ragged(model, folder, about)
    else:
        _save_stock(model.model, folder, about)
    heads = Carried(original, carried)
    write_weights(model, folder, max_shard_size=MAX_SHARD_SIZE, by_family=not model.is_ragged, carried=heads)
    write_index(folder)
    if not type(model.model.config).__module__.startswith(REMOTE_MODULES):
        write_config(original, folder, keeps_heads=bool(carried))
    (folder / GENERATION_FILE).unlink(missing_ok=True)
    if (original / GENERATION_FILE).is_file():
        shutil.copyfile(original / GENERATION_FILE, folder / GENERATION_FILE)
    copy_tokenizer(original, folder)


def check_form(config: PretrainedConfig, form: str) -> None:
    """Check that a pruned model of this configuration can be saved in a form.

    Raises:
        ConfigError: it cannot.
    """
    if form in {"ragged", "per_layer"} and type(config).__module__.startswith(REMOTE_MODULES):
        raise ConfigError(
            f"pruning.form={form} builds on a class of transformers, but {type(config).__name__} comes from"
            " the Python code beside the weights; use pruning.form=masked, or pruning.save_checkpoint=false"
            " to save the plan alone"
        )


def _save_stock(model: PreTrainedModel, folder: Path, about: Mapping[str, Any]) -> None:
    """Save a model in the family's own class; the file of a class of heapr's is put beside the weights."""
    model.config.heapr = dict(about)
    own_module = type(model).__module__
    if not own_module.startswith(REMOTE_MODULES):
        # The original may name remote code that was not used.
        vars(model.config).pop("auto_map", None)
        if not own_module.startswith("transformers."):
            beside = module_beside(type(model), folder).removeprefix(".")
            classes = {"AutoConfig": type(model.config), **family_classes(type(model.config))}
            model.config.auto_map = {name: f"{beside}.{each.__name__}" for name, each in classes.items()}
    # Without the generation settings, which it refuses to save if some have no effect; they are copied.
    with exchanged([(model, "generation_config", GenerationConfig())]):
        model.save_pretrained(folder, state_dict={})  # all but the weights


def _save_ragged(model: MoEModel, folder: Path, about: Mapping[str, Any]) -> None:
    """Save a model in a class of its own, whose modelling file is written beside the weights."""
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
    classes = ragged_classes(config_class)  # type: ignore[arg-type]
    classes.config.from_dict(settings).save_pretrained(folder)
    write_modelling_files(config_class, folder)
