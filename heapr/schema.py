"""The typed configuration: every field with its meaning, unit and range.

In: the configuration that Hydra composed from conf/. Out: a checked `ExperimentConfig`, whose `_target_`
entries are built elsewhere (heapr/plugins.py). No torch here, so that a mistyped command line is answered at
once. Bounds of numbers and names: heapr/limits.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from heapr.errors import ConfigError
from heapr.files import user_path
from heapr.limits import at_least, check_limits, check_sections
from heapr.targets import check_targets
from heapr.unknown_keys import check_keys


@dataclass
class ModelConfig:
    """Which model is pruned."""

    name: str = MISSING  # short name, for tables
    path: str = MISSING  # "builtin:<name>", a local Hugging Face folder, or a hub id "owner/name"
    revision: str | None = None  # branch, tag or commit of a hub id; null is the hub's default
    dtype: str = MISSING  # float32, bfloat16 or float16
    trust_remote_code: bool = False  # whether Python files beside the weights may be executed


@dataclass
class CalibrationConfig:
    """Which tokens the statistics are collected on."""

    corpus: dict[str, Any] = MISSING  # plug-in: heapr/text/corpora.py
    num_samples: int = MISSING  # sequences, at least 1
    sequence_length: int = MISSING  # tokens per sequence, at least 2, at most the model's limit
    seed: int = MISSING  # chooses the sequences, at least 0
    batch_size: int = MISSING  # sequences per pass, at least 1; affects memory, speed and the last digits
    # From a longer corpus, documents are drawn at random with the seed. At least 1; null uses all.
    max_characters: int | None = 20_000_000


@dataclass
class PruningConfig:
    """How much is removed, and what is ranked together."""

    ratio: float = MISSING  # share to remove of the routed atomic experts, or of `budget`, in [0, 1)
    scope: str = MISSING  # what is ranked together: global, layer or expert
    rounds: int = 1  # number of equal rounds, each with statistics of its own; at least 1
    # Plug-in (heapr/pruning/repair.py) that refits the kept weights; null leaves them unchanged.
    repair: dict[str, Any] | None = None
    # Every expert keeps a multiple of this many atomic experts, 1 or a multiple of 8. null is 8 for uniform
    # and per_layer, else 1.
    width_multiple: int | None = None
    # Form of the checkpoint: ragged (exact widths), uniform (one width), per_layer (one width in each layer;
    # both with scope expert), fewer_experts (whole experts, gone from the router too) or masked (zeros).
    form: str = "ragged"
    save_checkpoint: bool = True  # false keeps only the plan, which re-creates the pruned model in memory
    # Hub id "owner/name" to which the checkpoint is uploaded with its card; null uploads nothing.
    push_to: str | None = None
    push_public: bool = False  # whether everybody may see it there
    # What the ratio is a share of: atomic_experts, or the flops of the routed experts.
    budget: str = "atomic_experts"
    # Indices of decoder layers that lose nothing.
    protected_layers: list[int] = field(default_factory=list)
    # true: super experts, whose outputs are far larger than all others', lose nothing.
    protect_super_experts: bool = False


@dataclass
class TrackingConfig:
    """Where metrics are sent, besides the JSON-lines file of the run."""

    mode: str = MISSING  # auto (online if a key is found, else offline), online, offline, none
    project: str = MISSING  # wandb project
    upload: bool = False  # true uploads the files of artifacts to wandb; false logs only their paths


@dataclass
class RuntimeConfig:
    """Where and how things are computed; changes no result."""

    device: str = MISSING  # auto (a GPU if there is one), cpu, cuda, cuda:<number>
    # "auto", "balanced" or "sequential" spread the weights over several GPUs; null puts all on `device`.
    device_map: str | None = None
    num_threads: int | None = None  # CPU threads, at least 1; null leaves the number to torch
    # How long to wait for a free GPU, or for an artifact that another process is making; null has no limit.
    wait_minutes: float | None = None
    # Between two checkpoints of a calibration in memory, at least 0: what a crash costs at most.
    checkpoint_seconds: float = 60.0
    # true: large weights are read and hashed again, whatever the store remembers of them.
    full_check: bool = False
    # true: one decoder layer at a time is read from the files; auto: if the weights do not fit on the device.
    stream: Any = "auto"
    activations: str = "auto"  # of a streamed model, between layers: ram, disk, or auto, which is disk
    # Of a streamed model, so many layers at its end are in memory together in calibration, at least 1: they
    # are read once and run once.
    last_layers: int = 1
    # true: activations inside a layer are computed again for the backward pass; auto: if they do not fit.
    gradient_checkpointing: Any = "auto"


@dataclass
class PathsConfig:
    """Where results go; changes no result."""

    outputs: str = MISSING  # the folder of artifacts/, runs/ and sweeps/


@dataclass
class PluginsConfig:
    """Which code besides heapr's own a `_target_` may name; changes no result."""

    allow: list[str] = field(default_factory=list)  # packages; only the command line may set it


