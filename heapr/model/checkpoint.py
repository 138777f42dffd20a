"""Checkpoints of pruned models: Hugging Face folders that load with and without heapr.

In: a pruned model in memory, the original's folder, and what was done to it. Out: a folder. Ragged models get
their own model type, "heapr_<type>", and a modelling file beside the weights that imports torch and
transformers alone; uniform and masked models use the family's own class.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from heapr.errors import ConfigError
from heapr.model.config_file import write_config
from heapr.model.description import GENERATION_FILE, copy_tokenizer
from heapr.model.experts import grouped, layout, loop, packed, ragged
from heapr.model.moe import MoEModel
from heapr.model.ragged_type import RAGGED_PREFIX, ragged_classes
from heapr.model.shard_writer import write_weights

REMOTE_MODULES = "transformers_modules."  # where transformers imports Python code beside weights from
MAX_SHARD_SIZE = "5GB"
MODELING_FILE = "modeling_heapr.py"
PORTABLE = (layout, loop, packed, grouped, ragged)  # copied beside it; transformers follows relative imports
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
    """Write a pruned model as a Hugging Face folder: sharded safetensors and the files that describe it.

    The files for the tokenizer and the generation settings are copied from the original; the configuration is
    the original's plus what pruning changed.

    Args:
        model: ragged, uniform or masked.
        original: folder with the configuration and the tokenizer of the model before pruning.
        folder: the new folder; it must not exist.
        about: what was done to the model; becomes `heapr` in config.json. JSON types only.
    """
    folder.mkdir(parents=True)
    if model.is_ragged:
        _save_ragged(model, folder, about)
    else:
        _save_stock(model.model, folder, about)
    write_weights(model, folder, max_shard_size=MAX_SHARD_SIZE, by_family=not model.is_ragged)
    if not type(model.model.config).__module__.startswith(REMOTE_MODULES):
        write_config(original, folder)
    (folder / GENERATION_FILE).unlink(missing_ok=True)
    if (original / GENERATION_FILE).is_file():
        shutil.copyfile(original / GENERATION_FILE, folder / GENERATION_FILE)
    copy_tokenizer(original, folder)


def check_form(config: PretrainedConfig, form: str) -> None:
    """Check that a pruned model of this configuration can be saved in a form.

    Raises:
        ConfigError: it cannot.
    """
    if form == "ragged" and type(config).__module__.startswith(REMOTE_MODULES):
        raise ConfigError(
            f"pruning.form=ragged builds on a class of transformers, but {type(config).__name__} comes from"
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
            beside = _beside(type(model), folder).removeprefix(".")
            model.config.auto_map = {
                "AutoConfig": f"{beside}.{type(model.config).__name__}",
                "AutoModelForCausalLM": f"{beside}.{type(model).__name__}",
            }
    model.save_pretrained(folder, state_dict={})  # all but the weights


def _save_ragged(model: MoEModel, folder: Path, about: Mapping[str, Any]) -> None:
    """Save a model in a class of its own, whose modelling file is written beside the weights."""
    source = model.model
    family = str(source.config.model_type).removeprefix(RAGGED_PREFIX)
    model_type = RAGGED_PREFIX + family
    config_class = CONFIG_MAPPING[family]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    config_name, model_name = config_class.__name__, model_class.__name__
    settings = source.config.to_dict() | {
        "model_type": model_type,
        "dtype": str(source.dtype).removeprefix("torch."),
        "architectures": [f"Heapr{model_name}"],
        "auto_map": {
            "AutoConfig": f"modeling_heapr.Heapr{config_name}",
            "AutoModelForCausalLM": f"modeling_heapr.Heapr{model_name}",
        },
        "expert_widths": {layer.name: layer.widths for layer in model.layers},
        "heapr": dict(about),
    }
    ragged_config, _ = ragged_classes(config_class)
    ragged_config.from_dict(settings).save_pretrained(folder)
    code = MODELING_TEMPLATE.substitute(
        config_name=config_name,
        config_module=_beside(config_class, folder),
        model_name=model_name,
        model_module=_beside(model_class, folder),
        model_type=model_type,
    )
    (folder / MODELING_FILE).write_text(code)
    for module in PORTABLE:
        shutil.copy(inspect.getfile(module), folder)


def _beside(family_class: type, folder: Path) -> str:
    """The module to import a class from: transformers' own, or a copy of heapr's file beside the weights."""
    if family_class.__module__.startswith("transformers."):
        return family_class.__module__
    path = Path(inspect.getfile(family_class))
    shutil.copy(path, folder)
    return f".{path.stem}"
