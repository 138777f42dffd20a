"""One process against two on the CPU, with one thread each: calibration and perplexity.

Run:  python benchmarks/ranks.py
Out:  for both, the speed-up (medians; one and two processes take turns), and the share of two processes' time
      that goes into adding up results, waiting for the slower process included. Then the bytes that a
      calibration adds up for the paper's models, from their shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics as descriptive
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from heapr.calibration.collector import collect
from heapr.model.loss import next_token_loss
from heapr.model.moe import MoEModel
from heapr.model.passes import final_hidden_states
from heapr.ranks import Ranks
from heapr.start_ranks import started_ranks
from heapr.types import LayerStatistics

# MoE layers, experts of a layer, atomic experts of an expert.
PAPER = {
    "DeepSeekMoE-16B": (27, 64, 1408),
    "Qwen1.5-MoE-A2.7B": (24, 60, 1408),
    "Qwen3-30B-A3B": (48, 128, 768),
    "Qwen2-57B-A14B": (28, 64, 2560),
}
PROCEDURES = ("calibrate", "perplexity")


def build_model() -> MoEModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return MoEModel(Qwen3MoeForCausalLM(config).eval())


class Reductions:
    """Counts the seconds that `Ranks` spend in adding up."""

    def __init__(self, ranks: Ranks) -> None:
        self.seconds = 0.0
        for name in ("sum", "maximum", "total", "in_order"):
            setattr(ranks, name, self._timed(getattr(ranks, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            found = function(*arguments)
            self.seconds += time.perf_counter() - started
            return found

        return run


@torch.no_grad()
def perplexity(model: MoEModel, batches: list[Tensor], ranks: Ranks) -> None:
    losses = []
    for ids_NW, hidden in final_hidden_states(model, ranks.share(batches)):
        losses.append(next_token_loss(model, hidden, ids_NW).double().mean(dim=1).tolist())
    ranks.in_order(losses)


def measure(repeats: int, num_batches: int) -> None:
    """What one process does; rank 0 prints the seconds of every turn."""
    with started_ranks() as ranks:
        model = build_model()
        generator = torch.Generator().manual_seed(0)
        batches = list(torch.randint(0, 4096, (2 * num_batches, 256), generator=generator).split(2))
        reductions = Reductions(ranks)
        procedures: dict[str, Callable[[], object]] = {
            "calibrate": lambda: collect(model, ranks.share(batches), ranks=ranks),
            "perplexity": lambda: perplexity(model, batches, ranks),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in procedures}
        # The first one of each warms up.
        for name, procedure in [*procedures.items()] * (repeats + 1):
            ranks.barrier()
            reductions.seconds, started = 0.0, time.perf_counter()
            procedure()
            found[name].append((time.perf_counter() - started, reductions.seconds))
        if ranks.is_first:
            print(json.dumps({name: turns[1:] for name, turns in found.items()}))


def run_apart(size: int, arguments: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Seconds, and those of adding up, in every turn of `size` processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in range(size):
        meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {name: str(value) for name, value in meeting.items()}
        command = [sys.executable, __file__, "--measure", *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    found: dict[str, list[tuple[float, float]]] = json.loads(outputs[0].splitlines()[-1])
    return found


def print_bytes() -> None:
    print("bytes that a calibration adds up, in float64:")
    for name, (num_layers, num_experts, width) in PAPER.items():
        layer = LayerStatistics.zeros(num_experts, width, torch.device("meta"))
        print(f"  {name:18} {num_layers * layer.num_bytes / 1e6:6.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="turns of one and of two processes")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.repeats, arguments.batches)
        return
    options = ["--repeats", str(arguments.repeats), "--batches", str(arguments.batches)]
    turns: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for size in (1, 2):
            for name, found in run_apart(size, options).items():
                turns.setdefault((name, size), []).extend(found)
    for name in PROCEDURES:
        one = descriptive.median(seconds for seconds, _ in turns[name, 1])
        two = descriptive.median(seconds for seconds, _ in turns[name, 2])
        share = descriptive.median(reducing / seconds for seconds, reducing in turns[name, 2])
        print(f"{name:10} one {one:6.2f} s, two {two:6.2f} s: {one / two:.2f} times; adding up {share:.1%}")
    print_bytes()


if __name__ == "__main__":
    main()
