"""config.json of a pruned model: the original's own fields under the original's names, and what pruning
changed.

In: the folder of the original, and the one that transformers wrote for the pruned model. Out: a config.json
there that transformers 5 reads as the same configuration, and that older versions and other tools read too:
transformers 5 itself writes names that those ignore in silence, such as `rope_parameters` for `rope_theta`.
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
from heapr.model.description import CONFIG_FILE, read_config
from heapr.model.ragged_type import register_ragged

logger = logging.getLogger(__name__)

Fields = dict[str, Any]

AS_WRITTEN = ("architectures", "auto_map", "model_type")  # of the pruned model, or not there
# Fields about heads that predict further tokens; no model here has them.
PREDICTION_HEADS = re.compile(r"(^|_)(mtp|nextn)(_|$)")
OLDER_NAMES = ("num_experts",)  # which transformers 5 calls otherwise in some families
NOT_COMPARED = {"transformers_version", "torch_dtype", "_name_or_path"}


def write_config(original: Path, folder: Path) -> None:
    """Replace the config.json that transformers wrote.

    Args:
        original: folder of the model that was pruned.
        folder: has a config.json of the pruned model.
    """
    dense, described = (
        read_config(original, trust_remote_code=False),
        json.loads((original / CONFIG_FILE).read_text()),
    )
    register_ragged(folder)
    pruned = AutoConfig.from_pretrained(folder, local_files_only=True)
    written: Fields = json.loads((folder / CONFIG_FILE).read_text())
    # A wrapper, of which only the language model is left.
    if not isinstance(pruned, type(dense)) and dense.sub_configs:
        name = next(name for name in dense.sub_configs if getattr(dense, name) is dense.get_text_config())
        dense, described = dense.get_text_config(), described[name]
    before, after = _all_fields(dense), _all_fields(pruned)
    fields = _with_changes(described, before, after, dense.attribute_map)
    for name in AS_WRITTEN:
        fields.pop(name, None)
        fields |= {name: written[name]} if written.get(name) else {}
    for name in ("torch_dtype", "dtype"):  # the first is read by all versions, the second since 4.56
        if name == "torch_dtype" or name in described:
            fields[name] = after["dtype"]
    for name in ("quantization_config", "_name_or_path"):
        fields.pop(name, None)
    write_json(folder / CONFIG_FILE, _without_heads(_with_older_names(fields, dense.attribute_map)))
    found = _all_fields(AutoConfig.from_pretrained(folder, local_files_only=True))
    differing = sorted(
        name for name in found.keys() | after.keys() if _compared(found, name) != _compared(after, name)
    )
    if differing:
        logger.warning(
            "config.json is written as transformers 5 does, because in the original's words it reads %s"
            " otherwise",
            differing,
        )
        write_json(folder / CONFIG_FILE, _without_heads(written))


def prediction_heads(config: PretrainedConfig) -> int:
    """How many heads for further tokens a configuration promises."""
    numbers = [
        value
        for name, value in config.get_text_config().to_dict().items()
        if _is_number_of_heads(name, value)
    ]
    return max(numbers, default=0)


def _with_changes(
    described: Mapping[str, Any], before: Fields, after: Fields, aliases: Mapping[str, str]
) -> Fields:
    """A description with every field that is another after than before, under whatever name the description
    has for it."""
    fields = dict(described)
    for name, value in after.items():
        if name in NOT_COMPARED or (name in before and before[name] == value):
            continue
        if (
            isinstance(value, dict)
            and isinstance(before.get(name), dict)
            and isinstance(fields.get(name), dict)
        ):
            fields[name] = _with_changes(fields[name], before[name], value, {})
            continue
        names = [name, *(alias for alias, actual in aliases.items() if actual == name)]
        for known in [known for known in names if known in described] or [name]:
            fields[known] = value
    return fields


def _with_older_names(fields: Fields, aliases: Mapping[str, str]) -> Fields:
    """The same with names beside those of transformers 5 that older versions read."""
    older = {name: fields[aliases[name]] for name in OLDER_NAMES if aliases.get(name) in fields}
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        older |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        kind = {name: value for name, value in rope.items() if name not in older}
        older |= {"rope_scaling": kind} if kind.get("rope_type", "default") != "default" else {}
    return older | fields


def _without_heads(fields: Fields) -> Fields:
    """The same without a promise of prediction heads."""
    nested = {
        name: _without_heads(value)
        for name, value in fields.items()
        if name.endswith("_config") and isinstance(value, dict)
    }
    return (
        fields
        | nested
        | {name: type(value)(0) for name, value in fields.items() if _is_number_of_heads(name, value)}
    )


def _is_number_of_heads(name: str, value: Any) -> bool:
    """A number of heads or of their layers, or whether there are any."""
    is_number = type(value) is int and any(word in name for word in ("num", "layers", "modules"))
    return bool(PREDICTION_HEADS.search(name)) and (is_number or (value is True and name == "use_mtp"))


def _all_fields(config: PretrainedConfig) -> Fields:
    """In JSON types, defaults too."""
    fields: Fields = json.loads(config.to_json_string(use_diff=False))
    return fields


def _compared(fields: Fields, name: str) -> Any:
    """What has to be the same; prediction heads need not."""
    return None if name in NOT_COMPARED or PREDICTION_HEADS.search(name) else _without_heads(fields).get(name)
