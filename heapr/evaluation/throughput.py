"""Speed and memory of the dense and the pruned model on this machine, measured in turns.

In: both models, in memory at once, and the calibration tokens as text to read. Out: tokens per second,
seconds and peak memory of prefill and decode. Timings are of one machine, which is part of the artifact's
identity.
Shape letters: N sequences, W prompt and new tokens.
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
from annotated_types import Ge
from torch import Tensor

from heapr.errors import ConfigError
from heapr.evaluation.measurement import Material, Need
from heapr.measure import WorkingMemory, machine, wait_for
from heapr.model.experts.dispatch import use_heapr_experts
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.progress import progress
from heapr.types import Evaluation, Metrics

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Contestant:
    """A model and the forward of its experts."""

    name: str
    model: MoEModel
    forward: Callable[[], AbstractContextManager[None]]


class Throughput:
    """Prefill reads a batch of prompts and fills the cache; decode then reads one token of each sequence
    after the other.

    Every turn measures all contestants, forwards in even turns and backwards in odd ones, so that the
    machine's moods meet all alike. Contestants: `dense` and `pruned` run the same forward of the experts,
    heapr's loop, so that only pruning makes a difference; `dense_default` and `pruned_default` run as
    transformers runs them, each its own best way. A ragged model's own way is the loop: there `pruned` stands
    for both.

    Metrics for each phase and contestant, medians over turns: `<phase>_tokens_per_second/<contestant>`,
    `<phase>_seconds/<contestant>` (of the batch's prefill; of one step of decode),
    `<phase>_seconds_iqr/<contestant>` (the distance between the quartiles) and
    `<phase>_peak_memory_bytes/<contestant>` (weights, cache and what `WorkingMemory` sees); and, as medians
    over turns, `<phase>_speedup`, seconds of `dense` over seconds of `pruned`, and `<phase>_speedup_default`,
    the same of both models' own ways. Which forward each ran is in the details. The text is that of the
    calibration, repeated where it does not suffice; both models read the same tokens.

    Args:
        prompt_length: tokens of a prompt, at least 1.
        new_tokens: steps of decode, at least 1.
        batch_size: sequences, at least 1.
        repeats: turns, at least 1.
    """

    name = "throughput"
    needs = frozenset({Need.DENSE_AND_PRUNED, Need.TOKENS, Need.MACHINE})

    def __init__(
        self,
        *,
        prompt_length: Annotated[int, Ge(1)],
        new_tokens: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(1)],
        repeats: Annotated[int, Ge(1)],
    ) -> None:
        self.sizes = {
            "prompt_length": prompt_length,
            "new_tokens": new_tokens,
            "batch_size": batch_size,
            "repeats": repeats,
        }
        self.length, self.new_tokens, self.batch_size, self.repeats = (
            prompt_length + new_tokens,
            new_tokens,
            batch_size,
            repeats,
        )

    def identity(self) -> dict[str, Any]:
        return {"evaluator": self.name, **self.sizes}

    def prepare(self, source: ModelSource) -> None:
        limit = source.max_sequence_length
        if limit is not None and self.length > limit:
            raise ConfigError(
                f"evaluation.throughput.prompt_length + new_tokens = {self.length} is above the {limit}"
                " tokens that the model takes; make one of them smaller"
            )

    @torch.no_grad()
    def __call__(self, material: Material) -> Evaluation:
        dense, pruned = material.dense_and_pruned()
        ids_NW = self._text(material).to(dense.device)
        contestants = _contestants(dense, pruned)
        # Warms up, too.
        peaks = {contestant.name: self._peaks(contestant, ids_NW) for contestant in contestants}
        seconds = self._turns(contestants, ids_NW)
        num_tokens = {"prefill": self.batch_size * (self.length - self.new_tokens), "decode": self.batch_size}
        metrics: Metrics = {}
        for phase in PHASES:
            of_phase = {
                name: torch.tensor(phases[phase], dtype=torch.float64) for name, phases in seconds.items()
            }
            metrics |= _timings(phase, num_tokens[phase], of_phase)
            metrics |= {f"{phase}_peak_memory_bytes/{name}": peak[phase] for name, peak in peaks.items()}
        details = {
            **self.identity(),
            "machine": machine(dense.device),
            **_protocol(contestants),
            "seconds": seconds,
        }
        return Evaluation(metrics, details)

    def _turns(self, contestants: Sequence[Contestant], ids_NW: Tensor) -> dict[str, dict[str, list[float]]]:
        """Seconds of each contestant's phases, of every turn: of the batch's prefill, and of one step of
        decode."""
        seconds: dict[str, dict[str, list[float]]] = {
            contestant.name: {phase: [] for phase in PHASES} for contestant in contestants
        }
        for turn in progress(range(self.repeats), total=self.repeats, description=self.name, unit="turn"):
            for contestant in contestants if turn % 2 == 0 else contestants[::-1]:
                prefill, decode = self._seconds(contestant, ids_NW)
                seconds[contestant.name]["prefill"].append(prefill)
                seconds[contestant.name]["decode"].append(decode)
        return seconds

    def _text(self, material: Material) -> Tensor:
        """(N, W) calibration tokens, from the start again where they do not suffice."""
        tokens_T = material.tokens().ids_NW.flatten()
        needed = self.batch_size * self.length
        return tokens_T.repeat(math.ceil(needed / len(tokens_T)))[:needed].view(self.batch_size, self.length)

    def _seconds(self, contestant: Contestant, ids_NW: Tensor) -> tuple[float, float]:
        """Of the prefill, and of one step of decode."""
        with contestant.forward():
            wait_for(ids_NW.device)
            times = [time.perf_counter()]
            for _ in self._run(contestant.model, ids_NW):
                wait_for(ids_NW.device)
                times.append(time.perf_counter())
        return times[1] - times[0], (times[2] - times[1]) / self.new_tokens

    def _peaks(self, contestant: Contestant, ids_NW: Tensor) -> dict[str, int]:
        """Peak bytes of each phase: the model's own weights and what is allocated while it works."""
        weights = sum(
            parameter.numel() * parameter.element_size() for parameter in contestant.model.model.parameters()
        )
        with contestant.forward(), WorkingMemory(ids_NW.device) as memory:
            peaks = [weights + memory.take_peak() for _ in self._run(contestant.model, ids_NW)]
        return dict(zip(PHASES, peaks, strict=True))

    def _run(self, model: MoEModel, ids_NW: Tensor) -> Iterator[None]:
        """Prefill, then decode; comes back after each."""
        prompt_NW, new_NW = ids_NW.split([self.length - self.new_tokens, self.new_tokens], dim=1)
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
    """Weights' dtype, and which forward of the experts each contestant ran: its name among transformers'
    implementations."""
    forwards: dict[str, Any] = {}
    for contestant in contestants:
        with contestant.forward():
            forwards[contestant.name] = contestant.model.model.get_experts_implementation()
    return {
        "dtype": str(contestants[0].model.model.dtype).removeprefix("torch."),
        "experts_forward": forwards,
    }


def _timings(phase: str, num_tokens: int, seconds: Mapping[str, Tensor]) -> Metrics:
    """Medians and quartile distances of each contestant's seconds for `num_tokens` tokens, and the speed-up
    turn by turn."""
    own_way = seconds.get("pruned_default", seconds["pruned"])
    metrics: Metrics = {
        f"{phase}_speedup": float((seconds["dense"] / seconds["pruned"]).quantile(0.5)),
        f"{phase}_speedup_default": float((seconds["dense_default"] / own_way).quantile(0.5)),
    }
    for name, turns in seconds.items():
        metrics[f"{phase}_tokens_per_second/{name}"] = float(num_tokens / turns.quantile(0.5))
        metrics[f"{phase}_seconds/{name}"] = float(turns.quantile(0.5))
        metrics[f"{phase}_seconds_iqr/{name}"] = float(turns.quantile(0.75) - turns.quantile(0.25))
    return metrics


def _read(model: MoEModel, ids_NW: Tensor, cache: Any = None) -> Any:
    """The cache after reading tokens and computing the logits of the next one."""
    outputs = model.body(input_ids=ids_NW, past_key_values=cache, use_cache=True)
    model.logits(outputs.last_hidden_state[:, -1])
    return outputs.past_key_values
