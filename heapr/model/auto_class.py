"""Which of transformers' auto classes serves a model: a language model, or a wrapper around one.

In: a configuration. Out: an auto class. A wrapper, which also has a vision tower and the like, is loaded,
pruned and saved as a whole, unless its files say that they hold its language model alone.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

CAUSAL_LM, WRAPPER = "AutoModelForCausalLM", "AutoModelForImageTextToText"

ModelClass = type[PreTrainedModel]


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class for a configuration."""
    return getattr(transformers, auto_class_name(config))


def auto_class_name(config: PretrainedConfig) -> str:
    """Its name. What transformers does not know is left to `CAUSAL_LM`, which says so."""
    wrapper = wrapper_class(type(config))
    causal = causal_class(type(config))
    if wrapper is None:
        return CAUSAL_LM
    named = config.architectures or []
    if causal is not None and wrapper.__name__ not in named:
        is_own = causal.config_class is type(config)
        if causal.__name__ in named or is_own:
            return CAUSAL_LM
    return WRAPPER


def causal_class(config_class: type[PretrainedConfig]) -> ModelClass | None:
    """The causal language model of a configuration's class; of a wrapper's, the one inside of it."""
    return _class_in(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, config_class)


def wrapper_class(config_class: type[PretrainedConfig]) -> ModelClass | None:
    return _class_in(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config_class)


def _class_in(mapping: Any, config_class: type[PretrainedConfig]) -> ModelClass | None:
    if config_class not in mapping:
        return None
    found: ModelClass = mapping[config_class]
    return found