@dataclass
class ExperimentConfig:
    """One experiment: calibrate -> score -> prune -> evaluate."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    score: dict[str, Any] = MISSING  # plug-in: heapr/score/
    pruning: PruningConfig = field(default_factory=PruningConfig)
    evaluation: dict[str, Any] = MISSING  # corpora, and one plug-in per measurement: heapr/evaluation/
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    dry_run: bool = False  # print what a run would do, from the model's config.json alone
    debug: bool = False  # print the stack trace of a mistake too
    # The metric that a run returns to a sweeper, such as kl_to_dense/pydocs; null returns nothing.
    objective: str | None = None


DTYPES = ("float32", "bfloat16", "float16")
SCOPES = ("global", "layer", "expert")
FORMS = ("ragged", "per_layer", "uniform", "fewer_experts", "masked")
ONE_WIDTH = {"uniform": "one width", "per_layer": "of a layer one width"}  # forms, and what they give experts
BUDGETS = ("atomic_experts", "flops")
KERNEL_MULTIPLE = 8  # transformers' default kernel for experts runs multiples of it in every dtype
AUTO = "auto"
ACTIVATIONS = (AUTO, "ram", "disk")
DEVICE_MAPS = ("auto", "balanced", "sequential")
TRACKING_MODES = ("auto", "online", "offline", "none")


def register() -> None:
    """Register the schema with Hydra under the name that conf/config.yaml refers to."""
    ConfigStore.instance().store(name="schema", node=ExperimentConfig)
    # conf/hydra/launcher/ gives the launchers' options other defaults; that Hydra checks them against the
    # launchers' own schema is welcome.
    warnings.filterwarnings("ignore", message="\\s*.hydra/launcher.*validated against ConfigStore schema")
    # heapr/hydra_folders.py refuses it.
    warnings.filterwarnings("ignore", message="provider=hydra.searchpath.* is not available")


def resolve(config: DictConfig) -> ExperimentConfig:
    """Convert a composed configuration to the typed one and check it.

    `pruning.width_multiple` gets its default, and ~ is expanded in `paths.outputs`.

    Raises:
        ConfigError: a key is unknown, or a value is missing, out of range, or contradicts another.
    """
    check_keys(config, ExperimentConfig)
    if OmegaConf.get_type(config) is not ExperimentConfig:  # a saved configuration, which has no types
        merged = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), config)
        assert isinstance(merged, DictConfig)
        config = merged
    check_sections(config, ExperimentConfig)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(
            f"no value for {', '.join(missing)}; give it on the command line, for example {missing[0]}=..."
        )
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, ExperimentConfig)
    if typed.pruning.width_multiple is None:
        typed.pruning.width_multiple = KERNEL_MULTIPLE if typed.pruning.form in ONE_WIDTH else 1
    # conf/config.yaml does the same for the folder that Hydra makes.
    typed.paths.outputs = str(user_path(typed.paths.outputs))
    check(typed)
    return typed


def check(config: ExperimentConfig) -> None:
    """Check ranges and choices.

    Raises:
        ConfigError: a value is not allowed; the message names the field, the value and what is allowed.
    """
    check_limits(asdict(config))
    check_targets(asdict(config), config.plugins.allow)
    _check_pruning(config.pruning)
    _check_runtime(config.runtime)
    _choice("model.dtype", config.model.dtype, DTYPES)
    _check_tracking(config.tracking)


def _check_runtime(runtime: RuntimeConfig) -> None:
    for name in ("stream", "gradient_checkpointing"):
        value = getattr(runtime, name)
        if type(value) is not bool and value != AUTO:
            raise ConfigError(f"runtime.{name}={value!r} is unknown; choose one of true, false, auto")
    _choice("runtime.activations", runtime.activations, ACTIVATIONS)
    if runtime.device_map is not None:
        _choice("runtime.device_map", runtime.device_map, DEVICE_MAPS)
    if runtime.wait_minutes is not None:
        at_least("runtime.wait_minutes", runtime.wait_minutes, 0)
    at_least("runtime.checkpoint_seconds", runtime.checkpoint_seconds, 0)
    at_least("runtime.last_layers", runtime.last_layers, 1)
    if runtime.stream is False and runtime.last_layers > 1:
        raise ConfigError(
            f"runtime.last_layers={runtime.last_layers} has no effect with runtime.stream=false; leave it out"
        )
    if runtime.stream is True and runtime.device_map is not None:
        raise ConfigError(
            f"runtime.stream=true has one layer on one device, and runtime.device_map={runtime.device_map}"
            " spreads all layers over several; give one of them"
        )
    if runtime.stream is True and runtime.gradient_checkpointing is True:
        raise ConfigError(
            "runtime.gradient_checkpointing=true has no effect with runtime.stream=true, which computes"
            " activations again in any case; leave it out"
        )
    if runtime.stream is False and runtime.activations != AUTO:
        raise ConfigError(
            f"runtime.activations={runtime.activations} has no effect with runtime.stream=false; leave it out"
        )


def _check_pruning(pruning: PruningConfig) -> None:
    if not (math.isfinite(pruning.ratio) and 0 <= pruning.ratio < 1):
        raise ConfigError(
            f"pruning.ratio={pruning.ratio} is not in [0, 1); give the share of atomic experts to remove, for"
            " example 0.25"
        )
    _choice("pruning.scope", pruning.scope, SCOPES)
    _choice("pruning.form", pruning.form, FORMS)
    if pruning.form in ONE_WIDTH and pruning.scope != "expert":
        raise ConfigError(
            f"pruning.form={pruning.form} gives every expert {ONE_WIDTH[pruning.form]}, which scope"
            f" '{pruning.scope}' does not; use pruning=expert"
        )
    if pruning.form == "fewer_experts":
        _check_fewer_experts(pruning)
    multiple = pruning.width_multiple
    if multiple is not None and multiple != 1 and (multiple < 1 or multiple % KERNEL_MULTIPLE):
        raise ConfigError(
            f"pruning.width_multiple={multiple} suits no kernel; give 1 or a multiple of {KERNEL_MULTIPLE}"
        )
    _choice("pruning.budget", pruning.budget, BUDGETS)
    if pruning.push_to is not None and not pruning.save_checkpoint:
        raise ConfigError(
            f"pruning.push_to={pruning.push_to} uploads the checkpoint, and pruning.save_checkpoint=false"
            " makes none; leave out one of them"
        )
    if pruning.push_public and pruning.push_to is None:
        raise ConfigError(
            "pruning.push_public=true without pruning.push_to=<owner/name> has no effect; add it"
        )
    if pruning.scope == "expert":
        _check_scope_expert(pruning)


def _check_fewer_experts(pruning: PruningConfig) -> None:
    if pruning.scope != "layer":
        raise ConfigError(
            f"pruning.form=fewer_experts leaves every layer the same number of experts, which scope"
            f" '{pruning.scope}' does not; use pruning=layer"
        )
    if pruning.rounds > 1:
        raise ConfigError("pruning.form=fewer_experts is made in one round; use pruning.rounds=1")
    if pruning.repair is not None:
        raise ConfigError(
            "pruning.form=fewer_experts sends tokens to other experts than those that a repair is measured"
            " with; use pruning/repair=none"
        )


def _check_scope_expert(pruning: PruningConfig) -> None:
    default = PruningConfig()
    for name in ("budget", "protected_layers", "protect_super_experts"):
        value = getattr(pruning, name)
        if value != getattr(default, name):
            raise ConfigError(
                f"pruning.{name}={value} has no effect with scope 'expert', where every expert loses the same"
                " share by itself; use pruning=global or leave it out"
            )


def _check_tracking(tracking: TrackingConfig) -> None:
    _choice("tracking.mode", tracking.mode, TRACKING_MODES)
    is_plain = set(tracking.project).isdisjoint("/\\#?%:")
    if not is_plain or not 1 <= len(tracking.project) <= 128:
        raise ConfigError(
            f"tracking.project='{tracking.project}' is not the name of a wandb project; give 1 to 128 letters"
            r" without / \ # ? % :"
        )
    if tracking.upload and tracking.mode == "none":
        raise ConfigError(
            "tracking.upload=true, but tracking=none sends nothing; use tracking=wandb or"
            " tracking.upload=false"
        )


def _choice(name: str, value: str | int, known: Collection[str | int]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown; choose one of {', '.join(map(str, known))}")
