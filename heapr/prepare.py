"""Builds an experiment's plug-ins, finds its model, and checks all that can be checked cheaply.

In: an experiment's configuration. Out: an `Experiment`, for a run, a dry run or a sweep. No weights are
loaded and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from heapr.artifacts import ARTIFACTS
from heapr.errors import ConfigError, NotHereError
from heapr.evaluation.build import build_measurements
from heapr.evaluation.measurement import Need
from heapr.experiment import Experiment, Plugins
from heapr.measure import machine
from heapr.model.checkpoint import check_form
from heapr.model.device import find_device
from heapr.model.find_model import find_model
from heapr.model.load import ModelSource
from heapr.model.model_shape import ModelShape
from heapr.objective import check_objective
from heapr.placement import choose_placement
from heapr.plugins import build
from heapr.pruning.budget import Budget
from heapr.pruning.fewer_experts import choose_num_experts
from heapr.pruning.layer_repair import Repair
from heapr.pruning.uniform import choose_uniform_width
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.schema import ExperimentConfig, ModelConfig, PruningConfig
from heapr.score.criterion import Criterion
from heapr.shared_folder import check_is_shared
from heapr.steps import Steps, experiment_steps
from heapr.store import Store
from heapr.text.corpora import Corpus
from heapr.text.mixture import Mixture
from heapr.types import Granularity

T = TypeVar("T")


def prepare(
    config: ExperimentConfig, notes: list[str] | None = None, ranks: Ranks = ONE_PROCESS
) -> Experiment:
    """Check an experiment, except for what takes the model's tokenizer or weights (heapr/ready.py).

    Args:
        config: checked by `heapr.schema.resolve`.
        notes: for a dry run: receives a line for each text or device that is not on this machine, and the
            experiment goes on without it; of a hub model only the configuration is downloaded. None, for a
            run, refuses what is not here.
        ranks: the processes that share the work, all of which call this.

    Raises:
        ConfigError: the experiment cannot be run; the message says why.
    """
    device = _or_note(notes, lambda: find_device(config.runtime.device)) or torch.device("cpu")
    device = _device_of_rank(device, ranks, config.runtime.device_map)
    with ranks.in_turn():
        plugins = build_plugins(config, notes)
    # Notes are of a dry run that lacks texts, and so does not know all metrics.
    if not notes:
        check_objective(config.objective, plugins.measurements)
    store = _open_store(config, device, ranks)
    with ranks.in_turn():
        digests = None if config.runtime.full_check else store.digests
        source = find_source(config.model, digests=digests, config_only=notes is not None)
    _check_lengths(config, source)
    budget = find_budget(config.pruning, source, plugins.criterion)
    if config.pruning.save_checkpoint:
        check_form(source.config, config.pruning.form)
    placement = choose_placement(config, source, device, ranks)
    if placement.is_streamed and budget.num_experts is not None:
        raise ConfigError(
            "pruning.form=fewer_experts needs the whole model in memory, where it does not fit; use a larger"
            " machine or pruning.form=ragged"
        )
    plugins, left_out = _without_timings(plugins) if placement.is_streamed else (plugins, [])
    if not notes:  # again, without what was left out
        check_objective(config.objective, plugins.measurements)
    steps = Steps()
    if plugins.text is not None:
        here = ranks.of_first(_machine(config, device))
        steps = experiment_steps(
            config, plugins.text, plugins.measurements, model=source.identity, machine=here
        )
    experiment = Experiment(
        config, plugins, source, device, budget, store, steps, placement=placement, left_out=left_out,
        ranks=ranks,
    )  # fmt: skip
    _ = experiment.stock_settings  # raises if the model cannot take the form
    return experiment


def _open_store(config: ExperimentConfig, device: torch.device, ranks: Ranks) -> Store:
    """The artifact store.

    Raises:
        ConfigError: its folder cannot be created, or is not the same one for all ranks.
    """
    allowed = {"packages": config.plugins.allow, "trust_remote_code": config.model.trust_remote_code}
    store = Store(
        Path(config.paths.outputs) / ARTIFACTS,
        device,
        ranks=ranks,
        wait_minutes=config.runtime.wait_minutes,
        full_check=config.runtime.full_check,
        record={"allowed_code": allowed},
    )
    check_is_shared(store.root, ranks)
    return store


def _without_timings(plugins: Plugins) -> tuple[Plugins, list[str]]:
    """Leave out measurements of the machine, which say nothing about a model that waits for the disk.

    Returns:
        the other plug-ins, and the names of what was left out.
    """
    kept = [measurement for measurement in plugins.measurements if Need.MACHINE not in measurement.needs]
    left_out = [measurement.name for measurement in plugins.measurements if measurement not in kept]
    return replace(plugins, measurements=kept), left_out


def build_plugins(config: ExperimentConfig, notes: list[str] | None = None) -> Plugins:
    """Build the objects that a configuration names.

    Args:
        config: checked by `heapr.schema.resolve`.
        notes: as in `prepare`.

    Raises:
        ConfigError: something cannot be built, or does not fit the rest.
    """
    is_dry_run = notes is not None
    corpus = config.calibration.corpus
    text = _or_note(notes, lambda: _build_text(corpus, "calibration.corpus", is_read=is_dry_run))
    criterion = _build_criterion(config)
    repair: Repair | None = None
    if config.pruning.repair is not None:
        repair = build(config.pruning.repair, "pruning.repair")
    evaluation = config.evaluation if notes is None else _what_is_here(config.evaluation, notes)
    return Plugins(text, criterion, repair, build_measurements(evaluation))


def find_source(model: ModelConfig, *, digests: Path | None = None, config_only: bool = False) -> ModelSource:
    """Find the model that is to be pruned.

    Raises:
        ConfigError: see `find_model`.
    """
    return find_model(
        model.path,
        dtype=model.dtype,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        digests=digests,
        config_only=config_only,
    )


def _device_of_rank(device: torch.device, ranks: Ranks, device_map: str | None) -> torch.device:
    """The device of one of several processes: each has a GPU of its own.

    Raises:
        ConfigError: two would have the same GPU, or one a GPU and another none.
    """
    if ranks.size == 1:
        return device
    if device_map is not None:
        raise ConfigError(
            f"runtime.device_map={device_map} spreads one model over all GPUs, and each of the {ranks.size}"
            " processes has a model of its own; start one process, or leave it out"
        )
    ranks.check_same("kind of device", {"device": device.type})
    if device.type == "cpu":
        return device
    if device.index is None:
        device = torch.device(device.type, ranks.local_rank % torch.cuda.device_count())
    gpus = ranks.gather(str(torch.cuda.get_device_properties(device).uuid))
    doubled = [rank for rank, gpu in enumerate(gpus) if gpu in gpus[:rank]]
    if doubled:
        raise ConfigError(
            f"rank {doubled[0]} would use the GPU of rank {gpus.index(gpus[doubled[0]])}; start as many"
            " processes as there are GPUs, with runtime.device=cuda"
        )
    return device


def _machine(config: ExperimentConfig, device: torch.device) -> dict[str, Any]:
    """What timings depend on, with the number of threads that the run will use."""
    here = machine(device)
    if config.runtime.num_threads is not None:
        here["threads"] = config.runtime.num_threads
    return here


def _build_criterion(config: ExperimentConfig) -> Criterion:
    criterion: Criterion = build(config.score, "score")
    check_criterion(criterion, config.pruning)
    return criterion


def check_criterion(criterion: Criterion, pruning: PruningConfig) -> None:
    """Refuse a criterion that does not fit what is ranked together.

    Raises:
        ConfigError: it does not.
    """
    if criterion.granularity is Granularity.EXPERT and pruning.scope == "expert":
        raise ConfigError(
            f"pruning.scope=expert ranks inside each expert, but score {type(criterion).__name__} removes"
            " whole experts; use pruning=global or pruning=layer"
        )


def _build_text(entry: Mapping[str, Any], where: str, *, is_read: bool) -> Corpus | Mixture:
    """Build a corpus or mixture; `is_read` also reads it, to find out whether it is on this machine."""
    text: Corpus | Mixture = build(entry, where)
    if is_read:
        text.identity()
    return text


def _what_is_here(evaluation: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The evaluation without the corpora whose text is not on this machine."""
    here = {}
    for name, entry in evaluation.get("corpora", {}).items():
        read = partial(_build_text, entry, f"evaluation.corpora.{name}", is_read=True)
        if _or_note(notes, read) is not None:
            here[name] = entry
    return {**evaluation, "corpora": here}


