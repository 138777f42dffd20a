"""Seconds and memory of the calibration on this machine, against the published two-stage procedure, measured
in turns.

In: the dense model and calibration tokens. Out: medians and peaks of both, and how far their scores are
apart. Timings are of one machine, which is part of the artifact's identity.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from heapr.calibration.collector import collect
from heapr.evaluation.measurement import Material, Need
from heapr.evaluation.two_stage import two_stage_scores
from heapr.measure import WorkingMemory, machine, wait_for
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.progress import progress
from heapr.score.gradient import Heapr
from heapr.types import Evaluation, LayerStatistics, Metrics, Scores

MATRIX_ELEMENT_BYTES = 4  # float32

Procedure = Callable[[], dict[int, Tensor]]  # gives scores by decoder layer index


class CalibrationCost:
    """`heapr`: one forward and one backward pass, running sums. `two_stage`: the same passes with a D x D
    matrix per expert, and another forward pass. Both run the same forward of the experts with frozen
    parameters and end with scores.

    Metrics: `calibration_seconds/<procedure>`, medians over turns; `calibration_speedup`, the median over
    turns of seconds of `two_stage` over those of `heapr`; `calibration_peak_memory_bytes/<procedure>`,
    weights and what `WorkingMemory` sees; `calibration_state_bytes/<procedure>`, of statistics and of
    matrices; `calibration_score_difference`, the largest relative difference of the scores. Where the
    matrices do not fit, what needs them is left out and the details say so.

    Args:
        num_sequences: calibration sequences, the first of them, at least 1.
        batch_size: sequences per pass, at least 1.
        repeats: turns, at least 1.
    """

    name = "calibration_cost"
    needs = frozenset({Need.DENSE, Need.TOKENS, Need.MACHINE})

    def __init__(
        self,
        *,
        num_sequences: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(1)],
        repeats: Annotated[int, Ge(1)],
    ) -> None:
        self.sizes = {"num_sequences": num_sequences, "batch_size": batch_size, "repeats": repeats}
        self.num_sequences, self.batch_size, self.repeats = num_sequences, batch_size, repeats

    def identity(self) -> dict[str, Any]:
        return {"evaluator": self.name, **self.sizes}

    def prepare(self, source: ModelSource) -> None:
        """Nothing can go wrong."""

    def __call__(self, material: Material) -> Evaluation:
        model = material.model()
        ids_NW = material.tokens().ids_NW[: self.num_sequences].to(model.device)
        batches = list(ids_NW.split(self.batch_size))
        procedures: dict[str, Procedure] = {
            "heapr": partial(_one_stage, model, batches),
            "two_stage": partial(two_stage_scores, model, batches),
        }
        metrics: Metrics = {
            f"calibration_state_bytes/{name}": size for name, size in _state_bytes(model).items()
        }
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.model.parameters())
        found: dict[str, dict[int, Tensor]] = {}
        for name, procedure in procedures.items():  # warms up, too
            measured = _scores_and_peak(procedure, model.device)
            if measured is not None:
                found[name], peak = measured
                metrics[f"calibration_peak_memory_bytes/{name}"] = weights + peak
        seconds = self._seconds({name: procedures[name] for name in found}, model.device)
        metrics |= {f"calibration_seconds/{name}": float(turns.median()) for name, turns in seconds.items()}
        if len(found) == len(procedures):
            metrics["calibration_speedup"] = float((seconds["two_stage"] / seconds["heapr"]).median())
            metrics["calibration_score_difference"] = _difference(found["heapr"], found["two_stage"])
        out_of_memory = [name for name in procedures if name not in found]
        turns_of = {name: turns.tolist() for name, turns in seconds.items()}
        of_machine = {"machine": machine(model.device), "out_of_memory": out_of_memory, "seconds": turns_of}
        return Evaluation(metrics, self.identity() | of_machine)

    def _seconds(self, procedures: Mapping[str, Procedure], device: torch.device) -> dict[str, Tensor]:
        """Of every turn; even turns go forwards, odd ones backwards, so that the machine's moods meet both
        alike."""
        seconds: dict[str, list[float]] = {name: [] for name in procedures}
        for turn in progress(range(self.repeats), total=self.repeats, description=self.name, unit="turn"):
            for name in list(procedures)[:: 1 if turn % 2 == 0 else -1]:
                wait_for(device)
                started = time.perf_counter()
                procedures[name]()
                wait_for(device)
                seconds[name].append(time.perf_counter() - started)
        return {name: torch.tensor(turns, dtype=torch.float64) for name, turns in seconds.items()}


def _scores_and_peak(procedure: Procedure, device: torch.device) -> tuple[dict[int, Tensor], int] | None:
    """Scores on the CPU, and the bytes at the peak beside the weights; None if memory does not suffice."""
    try:
        with WorkingMemory(device) as memory:
            scores = procedure()
            peak = memory.take_peak()
    except torch.OutOfMemoryError:
        return None
    return {index: scores_EF.cpu() for index, scores_EF in scores.items()}, peak


def _one_stage(model: MoEModel, batches: Sequence[Tensor]) -> dict[int, Tensor]:
    weights = {layer.index: layer.weights for layer in model.layers}
    scores: Scores = Heapr()(collect(model, batches), lambda index: weights[index]())
    return dict(scores.layers)


def _state_bytes(model: MoEModel) -> dict[str, int]:
    """What each procedure keeps between batches."""
    statistics = [
        LayerStatistics.zeros(layer.num_experts, layer.width, torch.device("meta")) for layer in model.layers
    ]
    matrices = sum(layer.num_experts * layer.model_width**2 * MATRIX_ELEMENT_BYTES for layer in model.layers)
    return {"heapr": sum(layer.num_bytes for layer in statistics), "two_stage": matrices}


def _difference(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> float:
    """Largest relative difference over atomic experts whose expert was reached by a token."""
    largest = 0.0
    for index, theirs_EF in theirs.items():
        is_reached = theirs_EF > 0
        if is_reached.any():
            two = theirs_EF[is_reached].double()
            one = ours[index][is_reached].double()
            largest = max(largest, float(((one - two).abs() / two).max()))
    return largest
