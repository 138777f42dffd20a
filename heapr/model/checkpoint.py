"""Checkpoints of pruned models: Hugging Face folders that load with and without heapr.

In: a pruned model in memory, the folder that describes the original, what was done to it. Out: a folder.
Ragged models get a model type of their own, "heapr_<type>", with a modelling file beside the weights that
imports torch and transformers alone; uniform and masked ones are the family's own class.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import huggingface_hub
from torch import Size, Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from heapr.errors import ConfigError
from heapr.model.config_file import write_config
from heapr.model.description import GENERATION_FILE, copy_tokenizer
from heapr.model.experts import layout, loop, ragged
from heapr.model.moe import MoEModel
from heapr.model.ragged_type import RAGGED_PREFIX, ragged_classes

REMOTE_MODULES = "transformers_modules."  # where transformers puts Python code from beside weights
MAX_SHARD_SIZE = "5GB"
MODELING_FILE = "modeling_heapr.py"
PORTABLE = (layout, loop, ragged)  # copied beside it; transformers follows relative imports from file to file
MODELING_TEMPLATE = Template(
    '''"""$model_name whose experts have individual widths, pruned by heapr.

Needs torch and transformers alone."""

from $config_module import $config_name
from $model_module import $model_name

from .ragged import make_ragged


class Heapr$config_name($config_name):
    model_type = "$model_type"


class Heapr$model_name($model_name):
    config_class = Heapr$config_name

    def __init__(self, config):
        super().__init__(config)
        make_ragged(self, config.expert_widths)
'''
)


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
        beside = "" if own.startswith("transformers.") else _beside(type(model), folder).removeprefix(".")
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
    model.save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_SIZE)


def _save_ragged(model: MoEModel, folder: Path, about: Mapping[str, Any]) -> None:
    source = model.model
    family = str(source.config.model_type).removeprefix(RAGGED_PREFIX)
    config_class = CONFIG_MAPPING[family]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    names = {"config_name": config_class.__name__, "model_name": model_class.__name__}
    settings = source.config.to_dict() | {
        "model_type": RAGGED_PREFIX + family,
        "dtype": str(source.dtype).removeprefix("torch."),
        "architectures": [f"Heapr{model_class.__name__}"],
        "auto_map": {
            "AutoConfig": f"modeling_heapr.Heapr{config_class.__name__}",
            "AutoModelForCausalLM": f"modeling_heapr.Heapr{model_class.__name__}",
        },
        "expert_widths": {layer.name: layer.widths for layer in model.layers},
        "heapr": dict(about),
    }
    ragged_config, _ = ragged_classes(config_class)
    ragged_config.from_dict(settings).save_pretrained(folder)
    modules = {"config_module": _beside(config_class, folder), "model_module": _beside(model_class, folder)}
    (folder / MODELING_FILE).write_text(
        MODELING_TEMPLATE.substitute(names, **modules, model_type=RAGGED_PREFIX + family)
    )
    for module in PORTABLE:
        shutil.copy(inspect.getfile(module), folder)
    is_tied = getattr(source.config.get_text_config(), "tie_word_embeddings", False)
    tied = set(source._tied_weights_keys or []) if is_tied else set()
    # Left out here, because the writer would note them in the metadata, whose order is not reproducible.
    state = {name: tensor for name, tensor in source.state_dict().items() if name not in tied}
    huggingface_hub.save_torch_state_dict(state, folder, max_shard_size=MAX_SHARD_SIZE)


def _beside(family_class: type, folder: Path) -> str:
    """Module to import a class from: transformers' own, or a copy of ours beside the weights."""
    if family_class.__module__.startswith("transformers."):
        return family_class.__module__
    path = Path(inspect.getfile(family_class))
    shutil.copy(path, folder)
    return f".{path.stem}"
