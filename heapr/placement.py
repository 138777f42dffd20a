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

from heapr.artifacts import CHECKPOINT_PART, REPAIR_PART
from heapr.errors import ConfigError
from heapr.model.check_walk import check_streamed, check_walk
from heapr.model.footprint import BUFFERS, Footprint, batch_bytes, footprint, free_memory, loading_factor
from heapr.model.kernels import Kernels, kernels_of
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.model.passes import Way
from heapr.model.shelf import Files, Memory
from heapr.origin import KEY_LENGTH, canonical_json
from heapr.ranks import Ranks
from heapr.schema import ExperimentConfig
from heapr.steps import Step
from heapr.types import LayerStatistics

AUTO, RAM = "auto", "ram"
TAPES, WALKS = ".tapes", ".walks"  # below the folder of results
# Activations of a batch are surely below so many times its hidden states behind all layers.
SURELY_BELOW = 64
LARGEST_SHARE = 5  # the most tokens that an expert gets in practice, divided by the mean
MAX_MAPS = 60_000  # files that one process can have mapped on Linux, less some
GB = 1e9
CALIBRATE, REPAIR, CHECKPOINT = "calibrate", REPAIR_PART, CHECKPOINT_PART
EVALUATE_DENSE, EVALUATE_PRUNED = "evaluate dense", "evaluate pruned"
MEMORY_STAGES = (CALIBRATE, REPAIR, CHECKPOINT, EVALUATE_DENSE, EVALUATE_PRUNED)


