"""Speed and peak memory of the dense and the pruned model on this machine, measured in turns.

In: both models, in memory at once, and calibration tokens as input. Out: tokens per second, seconds and peak
memory of prefill and decode. Timings hold for one machine, which is part of the artifact's identity.
Shape letters: N sequences, W prompt tokens and new tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor

from heapr.errors import ConfigError
from heapr.evaluation.measurement import Material, Need, weight_bytes
from heapr.measure import WorkingMemory, machine, wait_for
from heapr.model.experts.dispatch import use_heapr_experts
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.progress import progress
from heapr.types import Evaluation, Metrics

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Contestant:
    """A model and the forward that its experts run."""

    name: str
    model: MoEModel
    forward: Callable[[], AbstractContextManager[None]]


class Throughput:
    """Times prefill and decode. Prefill reads a batch of prompts; decode then reads token by token.

    Contestants: `dense` and `pruned` use the same forward of the experts, heapr's for the device (the loop on
    a CPU, grouped products on a GPU), so that only pruning makes a difference. `dense_default` and
    `pruned_default` use the forward that transformers chooses. A ragged model can only use heapr's, so there
    is no `pruned_default`, and `pruned` takes its place.

    Every turn times all contestants. Odd turns run in reverse order, so that drifts of the machine's speed
    affect all contestants alike. All contestants read the same tokens, those of the calibration, repeated if
    there are too few.

    Metrics (medians are over turns):

    - `<phase>_tokens_per_second/<contestant>`: from the median seconds.
    - `<phase>_seconds/<contestant>`: median seconds of the batch's prefill, or of one decode step.
    - `<phase>_seconds_iqr/<contestant>`: interquartile range of the seconds.
    - `<phase>_peak_memory_bytes/<contestant>`: weights, cache and working memory (see `WorkingMemory`).
    - `<phase>_speedup`: median of the seconds of `dense` divided by those of `pruned`.
    - `<phase>_speedup_default`: the same for `dense_default` and `pruned_default`.

    The details say which forward each contestant used.

    Args:
        prompt_length: tokens per prompt, at least 1.
        new_tokens: decode steps, at least 1.
        batch_size: sequences, at least 1.
        repeats: turns, 1 to 1000.
    """

    name = "throughput"
    needs = frozenset({Need.DENSE_AND_PRUNED, Need.TOKENS, Need.MACHINE})
    objectives = ("prefill_speedup", "decode_speedup")

    def __init__(
        self,
        *,
        prompt_length: Annotated[int, Ge(1)],
        new_tokens: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(1)],
        repeats: Annotated[int, Ge(1), Le(1000)],
    ) -> None:
        self.sizes = {
            "prompt_length": prompt_length,
            "new_tokens": new_tokens,
            "batch_size": batch_size,
            "repeats": repeats,
        }
        self.prompt_length = prompt_length
        self.new_tokens = new_tokens
        self.length = prompt_length + new_tokens
        self.batch_size = batch_size
        self.repeats = repeats

    def identity(self) -> dict[str, Any]:
        return {"evaluator": self.name, **self.sizes}

    def prepare(self, source: ModelSource) -> None:
        limit = source.max_sequence_length
        if limit is not None and self.length > limit:
            raise ConfigError(
                f"evaluation.throughput.prompt_length + new_tokens = {self.length} is above the model's "
                f"limit of {limit} tokens; make one of them smaller"
            )

    @torch.inference_mode()
    def __call__(self, material: Material) -> Evaluation:
        dense, pruned = material.dense_and_pruned()
        ids_NW = self._text(material).to(dense.device)
        contestants = _contestants(dense, pruned)
        # These runs also warm up.
        peaks = {contestant.name: self._peaks(contestant, ids_NW) for contestant in contestants}
        seconds = self._turns(contestants, ids_NW)
        num_tokens = {"prefill": self.batch_size * self.prompt_length, "decode": self.batch_size}
        metrics: Metrics = {}
        for phase in PHASES:
            of_phase = {}
            for name, phases in seconds.items():
                of_phase[name] = torch.tensor(phases[phase], dtype=torch.float64)
            metrics |= _timings(phase, num_tokens[phase], of_phase)
            for name, peak in peaks.items():
                metrics[f"{phase}_peak_memory_bytes/{name}"] = peak[phase]
        details = {
            **self.identity(),
            "machine": machine(dense.device),
            **_protocol(contestants),
            "seconds": seconds,
        }
        return Evaluation(metrics, details)

    def _turns(self, contestants: Sequence[Contestant], ids_NW: Tensor) -> dict[str, dict[str, list[float]]]:
        """Seconds of every turn, by contestant and phase: of the batch's prefill, and of one decode step."""
        seconds: dict[str, dict[str, list[float]]] = {}
        for contestant in contestants:
            seconds[contestant.name] = {phase: [] for phase in PHASES}
        for turn in progress(range(self.repeats), total=self.repeats, description=self.name, unit="turn"):
            order = list(contestants)
            if turn % 2 == 1:
                order.reverse()
            for contestant in order:
                prefill, decode = self._seconds(contestant, ids_NW)
                seconds[contestant.name]["prefill"].append(prefill)
                seconds[contestant.name]["decode"].append(decode)
        return seconds

    def _text(self, material: Material) -> Tensor:
        """Calibration tokens (N, W), repeated from the start if there are too few."""
        tokens_T = material.tokens().ids_NW.flatten()
        needed = self.batch_size * self.length
        times = math.ceil(needed / len(tokens_T))
        repeated_T = tokens_T.repeat(times)
        return repeated_T[:needed].view(self.batch_size, self.length)

    def _seconds(self, contestant: Contestant, ids_NW: Tensor) -> tuple[float, float]:
        """Seconds of the prefill and of one decode step."""
        with contestant.forward():
            _read(contestant.model, ids_NW[:, :1])  # ragged weights are packed, which is not to be timed
            wait_for(ids_NW.device)
            times = [time.perf_counter()]
            for _ in self._run(contestant.model, ids_NW):
                wait_for(ids_NW.device)
                times.append(time.perf_counter())
        start, prefilled, decoded = times
        return prefilled - start, (decoded - prefilled) / self.new_tokens

    def _peaks(self, contestant: Contestant, ids_NW: Tensor) -> dict[str, int]:
        """Peak bytes of each phase: the model's weights plus what is allocated while it runs."""
        weights = weight_bytes(contestant.model)
        with contestant.forward(), WorkingMemory(ids_NW.device) as memory:
            peaks = [weights + memory.take_peak() for _ in self._run(contestant.model, ids_NW)]
        return dict(zip(PHASES, peaks, strict=True))

    def _run(self, model: MoEModel, ids_NW: Tensor) -> Iterator[None]:
        """Run prefill, then decode, and yield after each."""
        prompt_NW, new_NW = ids_NW.split([self.prompt_length, self.new_tokens], dim=1)
        cache = _read(model, prompt_NW)
        yield
        for token_N1 in new_NW.split(1, dim=1):
            cache = _read(model, token_N1, cache)
        yield