def _or_note(notes: list[str] | None, find: Callable[[], T]) -> T | None:
    """Call `find`; if what it finds is not on this machine, add a note and return None.

    Raises:
        NotHereError: `notes` is None, and it is not on this machine.
    """
    try:
        return find()
    except NotHereError as error:
        if notes is None:
            raise
        notes.append(str(error))
        return None


def find_budget(pruning: PruningConfig, shape: ModelShape, criterion: Criterion) -> Budget:
    """How much of the model is removed, and in which pieces.

    Raises:
        ConfigError: that is more than the model can lose.
    """
    if pruning.protect_super_experts and criterion.granularity is Granularity.EXPERT:
        raise ConfigError(
            "pruning.protect_super_experts is for criteria that remove atomic experts, but this one removes"
            " whole experts; choose another score or leave it out"
        )
    budget = Budget(
        ratio=pruning.ratio,
        scope=pruning.scope,
        experts_per_token=shape.experts_per_token,
        width_multiple=pruning.width_multiple or 1,
        granularity=criterion.granularity,
        unit=pruning.budget,
        protected_layers=tuple(pruning.protected_layers),
        one_width_per_layer=pruning.form == "per_layer",
    )
    if pruning.form == "uniform":
        width = choose_uniform_width(shape.config, shape.widths, budget, shape.dtype)
        budget = replace(budget, uniform_width=width)
    if pruning.form == "fewer_experts":
        budget = replace(budget, num_experts=_num_experts_left(budget, shape))
    budget.check(shape.widths)
    return budget


def _num_experts_left(budget: Budget, shape: ModelShape) -> int:
    """How many experts every layer keeps.

    Raises:
        ConfigError: the score removes atomic experts, or see `choose_num_experts`.
    """
    if budget.granularity is not Granularity.EXPERT:
        raise ConfigError(
            "pruning.form=fewer_experts is for scores of whole experts; use score=reap, frequency or"
            " heapr_expert"
        )
    return choose_num_experts(shape.widths, budget.ratio, budget.experts_per_token)


def _check_lengths(config: ExperimentConfig, source: ModelSource) -> None:
    """Check that no sequence is longer than the model accepts.

    Raises:
        ConfigError: one is longer.
    """
    lengths = {"calibration.sequence_length": config.calibration.sequence_length}
    for name, entry in config.evaluation.items():
        if isinstance(entry, Mapping) and "window" in entry:
            lengths[f"evaluation.{name}.window"] = entry["window"]
    limit = source.max_sequence_length
    for name, length in lengths.items():
        if limit is not None and length > limit:
            raise ConfigError(
                f"{name}={length} is above the {limit} tokens of model '{config.model.name}'; give at most"
                f" {limit}"
            )
