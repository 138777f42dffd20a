"""Which families of the installed transformers are supported, and why the others are not: docs/models.md.

Run:  python -m tests.model.support      writes docs/models.md
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from heapr.errors import ConfigError
from heapr.model.check_walk import check_walk
from heapr.model.experts.dispatch import CAPABILITIES
from heapr.model.experts.layout import layout_of
from heapr.model.moe import MoEModel
from heapr.model.stream import check_stream
from heapr.pruning.uniform import uniform_settings
from tests.tiny import FAMILIES, SHARED_INSIDE, deep_model, tiny_model
from tests.wrappers import WRAPPERS, tiny_wrapper

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
MODELS = Path(transformers.__file__).parent / "models"
DECORATOR = re.compile(r"^@use_experts_implementation(\([^)]*\))?\nclass ", re.MULTILINE)
# Wrappers by the folder of their text decoder; and the other way round where that has no model of its own.
WRAPPED = {model_type: model_type for model_type in WRAPPERS} | {
    "inkling_mm_model": "inkling", "mistral3": "mistral4", "qwen3_omni_moe_thinker": "qwen3_omni_moe",
}  # fmt: skip
FOLDERS = {folder: model_type for model_type, folder in WRAPPED.items() if folder not in FAMILIES} | {
    "mistral4": "mistral4"
}
HEADER = f"""# Models
Every family of transformers {transformers.__version__} whose experts go through its experts interface (`use_experts_implementation`),
Llama-4, and DeepSeekMoE, which heapr brings itself. Supported means: tests/model/test_families.py runs its whole contract on a tiny
model of the family (a shorter one, tests/model/test_wrappers.py, if the family exists inside a wrapper only): capturing leaves logits unchanged, the heapr score equals a slow oracle, pruned equals masked, all forms of
checkpoint load with bit-equal logits (`ragged` where heapr is not installed), generation with the cache equals generation without, a
training step. `uniform` is the checkpoint form for stock classes: where shared experts take their width from the same field, their
number is raised so that their width stays; a width that does not divide it is refused. `stream`: whether `pruning/repair=stream`,
which `recipe=best` uses, can serve it; that depends on how the experts' output gets into the residual stream, here with the family's
defaults, and every model is asked when it is loaded. `pruning.repair.target=layer_output` serves all. `layer by layer`: whether decoder
layers can be run one by one, which every repair does; asked of a model that has each kind of layer, block and sharing at least twice, and
of every model when it is loaded for repair. Calibration without repair needs it only if the model is streamed ([scale.md](scale.md)).

A wrapper with vision and the like is pruned as a whole: its text decoder is cut, everything else is carried over unchanged, and the
checkpoint is a wrapper again (`AutoModelForImageTextToText`; tests/model/test_wrappers.py, for all that are named here). If the files
hold the language model alone, it is loaded by itself.

Quantised weights (fp8 in blocks, MXFP4, compressed-tensors with its package) are dequantised as they are loaded, in memory and streamed, and
the checkpoint is written whole. What else transformers quantises is refused, because transformers cannot dequantise it.

Heads that predict further tokens (`mtp.*`, DeepSeek's and GLM's last layer) are no part of any model here. They are copied into the checkpoint
where engines can use them: in the `masked` form, and in `uniform` and `fewer_experts` if they have no experts, whose shape would be the old
one. Otherwise, and of quantised weights, they are left out, and config.json gives their number as 0. A run says which before it starts.

Written by `python -m tests.model.support`.

| family | experts | supported | `uniform` | `stream` | layer by layer |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    family: str
    experts: str
    supported: str
    uniform: str = ""
    stream: str = ""
    walk: str = ""

    def __str__(self) -> str:
        return (
            f"| {self.family} | {self.experts} | {self.supported} | {self.uniform} | {self.stream} |"
            f" {self.walk} |\n"
        )


