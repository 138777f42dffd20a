"""Time and memory of repair for one layer, by default of Qwen3-30B-A3B's shape: 128 experts x 768 atomic
experts, top-8, D = 2048.

Random weights in bfloat16, random inputs and routing, half of the atomic experts removed at random.

Run:  python benchmarks/repair.py --tokens 1024
Out:  for each way to repair: seconds, and the most memory that it held beside the layer's weights and inputs.
Seconds and the
      memory for residual and slopes grow with the tokens, that for the experts' blocks does not.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from heapr.measure import WorkingMemory, machine
from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import matrices_of
from heapr.model.experts.ragged import RaggedExperts
from heapr.pruning.layer_repair import Repair
from heapr.pruning.repair import ExpertRepair, JointRepair


def ways(num_steps: int) -> dict[str, Repair]:
    """Each way to repair, with so many steps of conjugate gradients."""
    steps: dict[str, Any] = {"direct_up_to": 0, "max_steps": num_steps, "tolerance": 1e-30}  # all of them
    return {
        "expert": ExpertRepair(),
        f"joint, {num_steps} steps": JointRepair(**steps),
        f"full: joint, 1 refit of {num_steps} steps": JointRepair(**steps, refits=1, refit_steps=num_steps),
    }


def build_layer(arguments: argparse.Namespace) -> tuple[Qwen3MoeExperts, RaggedExperts, ExpertInputs]:
    """Experts, what is left of them, and inputs."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=arguments.model_width,
        num_experts=arguments.experts,
        moe_intermediate_size=arguments.width,
        num_experts_per_tok=8,
    )
    dense = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    for parameter in dense.parameters():
        parameter.normal_(std=arguments.model_width**-0.5)
    half = arguments.width // 2
    ragged = RaggedExperts(dense, [half] * arguments.experts).requires_grad_(False)
    for left, matrices in zip(matrices_of(ragged), matrices_of(dense), strict=True):
        left.inputs_GD.copy_(
            torch.cat(
                [matrices.inputs_GD[:half], matrices.inputs_GD[arguments.width : arguments.width + half]]
            )
        )
        left.down_DF.copy_(matrices.down_DF[:, :half])
    expert_TK = torch.rand(arguments.tokens, arguments.experts).topk(8, dim=1).indices
    hidden_TD = torch.randn(arguments.tokens, arguments.model_width).to(torch.bfloat16)
    return (
        dense,
        ragged,
        ExpertInputs(hidden_TD, expert_TK, torch.rand(arguments.tokens, 8).softmax(dim=1).to(torch.bfloat16)),
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--model-width", type=int, default=2048)
    arguments = parser.parse_args()
    dense, ragged, inputs = build_layer(arguments)
    print(f"{vars(arguments)} {machine(torch.device('cpu'))}")
    for (name, repair), short in zip(ways(10).items(), ways(1).values(), strict=True):
        after = copy.deepcopy(ragged)
        started = time.perf_counter()
        found = repair(dense, after, inputs)
        seconds = time.perf_counter() - started
        # Once more, because counting takes time; one step needs as much as ten.
        with WorkingMemory(torch.device("cpu")) as memory:
            short(dense, copy.deepcopy(ragged), inputs)
            num_bytes = memory.take_peak()
        print(
            f"{name:35s} {seconds:8.1f} s   {num_bytes / 2**30:6.2f} GiB   error left"
            f" {found.error_after / found.error_before:.3f}"
        )


if __name__ == "__main__":
    main()
