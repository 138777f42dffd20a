"""The Python files beside a ragged checkpoint: with them it loads where heapr is not installed.

In: a family's configuration class. Out: what goes into `auto_map` of config.json, and the files.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from string import Template

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from heapr.model.auto_class import CAUSAL_LM, WRAPPER
from heapr.model.experts import grouped, layout, loop, packed, ragged, ragged_model, traced

RAGGED_PREFIX = "heapr_"  # of the model type
MODELLING_FILE = "modeling_heapr.py"
PORTABLE = (layout, loop, packed, grouped, traced, ragged, ragged_model)  # what it imports, and what these do
OLDEST_TRANSFORMERS = "5.16"  # that these files run with; pyproject.toml says what heapr itself needs
AUTO_CLASSES = {  # the name in `auto_map`, and where transformers notes a family's class for it
    "AutoModel": modeling_auto.MODEL_MAPPING,
    CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    WRAPPER: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}

HEAD = Template(
    '''"""$model_name whose experts have individual widths, pruned by heapr.

Needs torch and transformers alone, of transformers $oldest or a newer 5."""

import transformers

if [int(part) for part in transformers.__version__.split(".")[:2]] < [$oldest_numbers]:
    raise ImportError(
        f"this checkpoint needs transformers $oldest or newer, and {transformers.__version__} is installed; "
        "pip install --upgrade transformers"
    )

from transformers import AutoModel
from $config_module import $config_name
$imports
# transformers 4 copies the files that are named here and no others: with all of them it can say the above.
from .grouped import run_grouped  # noqa: F401
from .layout import layout_of  # noqa: F401
from .loop import run_experts  # noqa: F401
from .packed import Packed  # noqa: F401
from .ragged import make_ragged  # noqa: F401
from .ragged_model import RaggedModel, without_experts
from .traced import run_traced  # noqa: F401


class Heapr$config_name($config_name):
    model_type = "$model_type"
    base_model_tp_plan = without_experts($config_name.base_model_tp_plan)
    base_model_ep_plan = without_experts($config_name.base_model_ep_plan)
'''
)
CLASS = Template(
    """

class Heapr$name(RaggedModel, $name):
    config_class = Heapr$config_name
"""
)
TAIL = Template(
    """

# Classes with another head ask for the model without one by its configuration.
AutoModel.register(Heapr$config_name, Heapr$body_name)
"""
)


def family_classes(config_class: type[PretrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """A family's classes, by the auto class that serves them.

    Of a wrapper, those of the whole: it stands for the causal language model too, which is another family's.
    """
    found = {name: mapping[config_class] for name, mapping in AUTO_CLASSES.items() if config_class in mapping}
    own = {name: each for name, each in found.items() if each.config_class is config_class}
    if CAUSAL_LM not in own and WRAPPER in own:
        own[CAUSAL_LM] = own[WRAPPER]
    return own


def auto_map(config_class: type[PretrainedConfig]) -> dict[str, str]:
    """Where transformers finds the classes of a ragged checkpoint, for config.json; vLLM wants the
    configuration's first."""
    module = MODELLING_FILE.removesuffix(".py")
    classes = {"AutoConfig": config_class, **family_classes(config_class)}
    return {name: f"{module}.Heapr{each.__name__}" for name, each in classes.items()}


def write_modelling_files(config_class: type[PretrainedConfig], folder: Path) -> None:
    """Write the modelling file of a family, and what it imports beside torch and transformers."""
    classes = family_classes(config_class)
    names = {
        "config_name": config_class.__name__,
        "model_name": classes[CAUSAL_LM].__name__,
        "model_type": RAGGED_PREFIX + config_class.model_type,
        "oldest": OLDEST_TRANSFORMERS,
        "oldest_numbers": OLDEST_TRANSFORMERS.replace(".", ", "),
        "config_module": module_beside(config_class, folder),
    }
    imports, bodies = [], []
    for each in dict.fromkeys(classes.values()):
        imports.append(f"from {module_beside(each, folder)} import {each.__name__}\n")
        bodies.append(CLASS.substitute(names, name=each.__name__))
    text = [HEAD.substitute(names, imports="".join(imports)), *bodies]
    if "AutoModel" in classes:
        text.append(TAIL.substitute(names, body_name=classes["AutoModel"].__name__))
    (folder / MODELLING_FILE).write_text("".join(text))
    for module in PORTABLE:
        shutil.copy(inspect.getfile(module), folder)


def module_beside(family_class: type, folder: Path) -> str:
    """Module to import a class from: transformers' own, or a copy of ours that is put beside the weights."""
    if family_class.__module__.startswith("transformers."):
        return family_class.__module__
    path = Path(inspect.getfile(family_class))
    shutil.copy(path, folder)
    return f".{path.stem}"