def _contestants(dense: MoEModel, pruned: MoEModel) -> list[Contestant]:
    contestants = [
        Contestant("dense_default", dense, nullcontext),
        Contestant("dense", dense, partial(use_heapr_experts, dense.model)),
        Contestant("pruned", pruned, partial(use_heapr_experts, pruned.model)),
    ]
    if not pruned.is_ragged:
        contestants.append(Contestant("pruned_default", pruned, nullcontext))
    return contestants


def _protocol(contestants: Sequence[Contestant]) -> dict[str, Any]:
    """The dtype of the weights, and transformers' name of the experts' forward that each contestant uses."""
    forwards: dict[str, Any] = {}
    for contestant in contestants:
        with contestant.forward():
            forwards[contestant.name] = contestant.model.model.get_experts_implementation()
    dtype = str(contestants[0].model.model.dtype).removeprefix("torch.")
    return {"dtype": dtype, "experts_forward": forwards}


def _timings(phase: str, num_tokens: int, seconds: Mapping[str, Tensor]) -> Metrics:
    """Metrics of a phase that reads `num_tokens` tokens, from each contestant's seconds of every turn."""
    pruned_default = seconds.get("pruned_default", seconds["pruned"])
    speedups = seconds["dense"] / seconds["pruned"]
    default_speedups = seconds["dense_default"] / pruned_default
    metrics: Metrics = {
        f"{phase}_speedup": float(speedups.quantile(0.5)),
        f"{phase}_speedup_default": float(default_speedups.quantile(0.5)),
    }
    for name, turns in seconds.items():
        median = turns.quantile(0.5)
        iqr = turns.quantile(0.75) - turns.quantile(0.25)
        metrics[f"{phase}_tokens_per_second/{name}"] = float(num_tokens / median)
        metrics[f"{phase}_seconds/{name}"] = float(median)
        metrics[f"{phase}_seconds_iqr/{name}"] = float(iqr)
    return metrics


def _read(model: MoEModel, ids_NW: Tensor, cache: Any = None) -> Any:
    """Read tokens, compute the logits of the next one, and return the cache."""
    outputs = model.body(input_ids=ids_NW, past_key_values=cache, use_cache=True)
    last_ND = outputs.last_hidden_state[:, -1]
    model.logits(last_ND)
    return outputs.past_key_values
