"""Seconds and memory of the calibration on this machine, compared with the published two-stage procedure.

In: the dense model and calibration tokens. Out: median seconds and peak memory of both procedures, and the
difference of their scores. Timings hold for one machine, which is part of the artifact's identity.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor

from heapr.calibration.collector import collect
from heapr.evaluation.measurement import Material, Need, weight_bytes
from heapr.evaluation.two_stage import two_stage_scores
from heapr.measure import WorkingMemory, machine, wait_for
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.progress import progress
from heapr.score.gradient import Heapr
from heapr.types import Evaluation, LayerStatistics, Metrics

MATRIX_ELEMENT_BYTES = 4  # float32

Procedure = Callable[[], dict[int, Tensor]]  # returns scores by decoder layer index


class CalibrationCost:
    """Compares two procedures that compute the same scores.

    `heapr` needs one forward and one backward pass and keeps running sums. `two_stage` needs the same passes
    with a D x D matrix per expert, and another forward pass. Both use the same forward of the experts with
    frozen parameters.

    Metrics (medians are over turns):

    - `calibration_seconds/<procedure>`: median seconds.
    - `calibration_speedup`: median of the seconds of `two_stage` divided by those of `heapr`.
    - `calibration_peak_memory_bytes/<procedure>`: weights plus working memory (see `WorkingMemory`).
    - `calibration_state_bytes/<procedure>`: what is kept between batches, statistics or matrices.
    - `calibration_score_difference`: largest relative difference of the scores.

    If a procedure runs out of memory, metrics that need it are left out, and the details list it.

    Args:
        num_sequences: how many calibration sequences to use, from the first on; at least 1.
        batch_size: sequences per pass, at least 1.
        repeats: turns, 1 to 1000.
    """

    name = "calibration_cost"
    needs = frozenset({Need.DENSE, Need.TOKENS, Need.MACHINE})

    def __init__(
        self,
        *,
        num_sequences: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(1)],
        repeats: Annotated[int, Ge(1), Le(1000)],
    ) -> None:
        self.sizes = {"num_sequences": num_sequences, "batch_size": batch_size, "repeats": repeats}
        self.num_sequences = num_sequences
        self.batch_size = batch_size
        self.repeats = repeats

    def identity(self) -> dict[str, Any]:
        return {"evaluator": self.name, **self.sizes}

    def prepare(self, source: ModelSource) -> None:
        """Nothing to prepare."""

    def __call__(self, material: Material) -> Evaluation:
        model = material.model()
        ids_NW = material.tokens().ids_NW[: self.num_sequences].to(model.device)
        batches = list(ids_NW.split(self.batch_size))
        procedures: dict[str, Procedure] = {
            "heapr": partial(_one_stage, model, batches),
            "two_stage": partial(two_stage_scores, model, batches),
        }
        metrics: Metrics = {}
        for name, size in _state_bytes(model).items():
            metrics[f"calibration_state_bytes/{name}"] = size
        weights = weight_bytes(model)
        scores: dict[str, dict[int, Tensor]] = {}
        # These runs also warm up.
        for name, procedure in procedures.items():
            measured = _scores_and_peak(procedure, model.device)
            if measured is not None:
                scores[name], peak = measured
                metrics[f"calibration_peak_memory_bytes/{name}"] = weights + peak
        that_fit = {name: procedures[name] for name in scores}
        seconds = self._seconds(that_fit, model.device)
        for name, turns in seconds.items():
            metrics[f"calibration_seconds/{name}"] = float(turns.median())
        if len(scores) == len(procedures):
            speedups = seconds["two_stage"] / seconds["heapr"]
            metrics["calibration_speedup"] = float(speedups.median())
            metrics["calibration_score_difference"] = _difference(scores["heapr"], scores["two_stage"])
        details = {
            **self.identity(),
            "machine": machine(model.device),
            "out_of_memory": [name for name in procedures if name not in scores],
            "seconds": {name: turns.tolist() for name, turns in seconds.items()},
        }
        return Evaluation(metrics, details)

    def _seconds(self, procedures: Mapping[str, Procedure], device: torch.device) -> dict[str, Tensor]:
        """Seconds of each procedure in every turn, float64.

        Odd turns run in reverse order, so that drifts of the machine's speed affect all procedures alike.
        """
        seconds: dict[str, list[float]] = {name: [] for name in procedures}
        for turn in progress(range(self.repeats), total=self.repeats, description=self.name, unit="turn"):
            order = list(procedures)
            if turn % 2 == 1:
                order.reverse()
            for name in order:
                wait_for(device)
                started = time.perf_counter()
                procedures[name]()
                wait_for(device)
                seconds[name].append(time.perf_counter() - started)
        return {name: torch.tensor(turns, dtype=torch.float64) for name, turns in seconds.items()}


def _scores_and_peak(procedure: Procedure, device: torch.device) -> tuple[dict[int, Tensor], int] | None:
    """Scores on the CPU, and the peak of bytes beside the weights. None if it runs out of memory."""
    try:
        with WorkingMemory(device) as memory:
            scores = procedure()
            peak = memory.take_peak()
    except torch.OutOfMemoryError:
        return None
    on_cpu = {index: scores_EF.cpu() for index, scores_EF in scores.items()}
    return on_cpu, peak


def _one_stage(model: MoEModel, batches: Sequence[Tensor]) -> dict[int, Tensor]:
    """HEAPr's scores from the statistics of one forward and one backward pass."""
    layers = {layer.index: layer for layer in model.layers}
    statistics = collect(model, batches)
    scores = Heapr()(statistics, lambda index: layers[index].weights())
    return dict(scores.layers)


def _state_bytes(model: MoEModel) -> dict[str, int]:
    """Bytes that each procedure keeps between batches."""
    sums = matrices = 0
    for layer in model.layers:
        statistics = LayerStatistics.zeros(layer.num_experts, layer.width, torch.device("meta"))
        sums += statistics.num_bytes
        matrices += layer.num_experts * layer.model_width**2 * MATRIX_ELEMENT_BYTES
    return {"heapr": sums, "two_stage": matrices}


def _difference(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> float:
    """Largest relative difference over atomic experts of experts that a token reached."""
    largest = 0.0
    for index, theirs_EF in theirs.items():
        is_reached_EF = theirs_EF > 0
        if is_reached_EF.any():
            theirs_S = theirs_EF[is_reached_EF].double()
            ours_S = ours[index][is_reached_EF].double()
            difference_S = (ours_S - theirs_S).abs() / theirs_S
            largest = max(largest, float(difference_S.max()))
    return largest
