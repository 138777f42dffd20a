"""Where the weights and activations of an experiment will be: all in memory, recomputed, or one layer at a
time from the files.

In: the configuration, a model and a device. Out: a `Placement`, with the numbers that led to it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heapr.errors import ConfigError
from heapr.model.check_walk import check_streamed, check_walk
from heapr.model.footprint import Footprint, batch_bytes, footprint, free_memory, loading_factor
from heapr.model.kernels import kernels_of
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.model.passes import Way
from heapr.model.shelf import Files, Memory
from heapr.origin import KEY_LENGTH, canonical_json
from heapr.ranks import Ranks
from heapr.schema import ExperimentConfig
from heapr.stage_memory import (
    CALIBRATE,
    CHECKPOINT,
    EVALUATE_DENSE,
    EVALUATE_PRUNED,
    MEMORY_STAGES,
    REPAIR,
    SURELY_BELOW,
    StageMemory,
)
from heapr.steps import Step
from heapr.types import LayerStatistics

AUTO, RAM = "auto", "ram"
TAPES, WALKS = ".tapes", ".walks"  # below the folder of results
MAX_MAPS = 60_000  # files that one process can have mapped on Linux, less some
GB = 1e9
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement(StageMemory):
    """Where things are, and what the stages need.

    Attributes:
        free: bytes free on the device.
        why: one line, or None if nothing is to be said.
    """

    free: int
    why: str | None

    def load(
        self, source: ModelSource, device: torch.device, folder: Path, *, device_map: str | None = None
    ) -> MoEModel:
        """Load the dense model, or open it for streaming.

        Args:
            source: the model.
            device: where it goes, or one layer of it at a time.
            folder: of results; remembers which models can be streamed, and holds what layers put out.
            device_map: see `ModelSource.load`.

        Raises:
            ConfigError: it cannot be loaded, or not be run layer by layer.
        """
        if self.is_streamed:
            tapes = folder / TAPES if self.on_disk else None
            model = source.stream(device, tapes=tapes, read_ahead=reads_ahead(device))
            content = canonical_json(source.identity).encode()
            name = hashlib.sha256(content).hexdigest()[:KEY_LENGTH]
            check_streamed(model, folder / WALKS / f"{name}.json")
            return model
        model = source.load(device, device_map)
        if self.by_layer:
            option = "runtime.gradient_checkpointing"
            check_walk(model, needed_by=option, instead=f"{option}=false", gradients=True)
        return model

    def way(self, model: MoEModel, files: Callable[[], Files]) -> Way | None:
        """How batches go through the model's layers in calibration; None means all the way at once.

        Args:
            model: from `load`, perhaps pruned since.
            files: opens files that outlive the process.
        """
        if self.is_streamed:
            shelf = files() if self.on_disk else Memory(CPU)
            first_of_last = len(model.spans) - self.num_last
            last = range(first_of_last, len(model.spans))
            return Way([*model.spans[:first_of_last], last], shelf)
        if self.by_layer:
            single_layers = [range(layer, layer + 1) for layer in range(len(model.decoder_layers))]
            return Way(single_layers, together=False)
        return None

    def check(self, device: torch.device, stages: Sequence[str] = MEMORY_STAGES) -> None:
        """Refuse what does not fit into memory.

        Args:
            device: where the model goes.
            stages: those of `MEMORY_STAGES` that will be run; the one that takes most memory counts.

        Raises:
            ConfigError: with what is needed and what is there.
        """
        if not self.is_streamed:
            if self.loading_bytes > self.free and device.type == "cpu":
                raise ConfigError(
                    f"loading the weights takes about {self.loading_bytes / GB:.3g} GB, {self.loading} times"
                    f" their size, and {self.free / GB:.3g} GB are free on '{device}'; give"
                    " runtime.stream=true, which reads one layer at a time"
                )
            return
        peaks = {stage: self.peak_bytes(stage) for stage in stages}
        largest = max(peaks, key=lambda stage: sum(peaks[stage].values()), default=None)
        needed = 0 if largest is None else sum(peaks[largest].values())
        if largest is not None and needed > self.free:
            parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in peaks[largest].items())
            raise ConfigError(
                f"runtime.stream: even one layer at a time takes about {needed / GB:.3g} GB to {largest}"
                f" ({parts}), and {self.free / GB:.3g} GB are free on '{device}'; give a smaller"
                " calibration.batch_size or sequence_length, runtime.activations=disk, or more memory"
            )
        if reads_ahead(device):
            self._check_host(device)
        if self.on_disk and self.sizes.num_layers * self.num_batches > MAX_MAPS:
            raise ConfigError(
                f"runtime.activations=disk: {self.num_batches} batches in {self.sizes.num_layers} layers are"
                f" more than the {MAX_MAPS} files that a process can map; give a larger"
                " calibration.batch_size"
            )

    def _check_host(self, device: torch.device) -> None:
        """Refuse a layer that is read ahead and does not fit into the CPU's memory."""
        tape = 0 if self.on_disk else self.tape_bytes
        needed = 2 * self.sizes.layer + tape
        free = free_memory(CPU)
        if needed > free:
            raise ConfigError(
                f"runtime.stream: reading a layer while '{device}' computes takes {needed / GB:.3g} GB of"
                f" the CPU's memory (a layer as read and in pinned memory {2 * self.sizes.layer / GB:.3g},"
                f" between the layers {tape / GB:.3g}), and {free / GB:.3g} GB are free; give"
                " runtime.activations=disk, or more memory"
            )


