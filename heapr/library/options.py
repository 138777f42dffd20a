"""The options of the library's functions: the same names, defaults and checks as on the command line.

In: keyword arguments. Out: the checked settings of calibration and pruning, from the YAML files of conf/.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, get_type_hints

from heapr.compose_experiment import compose_experiment
from heapr.definitions import conf_folder
from heapr.errors import ConfigError
from heapr.overrides import options_of
from heapr.plugins import build, check_value, describe
from heapr.prepare import check_criterion
from heapr.pruning.layer_repair import Repair
from heapr.schema import CalibrationConfig, PruningConfig
from heapr.score.criterion import Criterion
from heapr.words import did_you_mean, unknown_key

# Values that no option is named for: the text is given in memory, and nothing is tracked or kept.
COMMON = ("calibration=text_files", "calibration.corpus.paths=[]", "evaluation=none", "tracking=none")
GROUPS = {"recipe": "recipe", "score": "score", "repair": "pruning/repair", "scope": "pruning"}
NO_REPAIR = "none"  # its option


class SamplingOptions(TypedDict, total=False):
    """Which sequences are used.

    num_samples: sequences drawn from texts, 128 by default; of batches, how many are read, by default all.
    sequence_length: tokens of each sequence drawn from texts, 256 by default.
    seed: chooses them, 0 by default.
    batch_size: sequences per pass, 8 by default; of batches, by default theirs.
    """

    num_samples: int
    sequence_length: int
    seed: int
    batch_size: int


class PruningOptions(SamplingOptions, total=False):
    """What replaces a recipe's choices; heapr/schema.py documents the fields of `pruning` among them.

    score: name of an option of conf/score, or a `Criterion`.
    repair: name of an option of conf/pruning/repair, a `Repair`, or None.
    scope: what is ranked together: global, layer or expert.
    form: ragged, per_layer, uniform, fewer_experts or masked.
    evaluate_on: texts or batches on which perplexity is measured before and after.
    """

    score: str | Criterion
    repair: str | Repair | None
    scope: str
    form: str
    rounds: int
    width_multiple: int
    budget: str
    protected_layers: list[int]
    protect_super_experts: bool
    evaluate_on: Any


SAMPLING = tuple(get_type_hints(SamplingOptions))


@dataclass(frozen=True)
class Settings:
    """Checked settings.

    Attributes:
        calibration, pruning: as a run has them.
        criterion, repair: the plug-ins.
        score: how the criterion is configured, in JSON types.
        is_given: which options were given.
    """

    calibration: CalibrationConfig
    pruning: PruningConfig
    criterion: Criterion
    repair: Repair | None
    score: dict[str, Any]
    is_given: frozenset[str]


def read_options(options: Mapping[str, Any], known: type = PruningOptions) -> Settings:
    """Settings from keyword arguments.

    Args:
        options: `ratio`, `recipe` and those of `known`.
        known: `PruningOptions` or `SamplingOptions`.

    Raises:
        ConfigError: an option is unknown, has the wrong type, or does not fit the others.
    """
    hints = {"ratio": float, "recipe": str | None, **get_type_hints(known)}
    overrides = list(COMMON)
    plugins = {}
    for name, value in options.items():
        if name not in hints:
            raise ConfigError(unknown_key(name, hints))
        if name == "evaluate_on":
            continue
        if name in GROUPS:
            chosen = _choice(name, value)
            if chosen is None:
                plugins[name] = value
            else:
                overrides.append(chosen)
            continue
        if not isinstance(value, bool | int | float | str | list | None):
            raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; give {describe(hints[name])}")
        check_value(name, value, hints[name])
        group = "calibration" if name in SAMPLING else "pruning"
        overrides.append(f"{group}.{name}={json.dumps(value)}")
    config = compose_experiment(overrides, conf_folder())
    criterion: Criterion = plugins.get("score") or build(config.score, "score")
    repair: Repair | None = plugins.get("repair")
    if repair is None and config.pruning.repair is not None:
        repair = build(config.pruning.repair, "repair")
    check_criterion(criterion, config.pruning)
    score = config.score
    if "score" in plugins:
        score = {"_target_": _target_of(criterion)}
    if "repair" in plugins:
        config.pruning.repair = {"_target_": _target_of(repair)}
    return Settings(config.calibration, config.pruning, criterion, repair, score, frozenset(options))


def _choice(name: str, value: Any) -> str | None:
    """The override that chooses an option of a group; None if the value is a plug-in itself.

    Raises:
        ConfigError: there is no such option, or the value is neither.
    """
    group = GROUPS[name]
    if value is None and name == "recipe":
        return f"{group}=heapr"
    if value is None and name == "repair":
        return f"{group}={NO_REPAIR}"
    if not isinstance(value, str):
        if name in {"score", "repair"} and callable(value) and not isinstance(value, type):
            if name == "score" and not hasattr(value, "granularity"):
                raise ConfigError(
                    f"score={value!r} is no criterion: it does not say its granularity; see docs/adding.md"
                )
            return None
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; give the name of an option")
    known = options_of(group, [conf_folder()])
    if value not in known:
        raise ConfigError(
            f"{name}='{value}' is unknown; {did_you_mean(value, known)}known: {', '.join(known)}"
        )
    return f"{group}={value}"


def _target_of(plugin: Any) -> str:
    return f"{type(plugin).__module__}.{type(plugin).__qualname__}"
