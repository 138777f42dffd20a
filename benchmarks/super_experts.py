"""What becomes of perplexity if a super expert is removed on purpose, against every other expert.

Run:  python benchmarks/super_experts.py [--model builtin:qwen3_moe_tiny]
Out:  the super experts of a model, and the increase of perplexity on held-out docstrings when each expert of
      the model alone puts out zero: the super expert's, the others' median and largest, and its rank.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from heapr.calibration.collector import collect
from heapr.model.find_model import find_model
from heapr.model.loss import next_token_loss
from heapr.model.moe import MoEModel
from heapr.pruning.super_experts import describe_super_experts, find_super_experts
from heapr.text.corpora import PyDocs
from heapr.text.windows import batches, draw

LENGTH, NUM_CALIBRATION, NUM_MEASURED = 256, 64, 16  # tokens of a sequence, and numbers of sequences


def perplexity(model: MoEModel, ids: list[Tensor]) -> float:
    """Of next tokens, over all sequences."""
    losses = []
    with torch.no_grad():
        for ids_NW in ids:
            hidden = model.hidden_states(input_ids=ids_NW)
            losses.append(next_token_loss(model, hidden, ids_NW))
    return float(torch.cat(losses).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:qwen3_moe_tiny")
    source = find_model(parser.parse_args().model, dtype="float32")
    model = source.load(torch.device("cpu"))

    def text(split: str, number: int) -> list[Tensor]:
        drawn = draw(PyDocs(split=split), source.tokenizer, length=LENGTH, num_samples=number, seed=0)
        return list(batches(drawn, 8))

    layers = {layer.index: layer for layer in model.layers}
    statistics = collect(model, text("train", NUM_CALIBRATION))
    found = find_super_experts(statistics, lambda index: layers[index].down_abs_max())
    print(describe_super_experts(found))
    measured = text("heldout", NUM_MEASURED)
    dense = perplexity(model, measured)
    increases = {}
    for index, layer in layers.items():
        for expert in range(layer.num_experts):
            down = layer.experts.down_proj.data
            before = down[expert].clone()
            down[expert].zero_()
            increases[index, expert] = perplexity(model, measured) - dense
            down[expert].copy_(before)
    largest = found[0]
    own = increases.pop((largest.layer, largest.expert))
    others = torch.tensor(list(increases.values()))
    rank = 1 + int((others > own).sum())
    print(f"dense {dense:.2f}; without it {own:+.3f} (rank {rank} of {len(others) + 1})")
    print(
        f"without one other expert: median {float(others.median()):+.3f}, largest {float(others.max()):+.3f}"
    )


if __name__ == "__main__":
    main()