def reads_ahead(device: torch.device) -> bool:
    """Whether a thread reads the next layer while one computes.

    On a CPU it would only take time from those that compute, and another layer's memory.
    """
    return device.type != "cpu"


def memory_stages(steps: Iterable[Step]) -> list[str]:
    """What `Placement` calls these steps, each once, as far as they run the model."""
    names = []
    for step in steps:
        if step.kind in {CALIBRATE, REPAIR, CHECKPOINT}:
            names.append(step.kind)
        elif step.kind == "evaluate":
            names.append(EVALUATE_DENSE if step.variant == "dense" else EVALUATE_PRUNED)
    return list(dict.fromkeys(names))


def choose_placement(
    config: ExperimentConfig, source: ModelSource, device: torch.device, ranks: Ranks
) -> Placement:
    """Decide where weights and activations will be: as the configuration says, or by what fits each rank."""
    runtime, calibration = config.runtime, config.calibration
    is_on_one_device = runtime.device_map is None
    model = source.on_meta()
    batch_size = min(calibration.batch_size, calibration.num_samples)
    sizes = footprint(model, batch_size, calibration.sequence_length)
    statistics = _statistics_bytes(model)
    num_sharing = ranks.num_local if device.type == "cpu" else 1
    free = min(ranks.gather(free_memory(device) // num_sharing))
    loading = loading_factor(device, source.stored_dtype, source.dtype)
    why = None
    if runtime.stream == AUTO and is_on_one_device:
        why = _why_streamed(sizes, statistics, loading, free=free, device=device)
    is_streamed = runtime.stream is True or why is not None
    activations = None
    surely = SURELY_BELOW * sizes.num_layers * sizes.hidden + sizes.logits
    if is_streamed or sizes.weights + statistics + surely > free:
        activations = batch_bytes(model, batch_size, calibration.sequence_length)
    by_layer = runtime.gradient_checkpointing is True
    if runtime.gradient_checkpointing == AUTO and is_on_one_device and not is_streamed:
        needed = sizes.weights + statistics + (activations or 0)
        why = _why_recomputed(needed, free, device)
        by_layer = why is not None
    return Placement(
        is_streamed=is_streamed,
        on_disk=runtime.activations != RAM,
        num_last=min(runtime.last_layers, sizes.num_layers),
        by_layer=by_layer,
        sizes=sizes,
        evaluated=_evaluated(config, model),
        kept=1 - config.pruning.ratio,
        activations=activations,
        statistics=statistics,
        kernels=kernels_of(device, source.dtype, is_streamed=is_streamed),
        num_batches=math.ceil(calibration.num_samples / (batch_size * ranks.size)),
        loading=loading,
        free=free,
        why=why,
    )


def _why_streamed(
    sizes: Footprint, statistics: int, loading: float, *, free: int, device: torch.device
) -> str | None:
    """Why the whole model cannot be in memory; None if it can."""
    needed = max(int(loading * sizes.weights), sizes.weights + statistics)
    if needed <= free:
        return None
    return (
        f"weights of {sizes.weights / GB:.3g} GB, {loading} times that while they are loaded, do not fit into"
        f" the {free / GB:.3g} GB that are free on '{device}': one layer at a time is read from the files"
        " (runtime.stream)"
    )


def _why_recomputed(needed: int, free: int, device: torch.device) -> str | None:
    """Why a batch's activations cannot all be in memory beside weights and statistics; None if they can."""
    if needed <= free:
        return None
    return (
        f"weights, statistics and a batch's activations of {needed / GB:.3g} GB do not fit into the"
        f" {free / GB:.3g} GB that are free on '{device}': activations are computed again in each layer"
        " (runtime.gradient_checkpointing)"
    )


def _evaluated(config: ExperimentConfig, model: MoEModel) -> Footprint:
    """The footprint of the evaluations' largest batch; of a calibration batch if nothing is evaluated."""
    entries = [entry for entry in config.evaluation.values() if isinstance(entry, Mapping)]
    with_batches = [entry for entry in entries if {"batch_size", "window"} <= entry.keys()]
    shapes = [(entry["batch_size"], entry["window"]) for entry in with_batches]
    if not shapes:
        calibration = config.calibration
        batch_size = min(calibration.batch_size, calibration.num_samples)
        shapes.append((batch_size, calibration.sequence_length))
    largest = max(shapes, key=math.prod)
    return footprint(model, *largest)


def _statistics_bytes(model: MoEModel) -> int:
    nowhere = torch.device("meta")
    layers = [LayerStatistics.zeros(layer.num_experts, layer.width, nowhere) for layer in model.layers]
    return sum(layer.num_bytes for layer in layers)
