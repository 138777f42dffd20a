"""What an experiment is: its jobs, for the paper's models and for the built-in one, and what its report
shows.

In: experiments/<name>/experiment.yaml and the overrides of the command line. Out: jobs, each a list of Hydra
overrides.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from heapr.errors import ConfigError
from heapr.words import did_you_mean, unknown_key

FILE = "experiment.yaml"
TINY = "tiny"  # what the names of the built-in models begin with

Job = tuple[str, ...]  # Hydra overrides
# Hydra overrides of which some list several values, separated by commas: a grid of jobs.
Block = Sequence[str]


@dataclass(frozen=True)
class Definition:
    """An experiment.

    Attributes:
        name: of its folder.
        title, description: for people.
        jobs: blocks for the paper's models, run one after the other.
        tiny: blocks for the built-in model.
        baselines: further blocks for the paper's models, on request.
        report, tiny_report: tables and figures of the two versions (heapr/report/sweep/report_layout.py);
            none is the default.
    """

    name: str
    title: str
    description: str
    jobs: Sequence[Block]
    tiny: Sequence[Block]
    baselines: Sequence[Block] = ()
    report: Sequence[Mapping[str, Any]] = ()
    tiny_report: Sequence[Mapping[str, Any]] = ()

    def layout(self, version: str) -> Sequence[Mapping[str, Any]]:
        """Tables and figures of the "paper" or the "tiny" version."""
        return self.tiny_report if version == "tiny" else self.report


def experiment_names(experiments: Path) -> list[str]:
    return sorted(path.parent.name for path in experiments.glob(f"*/{FILE}"))


def load_definition(experiments: Path, name: str) -> Definition:
    """Read an experiment.

    Raises:
        ConfigError: there is none of this name, or its file is not one.
    """
    known = experiment_names(experiments)
    if name not in known:
        raise ConfigError(
            f"unknown experiment '{name}'; {did_you_mean(name, known)}known experiments: {', '.join(known)}"
        )
    content = OmegaConf.to_container(OmegaConf.load(experiments / name / FILE))
    assert isinstance(content, dict)
    fields = list(Definition.__dataclass_fields__)
    for key in content:
        if key not in fields:
            raise ConfigError(f"experiments/{name}/{FILE}: {unknown_key(str(key), fields)}")
    missing = [key for key in fields[:5] if not content.get(key)]
    if missing:
        raise ConfigError(f"experiments/{name}/{FILE} lacks {', '.join(missing)}")
    return Definition(**{str(key): value for key, value in content.items()})


def make_jobs(definition: Definition, overrides: Sequence[str], *, baselines: bool = False) -> list[Job]:
    """All jobs in their order, none twice.

    An override whose values all occur among the experiment's own selects their jobs (such as one model); any
    other replaces what the jobs say, and multiplies them if it lists several values.

    Args:
        definition: the experiment.
        overrides: of the command line; `model=tiny` is the experiment's version for the built-in model.
        baselines: whether to run them as well.

    Raises:
        HydraException: an override cannot be read.
    """
    blocks = (
        definition.tiny
        if is_tiny(overrides)
        else [*definition.jobs, *(definition.baselines if baselines else ())]
    )
    jobs = [job for block in blocks for job in grid(block)]
    for override in _parse(overrides):
        key, values = override.get_key_element(), _values(override)
        swept = {job[key] for job in jobs if key in job}
        if swept.issuperset(values):
            jobs = [job for job in jobs if job.get(key) in values]
        else:
            jobs = [job | {key: value} for job in jobs for value in values]
    if definition.jobs and not any("pruning.save_checkpoint" in job for job in jobs):
        jobs = [job | {"pruning.save_checkpoint": "false"} for job in jobs]  # tens of gigabytes each
    return list(dict.fromkeys(tuple(_text(key, value) for key, value in job.items()) for job in jobs))


def is_tiny(overrides: Sequence[str]) -> bool:
    """Whether built-in models alone are asked for."""
    chosen = [
        value
        for override in _parse(overrides)
        if override.get_key_element() == "model"
        for value in _values(override)
    ]
    return bool(chosen) and all(value.startswith(TINY) for value in chosen)


def grid(block: Block) -> list[dict[str, str]]:
    """Every combination of a block's values; the last override varies fastest."""
    choices = [
        [(override.get_key_element(), value) for value in _values(override)] for override in _parse(block)
    ]
    return [dict(combination) for combination in itertools.product(*choices)]


def _parse(overrides: Sequence[str]) -> list[Override]:
    parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    return parsed


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _text(key: str, value: str) -> str:
    return key if key.startswith("~") and not value else f"{key}={value}"
