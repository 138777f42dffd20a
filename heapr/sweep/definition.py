"""An experiment: its jobs, for the paper's models and for the built-in one, and what its report shows.

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

from heapr.composition import COMMAND_LINE_ONLY
from heapr.errors import ConfigError
from heapr.words import did_you_mean, unknown_key

FILE = "experiment.yaml"
TINY = "tiny"  # the beginning of the built-in models' names

Job = tuple[str, ...]  # Hydra overrides
# Hydra overrides that may list several values, separated by commas: a grid of jobs.
Block = Sequence[str]


@dataclass(frozen=True)
class Definition:
    """An experiment.

    Attributes:
        name: of its folder.
        title: one line.
        description: what it shows.
        jobs: blocks for the paper's models, run one after the other.
        tiny: blocks for the built-in model.
        baselines: further blocks for the paper's models, on request.
        report: tables and figures of the paper's version (heapr/report/sweep/report_layout.py); if empty, the
            default ones.
        tiny_report: as `report`, for the built-in model's version.
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
        """Return the tables and figures of the "paper" or the "tiny" version."""
        return self.tiny_report if version == "tiny" else self.report


def experiment_names(experiments: Path) -> list[str]:
    files = experiments.glob(f"*/{FILE}")
    return sorted(file.parent.name for file in files)


def load_definition(experiments: Path, name: str) -> Definition:
    """Read an experiment.

    Raises:
        ConfigError: there is no experiment of this name, or its file has unknown keys or lacks some.
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
    for name_of_field in COMMAND_LINE_ONLY:
        if name_of_field in str(content):
            raise ConfigError(
                f"experiments/{name}/{FILE} sets {name_of_field}, which lets code run; leave it out there"
                " and give it on the command line"
            )
    missing = [key for key in fields[:5] if not content.get(key)]
    if missing:
        raise ConfigError(f"experiments/{name}/{FILE} lacks {', '.join(missing)}")
    given = {str(key): value for key, value in content.items()}
    return Definition(**given)


def make_jobs(definition: Definition, overrides: Sequence[str], *, baselines: bool = False) -> list[Job]:
    """Return all jobs in order, without duplicates.

    An override whose values all occur in the experiment selects the jobs that have them, for example one
    model's. Any other override replaces the value in every job; with several values, every job runs with
    each of them.

    Args:
        definition: the experiment.
        overrides: of the command line; `model=tiny` is the experiment's version for the built-in model.
        baselines: whether to include the experiment's baselines.

    Raises:
        HydraException: an override cannot be read.
    """
    if is_tiny(overrides):
        blocks = list(definition.tiny)
    elif baselines:
        blocks = [*definition.jobs, *definition.baselines]
    else:
        blocks = list(definition.jobs)
    jobs = [job for block in blocks for job in grid(block)]
    for override in _parse(overrides):
        key = override.get_key_element()
        values = _values(override)
        swept = {job[key] for job in jobs if key in job}
        if swept.issuperset(values):
            jobs = [job for job in jobs if job.get(key) in values]
        else:
            jobs = [job | {key: value} for job in jobs for value in values]
    if definition.jobs and not any("pruning.save_checkpoint" in job for job in jobs):
        # A checkpoint of the paper's models takes tens of gigabytes.
        jobs = [job | {"pruning.save_checkpoint": "false"} for job in jobs]
    unique = dict.fromkeys(map(_overrides_of, jobs))
    return list(unique)


def is_tiny(overrides: Sequence[str]) -> bool:
    """Return whether the overrides ask for built-in models alone."""
    chosen: list[str] = []
    for override in _parse(overrides):
        if override.get_key_element() == "model":
            chosen += _values(override)
    return bool(chosen) and all(value.startswith(TINY) for value in chosen)


def grid(block: Block) -> list[dict[str, str]]:
    """Return every combination of a block's values; the last override varies fastest."""
    choices = []
    for override in _parse(block):
        key = override.get_key_element()
        choice = [(key, value) for value in _values(override)]
        choices.append(choice)
    return [dict(combination) for combination in itertools.product(*choices)]


def _parse(overrides: Sequence[str]) -> list[Override]:
    parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    return parsed


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _overrides_of(values: Mapping[str, str]) -> Job:
    """Return a job's values, by key, as overrides."""
    return tuple(_text(key, value) for key, value in values.items())


def _text(key: str, value: str) -> str:
    is_deletion = key.startswith("~") and not value
    return key if is_deletion else f"{key}={value}"
