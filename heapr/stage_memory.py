"""How much memory each stage will take, by where weights and activations are.

In: sizes of a model and of its batches. Out: bytes by part, without the interpreter (docs/scale.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from heapr.artifacts import CHECKPOINT_PART, REPAIR_PART
from heapr.model.footprint import BUFFERS, Footprint
from heapr.model.kernels import Kernels

# Activations of a batch are surely below so many times its hidden states behind all layers.
SURELY_BELOW = 64
LARGEST_SHARE = 5  # the most tokens that an expert gets in practice, divided by the mean
CALIBRATE, REPAIR, CHECKPOINT = "calibrate", REPAIR_PART, CHECKPOINT_PART
EVALUATE_DENSE, EVALUATE_PRUNED = "evaluate dense", "evaluate pruned"
MEMORY_STAGES = (CALIBRATE, REPAIR, CHECKPOINT, EVALUATE_DENSE, EVALUATE_PRUNED)


@dataclass(frozen=True)
class StageMemory:
    """What the stages need.

    Attributes:
        is_streamed: one decoder layer at a time is in memory.
        on_disk: what layers put out lies in files meanwhile, if the model is streamed.
        num_last: layers at the end of a streamed model that calibration keeps in memory together.
        by_layer: activations inside a layer are computed again for the backward pass.
        sizes: of model and batch.
        evaluated: the same for the largest batch of an evaluation.
        kept: share of the atomic experts that stays.
        activations: bytes that a batch holds between forward and backward in memory; None if not known.
        statistics: bytes of the calibration statistics.
        kernels: that products leave behind.
        num_batches: of the calibration, of one of several processes.
        loading: memory that loading the whole model takes, divided by its weights.
    """

    is_streamed: bool
    on_disk: bool
    num_last: int
    by_layer: bool
    sizes: Footprint
    evaluated: Footprint
    kept: float
    activations: int | None
    statistics: int
    kernels: Kernels
    num_batches: int
    loading: float

    @property
    def loading_bytes(self) -> int:
        """Memory while the whole model is loaded."""
        return int(self.loading * self.sizes.weights)

    @property
    def tape_bytes(self) -> int:
        """What streamed calibration keeps of all spans' outputs, and the gradients of two of them."""
        num_spans = self.sizes.num_layers - self.num_last + 1
        return (num_spans + 2) * self.sizes.hidden * self.num_batches

    @property
    def bytes_read(self) -> int:
        """What streamed calibration reads from files of the model's dtype: layers twice, but not the last."""
        sizes = self.sizes
        in_layers = sizes.weights - sizes.beside
        return sizes.beside + 2 * in_layers - self.num_last * in_layers // sizes.num_layers

    @property
    def work_ratio(self) -> float:
        """FLOPs of the calibration, divided by those of a forward and a backward pass.

        Where a layer is computed again it is one forward pass more. The backward pass goes to the activations
        alone and takes as much as a forward pass.
        """
        if self.is_streamed:
            num_again = self.sizes.num_layers - self.num_last
            return 1 + num_again / (2 * self.sizes.num_layers)
        return 1.5 if self.by_layer else 1.0

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
            layers = {"one layer": self.sizes.layer}
            if stage == CALIBRATE and self.num_last > 1:
                layers = {f"{self.num_last} layers": self.num_last * self.sizes.layer}
            return {"beside the layers": self.sizes.beside} | layers | working
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
            parts["a batch in it"] = max(self.num_last * of_layer, sizes.logits)
            if not self.on_disk:
                parts["between the layers"] = self.tape_bytes
            return parts
        held = of_layer + sizes.num_layers * sizes.hidden if self.by_layer else of_layers
        return parts | {"activations": max(held, sizes.logits)}
