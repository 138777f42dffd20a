"""Bounds of the configuration's numbers and names, and the refusal of sections that are none.

In: a composed configuration, or its values. Out: nothing, or a refusal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from heapr.errors import ConfigError
from heapr.files import LONGEST_PART, is_name

LARGEST = 2**31 - 1  # of what is counted
LARGEST_SEED = 2**63 - 1  # Python's, numpy's and torch's generators take it
CHARACTERS_PER_TOKEN = 0.25  # at least: a character that a tokenizer does not know has at most four bytes
RANGES = {  # of whole numbers; null is allowed where the schema allows it
    "calibration.num_samples": (1, LARGEST),
    "calibration.sequence_length": (2, LARGEST),
    "calibration.batch_size": (1, LARGEST),
    "calibration.seed": (0, LARGEST_SEED),
    "calibration.max_characters": (1, 2**53),
    "pruning.rounds": (1, 100),
    "pruning.width_multiple": (1, LARGEST),
    "runtime.num_threads": (1, 1024),
}
NAMES = ("model.name",)
MAPPINGS = ("calibration.corpus", "score", "evaluation")


def check_sections(config: DictConfig, schema: type) -> None:
    """Check that every section is there, and is one: an override with ++ sets it to any value.

    Args:
        config: as composed.
        schema: dataclass of the whole configuration.

    Raises:
        ConfigError: a section is missing, null, or something else.
    """
    _check_section(config, schema, "")


def _check_section(config: Any, schema: type, where: str) -> None:
    if not isinstance(config, DictConfig) or config._is_none():
        raise ConfigError(f"{where}={_shown(config)} is no section; leave it out, or set one of its fields")
    hints = get_type_hints(schema)
    before = f"{where}." if where else ""
    for field in dataclasses.fields(schema):
        name, place = field.name, f"{before}{field.name}"
        if config._get_node(name) is None:
            raise ConfigError(f"{place} was taken out, and a run needs it; leave ~{place} out")
        if dataclasses.is_dataclass(hints[name]):
            _check_section(config._get_node(name), hints[name], place)
        elif place in MAPPINGS and not OmegaConf.is_missing(config, name):
            _check_mapping(config._get_node(name), place)


def _check_mapping(value: Any, where: str) -> None:
    """Check that a place for plug-ins holds keys and values."""
    if not isinstance(value, DictConfig) or value._is_none():
        option = where.replace(".", "/")
        raise ConfigError(f"{where}={_shown(value)} is no section; choose an option, {option}=<name>")


def _shown(value: Any) -> str:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return "null" if plain is None else str(plain)


def check_limits(config: Mapping[str, Any]) -> None:
    """Check numbers and names of a typed configuration.

    Raises:
        ConfigError: one is out of its range; the message names the field, the value and what is allowed.
    """
    for place, (smallest, largest) in RANGES.items():
        section, name = place.split(".")
        value = config[section][name]
        if value is None:
            continue
        at_least(place, value, smallest)
        if value > largest:
            raise ConfigError(f"{place}={value} is above {largest}; give at most {largest}")
    _check_sample(config["calibration"])
    if not config["model"]["path"].strip():
        raise ConfigError(
            "model.path is empty; give builtin:<name>, a folder with config.json and safetensors, or a hub id"
            " 'owner/name'"
        )
    for place in NAMES:
        section, name = place.split(".")
        check_name(place, config[section][name])
    layers = config["pruning"]["protected_layers"]
    if any(layer < 0 for layer in layers) or len(set(layers)) < len(layers):
        raise ConfigError(
            f"pruning.protected_layers={layers} are not different indices of layers; count from 0 and give"
            " each once"
        )


def _check_sample(calibration: Mapping[str, Any]) -> None:
    """Check that the calibration does not ask for more tokens than its text may have.

    Raises:
        ConfigError: it does.
    """
    most, asked = calibration["max_characters"], calibration["num_samples"] * calibration["sequence_length"]
    if most is not None and asked > most / CHARACTERS_PER_TOKEN:
        raise ConfigError(
            f"calibration.num_samples={calibration['num_samples']} sequences of"
            f" {calibration['sequence_length']} tokens are more than calibration.max_characters={most}"
            " of text can give; ask for fewer, or raise max_characters"
        )


def at_least(place: str, value: float, smallest: int) -> None:
    """Check a number.

    Raises:
        ConfigError: it is smaller, or not a finite number.
    """
    kind = "number" if isinstance(value, float) else "whole number"
    if not math.isfinite(value):
        raise ConfigError(f"{place}={value} is no finite number; give a {kind} of at least {smallest}")
    if value < smallest:
        raise ConfigError(f"{place}={value} is below {smallest}; give a {kind} of at least {smallest}")


def check_name(place: str, name: str) -> str:
    """Return a name that becomes a part of names of files and metrics.

    Raises:
        ConfigError: it is empty or too long, or would lead out of its folder.
    """
    if not is_name(name):
        raise ConfigError(
            f"{place}='{name[:LONGEST_PART]}' ({len(name)} letters) cannot be a part of a file's name; give 1"
            f" to {LONGEST_PART} letters without / and \\"
        )
    return name