@dataclass(frozen=True)
class Placement:
    """Where things are.

    Attributes:
        is_streamed: one decoder layer at a time is in memory.
        on_disk: what layers put out lies in files meanwhile, if the model is streamed.
        by_layer: activations inside a layer are computed again for the backward pass.
        sizes: of model and batch.
        evaluated: the same for the largest batch of an evaluation.
        kept: share of the atomic experts that stays.
        activations: bytes that a batch holds between forward and backward in memory; None if not known.
        statistics: bytes of the calibration statistics.
        kernels: that products leave behind.
        num_batches: of the calibration, of one of several processes.
        loading: memory that loading the whole model takes, divided by its weights.
        free: bytes free on the device.
        why: one line, or None if nothing is to be said.
    """

    is_streamed: bool
    on_disk: bool
    by_layer: bool
    sizes: Footprint
    evaluated: Footprint
    kept: float
    activations: int | None
    statistics: int
    kernels: Kernels
    num_batches: int
    loading: float
    free: int
    why: str | None

    @property
    def loading_bytes(self) -> int:
        """Memory while the whole model is loaded."""
        return int(self.loading * self.sizes.weights)

    @property
    def tape_bytes(self) -> int:
        """What streamed calibration keeps of all layers' outputs, and the gradients of two of them."""
        return (self.sizes.num_layers + 2) * self.sizes.hidden * self.num_batches

    @property
    def bytes_read(self) -> int:
        """What streamed calibration reads from files of the model's dtype: layers twice, but for the last."""
        sizes = self.sizes
        in_layers = sizes.weights - sizes.beside
        return sizes.beside + 2 * in_layers - in_layers // sizes.num_layers

    @property
    def work_ratio(self) -> float:
        """FLOPs of the calibration, divided by those of a forward and a backward pass.

        Where a layer is computed again it is one forward pass more. The backward pass goes to the activations
        alone and takes as much as a forward pass.
        """
        return 1.5 if self.is_streamed or self.by_layer else 1.0

    def peak_bytes(self, stage: str = CALIBRATE) -> dict[str, int]:
        """Predicted memory of a stage, by part, without the interpreter (docs/scale.md has the formulas).

        Args:
            stage: one of `MEMORY_STAGES`.
        """
        working = self._working_bytes(stage) | {"buffers": BUFFERS}
        kernels = self.kernels.num_bytes(self._num_shapes(stage))
        if kernels:
            working["kernels"] = kernels
        if self.is_streamed:
            return {"beside the layers": self.sizes.beside, "one layer": self.sizes.layer} | working
        parts = {"weights": self.sizes.weights} | working
        if self.loading_bytes > sum(parts.values()):
            return {f"weights, {self.loading} times while they are loaded": self.loading_bytes}
        return parts

    def _working_bytes(self, stage: str) -> dict[str, int]:
        """What a stage takes beside weights."""
        cut = round(self.kept * self.sizes.experts)
        after = {"the layer after surgery": cut}
        if stage == REPAIR:
            inputs = 2 * self.sizes.hidden * self.num_batches  # of single batches, and joined
            return after | {"inputs of the experts": inputs}
        if stage == CHECKPOINT:
            columns = cut // 3  # W_down of three matrices, or half of two in experts without a gate
            return after | {"a copy of its largest tensor": cut - columns}
        if stage == EVALUATE_PRUNED:
            return after | {"a batch in it": self._evaluated_bytes}
        if stage == EVALUATE_DENSE:
            return {"a batch in it": self._evaluated_bytes}
        return self._calibration_bytes()

    def _num_shapes(self, stage: str) -> int:
        """Different shapes of the experts' products, two for each forward pass and two for a backward pass.

        Experts of one width differ in their numbers of tokens, up to a multiple of the mean. Widths that
        pruning left differ too.
        """
        if stage == CHECKPOINT:
            return 0
        batch = self.evaluated if stage in {EVALUATE_DENSE, EVALUATE_PRUNED} else self.sizes
        if stage == EVALUATE_PRUNED:
            return 2 * batch.num_experts
        if stage == REPAIR:  # single batches, and all tokens together
            return 2 * batch.num_experts * (self.num_batches + 1)
        spread = min(batch.num_experts * self.num_batches, LARGEST_SHARE * batch.expert_tokens)
        return (4 if stage == CALIBRATE else 2) * spread

    @property
    def _evaluated_bytes(self) -> int:
        """Of an evaluation's batch: logits and their softmax, or half of what a layer keeps for gradients."""
        batch, sizes = self.evaluated, self.sizes
        in_layer = self._layers_activations // sizes.num_layers * batch.hidden // sizes.hidden
        return max(2 * batch.logits // 3, in_layer // 2)

    @property
    def _layers_activations(self) -> int:
        """What a batch of the calibration holds in all layers."""
        sizes = self.sizes
        activations = self.activations or SURELY_BELOW // 4 * sizes.num_layers * sizes.hidden
        return max(0, activations - sizes.logits)

    def _calibration_bytes(self) -> dict[str, int]:
        sizes, of_layers = self.sizes, self._layers_activations
        of_layer = of_layers // sizes.num_layers
        parts = {"statistics": self.statistics}
        if self.is_streamed:
            parts["a batch in it"] = max(of_layer, sizes.logits)
            if not self.on_disk:
                parts["between the layers"] = self.tape_bytes
            return parts
        held = of_layer + sizes.num_layers * sizes.hidden if self.by_layer else of_layers
        return parts | {"activations": max(held, sizes.logits)}

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
            model = source.stream(device, tapes=folder / TAPES if self.on_disk else None)
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
            shelf = files() if self.on_disk else Memory(torch.device("cpu"))
            return Way(model.spans, shelf)
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
        if self.on_disk and self.sizes.num_layers * self.num_batches > MAX_MAPS:
            raise ConfigError(
                f"runtime.activations=disk: {self.num_batches} batches in {self.sizes.num_layers} layers are"
                f" more than the {MAX_MAPS} files that a process can map; give a larger"
                " calibration.batch_size"
            )


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
    model = source.on_meta()
    batch_size = min(calibration.batch_size, calibration.num_samples)
    sizes = footprint(model, batch_size, calibration.sequence_length)
    statistics = _statistics_bytes(model)
    num_sharing = ranks.num_local if device.type == "cpu" else 1
    free = min(ranks.gather(free_memory(device) // num_sharing))
    loading = loading_factor(device, source.stored_dtype, source.dtype)
    is_streamed = runtime.stream is True
    why = None
    needed = max(int(loading * sizes.weights), sizes.weights + statistics)
    if runtime.stream == AUTO and runtime.device_map is None and needed > free:
        is_streamed = True
        why = (
            f"weights of {sizes.weights / GB:.3g} GB, {loading} times that while they are loaded, do not fit"
            f" into the {free / GB:.3g} GB that are free on '{device}': one layer at a time is read from the"
            " files (runtime.stream)"
        )
    activations = None
    surely = SURELY_BELOW * sizes.num_layers * sizes.hidden + sizes.logits
    if is_streamed or sizes.weights + statistics + surely > free:
        activations = batch_bytes(model, batch_size, calibration.sequence_length)
    by_layer = runtime.gradient_checkpointing is True
    if runtime.gradient_checkpointing == AUTO and not is_streamed and runtime.device_map is None:
        needed = sizes.weights + statistics + (activations or 0)
        if needed > free:
            by_layer = True
            why = (
                f"weights, statistics and a batch's activations of {needed / GB:.3g} GB do not fit into the"
                f" {free / GB:.3g} GB that are free on '{device}': activations are computed again in each"
                " layer (runtime.gradient_checkpointing)"
            )
    return Placement(
        is_streamed=is_streamed,
        on_disk=runtime.activations != RAM,
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


def _evaluated(config: ExperimentConfig, model: MoEModel) -> Footprint:
    """The footprint of the evaluations' largest batch; of a calibration batch if nothing is evaluated."""
    shapes = [
        (entry["batch_size"], entry["window"])
        for entry in config.evaluation.values()
        if isinstance(entry, Mapping) and {"batch_size", "window"} <= entry.keys()
    ]
    calibration = config.calibration
    shapes = shapes or [(min(calibration.batch_size, calibration.num_samples), calibration.sequence_length)]
    return footprint(model, *max(shapes, key=math.prod))


def _statistics_bytes(model: MoEModel) -> int:
    nowhere = torch.device("meta")
    layers = [LayerStatistics.zeros(layer.num_experts, layer.width, nowhere) for layer in model.layers]
    return sum(layer.num_bytes for layer in layers)
