"""Where the weights and activations of an experiment will be: all in memory, recomputed, or one layer at a
time from the files.

In: the configuration, a model and a device. Out: a `Placement`, with the numbers that led to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from heapr.errors import ConfigError
from heapr.model.check_walk import check_streamed, check_walk
from heapr.model.footprint import BUFFERS, Footprint, batch_bytes, footprint, free_memory, loading_factor
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.model.passes import Way
from heapr.model.shelf import Files, Memory
from heapr.origin import KEY_LENGTH, canonical_json
from heapr.schema import ExperimentConfig
from heapr.types import LayerStatistics

AUTO, RAM = "auto", "ram"
TAPES, WALKS = ".tapes", ".walks"  # below the folder of results
# Activations of a batch are surely below so many times its hidden states behind all layers.
SURELY_BELOW = 64
MAX_MAPS = 60_000  # files that one process can have mapped on Linux, less some
GB = 1e9


@dataclass(frozen=True)
class Placement:
    """Where things are.

    Attributes:
        is_streamed: one decoder layer at a time is in memory.
        on_disk: what layers put out lies in files meanwhile, if the model is streamed.
        by_layer: activations inside a layer are computed again for the backward pass.
        sizes: of model and batch.
        activations: bytes that a batch holds between forward and backward in memory; None if not known.
        statistics: bytes of the calibration statistics.
        num_batches: of the calibration.
        loading: memory that loading the whole model takes, divided by its weights.
        free: bytes free on the device.
        why: one line, or None if nothing is to be said.
    """

    is_streamed: bool
    on_disk: bool
    by_layer: bool
    sizes: Footprint
    activations: int | None
    statistics: int
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
    def peak_bytes(self) -> dict[str, int]:
        """Predicted memory of the calibration, by part, without the interpreter."""
        sizes = self.sizes
        activations = self.activations or SURELY_BELOW // 4 * sizes.num_layers * sizes.hidden
        of_layers = max(0, activations - sizes.logits)
        of_layer = of_layers // sizes.num_layers
        always = {"statistics": self.statistics, "buffers": BUFFERS}
        if self.is_streamed:
            parts = {"beside the layers": sizes.beside, "one layer": sizes.layer}
            parts["a batch in it"] = max(of_layer, sizes.logits)
            if not self.on_disk:
                parts["between the layers"] = self.tape_bytes
            return parts | always
        held = of_layer + sizes.num_layers * sizes.hidden if self.by_layer else of_layers
        computing = max(held, sizes.logits)
        if self.loading_bytes > sizes.weights + computing + self.statistics:
            return {f"weights, {self.loading} times while they are loaded": self.loading_bytes}
        return {"weights": sizes.weights, "activations": computing} | always

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

    def check(self, device: torch.device) -> None:
        """Refuse what does not fit into memory.

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
        needed = sum(self.peak_bytes.values())
        if needed > self.free:
            parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in self.peak_bytes.items())
            raise ConfigError(
                f"runtime.stream: even one layer at a time takes about {needed / GB:.3g} GB ({parts}), and"
                f" {self.free / GB:.3g} GB are free on '{device}'; give a smaller calibration.batch_size or"
                " sequence_length, runtime.activations=disk, or more memory"
            )
        if self.on_disk and self.sizes.num_layers * self.num_batches > MAX_MAPS:
            raise ConfigError(
                f"runtime.activations=disk: {self.num_batches} batches in {self.sizes.num_layers} layers are"
                f" more than the {MAX_MAPS} files that a process can map; give a larger"
                " calibration.batch_size"
            )


def choose_placement(config: ExperimentConfig, source: ModelSource, device: torch.device) -> Placement:
    """Decide where weights and activations will be: as the configuration says, or by what fits."""
    runtime, calibration = config.runtime, config.calibration
    model = source.on_meta()
    batch_size = min(calibration.batch_size, calibration.num_samples)
    sizes = footprint(model, batch_size, calibration.sequence_length)
    statistics = _statistics_bytes(model)
    free = free_memory(device)
    loading = loading_factor(device, source.config.get_text_config().dtype, source.dtype)
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
        activations=activations,
        statistics=statistics,
        num_batches=-(-calibration.num_samples // batch_size),
        loading=loading,
        free=free,
        why=why,
    )


def _statistics_bytes(model: MoEModel) -> int:
    nowhere = torch.device("meta")
    layers = [LayerStatistics.zeros(layer.num_experts, layer.width, nowhere) for layer in model.layers]
    return sum(layer.num_bytes for layer in layers)
