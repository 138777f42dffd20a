"""config.json of a pruned model: the original's fields under their original names, with pruning's changes.

In: the folder of the original, and the one that transformers wrote for the pruned model. Out: a config.json
in the latter that transformers 5 reads as the same configuration, and that older versions and other tools can
read too. transformers 5 itself writes names that those silently ignore, such as `rope_parameters` for
`rope_theta`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from heapr.files import write_json
from heapr.inputs import CONFIG_FILE
from heapr.model.description import read_config
from heapr.model.ragged_type import register_ragged

logger = logging.getLogger(__name__)

Fields = dict[str, Any]

AS_WRITTEN = ("architectures", "auto_map", "model_type")  # taken from the pruned model, or left out
DROPPED = ("quantization_config", "_name_or_path")
# Fields about heads that predict further tokens; no model here has them.
PREDICTION_HEADS = re.compile(r"(^|_)(mtp|nextn)(_|$)")
OLDER_NAMES = ("num_experts",)  # fields that transformers 5 renames in some families
NOT_COMPARED = {"transformers_version", "torch_dtype", "_name_or_path"}


def write_config(original: Path, folder: Path, *, keeps_heads: bool = False) -> None:
    """Replace the config.json that transformers wrote for a pruned model.

    If transformers 5 would read the new file differently, its own is kept and a warning names the fields.

    Args:
        original: folder of the model before pruning.
        folder: folder with the config.json of the pruned model.
        keeps_heads: whether the pruned model's files have the prediction heads; otherwise their number is 0.
    """
    dense = read_config(original, trust_remote_code=False)
    described: Fields = json.loads((original / CONFIG_FILE).read_text())
    register_ragged(folder)
    pruned = AutoConfig.from_pretrained(folder, local_files_only=True)
    written: Fields = json.loads((folder / CONFIG_FILE).read_text())
    # Of a wrapper, only the language model was pruned.
    if not isinstance(pruned, type(dense)) and dense.sub_configs:
        described = described[_language_model_field(dense)]
        dense = dense.get_text_config()
    after = _all_fields(pruned)
    fields = _with_changes(described, _all_fields(dense), after, dense.attribute_map)
    _take_as_written(fields, written)
    # All versions read `torch_dtype`, those since 4.56 read `dtype`.
    fields["torch_dtype"] = after["dtype"]
    if "dtype" in described:
        fields["dtype"] = after["dtype"]
    fields = _with_older_names(fields, dense.attribute_map)
    write_json(folder / CONFIG_FILE, fields if keeps_heads else _without_heads(fields))
    found = _all_fields(AutoConfig.from_pretrained(folder, local_files_only=True))
    differing = _differing_fields(found, after)
    if differing:
        logger.warning(
            "config.json keeps the field names of transformers 5, because with the original's names it reads"
            " %s differently",
            differing,
        )
        write_json(folder / CONFIG_FILE, written if keeps_heads else _without_heads(written))


def _take_as_written(fields: Fields, written: Fields) -> None:
    """Take the fields that are the pruned model's own from what transformers wrote, in place."""
    for name in (*AS_WRITTEN, *DROPPED):
        fields.pop(name, None)
    for name in AS_WRITTEN:
        if written.get(name):
            fields[name] = written[name]


def prediction_heads(config: PretrainedConfig) -> int:
    """The number of heads for further tokens that a configuration declares."""
    fields = config.get_text_config().to_dict()
    numbers = [0]
    for name, value in fields.items():
        if _is_number_of_heads(name, value):
            numbers.append(value)
    return max(numbers)


def _language_model_field(wrapper: PretrainedConfig) -> str:
    """Name of the field of a wrapper's configuration that holds its language model's configuration."""
    language_model = wrapper.get_text_config()
    names = (name for name in wrapper.sub_configs if getattr(wrapper, name) is language_model)
    return str(next(names))


def _with_changes(
    described: Mapping[str, Any], before: Fields, after: Fields, aliases: Mapping[str, str]
) -> Fields:
    """A description updated with every field that differs between `before` and `after`.

    A field is changed under every name that the description already uses for it.
    """
    fields = dict(described)
    for name, value in after.items():
        if name in NOT_COMPARED or (name in before and before[name] == value):
            continue
        old, own = before.get(name), fields.get(name)
        if isinstance(value, dict) and isinstance(old, dict) and isinstance(own, dict):
            fields[name] = _with_changes(own, old, value, {})
            continue
        names = [name]
        names += [alias for alias, actual in aliases.items() if actual == name]
        names_used = [known for known in names if known in described]
        for known in names_used or [name]:
            fields[known] = value
    return fields


def _with_older_names(fields: Fields, aliases: Mapping[str, str]) -> Fields:
    """The fields, and beside the names of transformers 5 those that older versions read."""
    older: Fields = {}
    for name in OLDER_NAMES:
        new_name = aliases.get(name)
        if new_name in fields:
            older[name] = fields[new_name]
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                older[name] = rope[name]
        scaling = {name: value for name, value in rope.items() if name not in older}
        if scaling.get("rope_type", "default") != "default":
            older["rope_scaling"] = scaling
    return older | fields


def _without_heads(fields: Fields) -> Fields:
    """The fields with every number of prediction heads set to 0, in nested configurations too."""
    changed = {}
    for name, value in fields.items():
        if _is_number_of_heads(name, value):
            changed[name] = type(value)(0)
        elif name.endswith("_config") and isinstance(value, dict):
            changed[name] = _without_heads(value)
    return fields | changed


def _is_number_of_heads(name: str, value: Any) -> bool:
    """Whether a field is a number of prediction heads or of their layers, or a flag that there are any."""
    if not PREDICTION_HEADS.search(name):
        return False
    if name == "use_mtp" and value is True:
        return True
    return type(value) is int and any(word in name for word in ("num", "layers", "modules"))


def _all_fields(config: PretrainedConfig) -> Fields:
    """All fields in JSON types, defaults included."""
    fields: Fields = json.loads(config.to_json_string(use_diff=False))
    return fields


def _differing_fields(found: Fields, expected: Fields) -> list[str]:
    """Names of the fields that differ; prediction heads may."""
    found, expected = _without_heads(found), _without_heads(expected)
    differing = []
    for name in sorted(found.keys() | expected.keys()):
        is_compared = name not in NOT_COMPARED and not PREDICTION_HEADS.search(name)
        if is_compared and found.get(name) != expected.get(name):
            differing.append(name)
    return differing