def families_of_transformers() -> dict[str, str]:
    """Folders whose modelling file uses the experts interface, and the decorator's arguments."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        if match := DECORATOR.search(path.read_text()):
            found[path.parent.name] = (match[1] or "").strip("()")
    return found


@functools.cache
def row_of(family: str, arguments: str = "") -> Row:
    if family in FAMILIES:
        return _supported(family, MoEModel(tiny_model(family)))
    if family in FOLDERS:
        return _supported(family, MoEModel(tiny_wrapper(FOLDERS[family])))
    for attribute, description in CAPABILITIES.items():
        if f"{attribute}=True" in arguments:
            return Row(family, arguments, f"no: {description}")
    causal = [model for model in _models_of(family) if model.__name__.endswith("ForCausalLM")]
    if not causal:
        largest = [model.__name__ for model in _models_of(family) if "For" in model.__name__]
        return Row(
            family,
            arguments,
            "no: transformers has no causal language model of it, only"
            f" {', '.join(largest[:2]) or 'a bare model'}",
        )
    if causal[0] not in MODEL_FOR_CAUSAL_LM_MAPPING.values():
        return Row(
            family,
            arguments,
            f"no: transformers does not load {causal[0].__name__} as a causal language model",
        )
    return Row(family, arguments, "not known: no tiny model of it is tested")


def table() -> str:
    families = families_of_transformers()
    rows = [row_of(family, families.get(family, "")) for family in sorted({*families, *FAMILIES})]
    served = sum(row.family in families and row.supported.startswith("yes") for row in rows)
    count = f"{served} of these {len(families)} families of transformers are supported.\n\n"
    return HEADER.replace("| family | experts", f"{count}| family | experts") + "".join(map(str, rows))


def _supported(family: str, model: MoEModel) -> Row:
    layout = layout_of(model.layers[0].experts)
    experts = ["gate and up" if layout.has_gate else "no gate"]
    experts += (
        ["biases"] * layout.has_bias
        + ["transposed"] * layout.is_transposed
        + ["interleaved"] * (not layout.is_concatenated)
    )
    experts += ["router weight on the input"] * layout.weighs_input
    try:
        fields = uniform_settings(model.model.config, 4)
        uniform = " and ".join(f"`{name}`" for name in fields)
    except ConfigError:
        uniform = "refused"
    stream = _asked(partial(check_stream, model))
    walk = (
        _walk(family, {})
        if family in FAMILIES
        else _asked(partial(check_walk, model, needed_by="-", instead="-"))
    )
    if family in SHARED_INSIDE:
        options = " ".join(f"`{name}={value}`" for name, value in SHARED_INSIDE[family].items())
        walk += f"; with {options} {_walk(family, SHARED_INSIDE[family])}"
    return Row(family, ", ".join(experts), f"yes{_inside(family)}", uniform, stream, walk)


def _inside(family: str) -> str:
    """Which wrappers a family's text decoder is pruned in."""
    types = [model_type for model_type, folder in WRAPPED.items() if folder == family]
    names = [type(tiny_wrapper(model_type)).__name__ for model_type in types]
    inside = [name for name in names if not name.endswith("CausalLM")]
    beside = "; " if family in FAMILIES else ", "
    return f"{beside}inside `{'`, `'.join(inside)}`" if inside else ""


def _walk(family: str, changes: dict[str, object]) -> str:
    model = MoEModel(deep_model(family, **changes))
    return _asked(partial(check_walk, model, needed_by="-", instead="-"))


def _asked(check: Callable[[], None]) -> str:
    try:
        check()
    except ConfigError:
        return "refused"
    return "yes"


def _models_of(family: str) -> list[type[PreTrainedModel]]:
    models = []
    for path in sorted((MODELS / family).glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
        models += [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, PreTrainedModel)
        ]
    return [model for model in models if model.__module__.startswith(f"transformers.models.{family}.")]


if __name__ == "__main__":
    DOCUMENT.write_text(table())
