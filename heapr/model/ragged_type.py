"""The model type of ragged checkpoints, "heapr_<type>": a family's classes with experts of individual widths.

In: a family's configuration class, or a folder. Out: two classes that transformers can load.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from heapr.errors import ConfigError
from heapr.model import deepseek_moe
from heapr.model.auto_class import CAUSAL_LM
from heapr.model.experts.ragged_model import RaggedModel, without_experts
from heapr.model.modelling_file import (
    RAGGED_PREFIX,
    auto_map,
    family_classes,
    write_modelling_files,
)

OWN_FIELDS = ("model_type", "base_model_tp_plan", "base_model_ep_plan")


class RaggedClasses(NamedTuple):
    """Of a family: its configuration, and its models by the auto class that serves them."""

    config: type[PretrainedConfig]
    models: Mapping[str, type[PreTrainedModel]]


class SavesModellingFile(RaggedModel):
    """What `save_pretrained` writes loads again, without heapr too."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As transformers does, with the modelling file beside."""
        config_class = family_config_class(self.config)
        self.config.auto_map = auto_map(config_class)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_modelling_files(config_class, Path(save_directory))


def register_ragged(folder: Path) -> None:
    """Register the model type of a ragged checkpoint with transformers; does nothing for other folders.

    Raises:
        ConfigError: the folder has no config.json, or its family is unknown.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"folder '{folder}' has no config.json, so it is not a checkpoint; give the folder that prune"
            " wrote"
        )
    fields, _ = PretrainedConfig.get_config_dict(folder, local_files_only=True)
    model_type = str(fields.get("model_type", ""))
    if not model_type.startswith(RAGGED_PREFIX) or model_type in CONFIG_MAPPING:
        return
    family = model_type.removeprefix(RAGGED_PREFIX)
    if family not in CONFIG_MAPPING:
        raise ConfigError(
            f"'{folder}' was pruned from a '{family}' model, which this transformers does not know; install a"
            " newer one"
        )
    classes = ragged_classes(CONFIG_MAPPING[family])
    AutoConfig.register(model_type, classes.config)
    for name, model_class in classes.models.items():
        getattr(transformers, name).register(classes.config, model_class)


@functools.cache
def ragged_classes(config_class: type[PretrainedConfig]) -> RaggedClasses:
    """The same classes as in the modelling file beside a checkpoint, one set for each family."""
    family = config_class.model_type
    members = {
        "model_type": RAGGED_PREFIX + family,
        "base_model_tp_plan": without_experts(config_class.base_model_tp_plan),
        "base_model_ep_plan": without_experts(config_class.base_model_ep_plan),
    }
    ragged_config = _named(family, (config_class,), members)
    models = {}
    for name, family_class in family_classes(config_class).items():
        models[name] = _named(family, (SavesModellingFile, family_class), {"config_class": ragged_config})
    return RaggedClasses(ragged_config, models)


def _named(family: str, bases: tuple[type, ...], members: Mapping[str, Any]) -> type:
    """A class that pickle finds by `__getattr__`."""
    name = f"Heapr{bases[-1].__name__}"
    place = {"__module__": __name__, "__qualname__": f"{family}__{name}"}
    return type(name, bases, {**members, **place, "_auto_class": None})


def __getattr__(name: str) -> type:
    """The classes by their `__qualname__`, "<family>__<class>", where pickle looks for them."""
    family, _, class_name = name.partition("__")
    if family and class_name:
        deepseek_moe.register()
        classes = ragged_classes(CONFIG_MAPPING[family])
        for each in (classes.config, *classes.models.values()):
            if each.__name__ == class_name:
                return each
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def family_config_class(config: PretrainedConfig) -> type[PretrainedConfig]:
    """Of a family's configuration or a ragged one of it: the family's class."""
    family: type[PretrainedConfig] = CONFIG_MAPPING[str(config.model_type).removeprefix(RAGGED_PREFIX)]
    return family


def take_ragged_type(model: PreTrainedModel, expert_widths: Mapping[str, Sequence[int]]) -> None:
    """Make a family's causal language model, whose experts have become ragged, one of the ragged type.

    In place; what it saves then loads again.

    Args:
        expert_widths: by the experts' names in the model.
    """
    classes = ragged_classes(family_config_class(model.config))  # type: ignore[arg-type]
    model.config.__class__ = classes.config
    for name in OWN_FIELDS:  # the configuration has values of its own
        setattr(model.config, name, getattr(classes.config, name))
    model.config.expert_widths = {name: list(widths) for name, widths in expert_widths.items()}
    model.__class__ = classes.models[CAUSAL_LM]
    # How the family's weights were read, which `save_pretrained` would undo.
    vars(model).pop("_weight_conversions", None)
