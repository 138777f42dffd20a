"""The model type of ragged checkpoints, "heapr_<type>": a family's classes with experts of individual widths.

In: a family's configuration class, or a folder. Out: two classes that transformers can load.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from heapr.errors import ConfigError
from heapr.model.experts.ragged import make_ragged

RAGGED_PREFIX = "heapr_"


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
    config_class, model_class = ragged_classes(CONFIG_MAPPING[family])
    AutoConfig.register(model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)


def ragged_classes(
    config_class: type[PretrainedConfig],
) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """The ragged configuration and model class, as the modelling file beside a checkpoint defines them."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    members = {"model_type": RAGGED_PREFIX + config_class.model_type}
    ragged_config = type(f"Heapr{config_class.__name__}", (config_class,), members)

    def initialise(self: PreTrainedModel, config: PretrainedConfig) -> None:
        model_class.__init__(self, config)
        make_ragged(self, config.expert_widths)

    model_members = {
        "config_class": ragged_config,
        "__init__": initialise,
        "__module__": model_class.__module__,
    }
    ragged_model = type(f"Heapr{model_class.__name__}", (model_class,), model_members)
    return ragged_config, ragged_model
