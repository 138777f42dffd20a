"""Are scores in bfloat16 on this device those in float32 on the CPU?

In: both built-in models and docstrings of the running Python's standard library. Out: Spearman's correlation
of all scores, and the share of the lowest quarter that both have.
Shape letters: A atomic experts of a model, N sequences, W window.
"""

from __future__ import annotations

import sysconfig
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.rows import Row
from benchmarks.gpu.shapes import Shapes
from heapr.calibration.collector import collect
from heapr.evaluation.correlation import spearman
from heapr.model.find_model import find_model
from heapr.model.load import ModelSource
from heapr.score.gradient import Heapr
from heapr.text.docstrings import docstrings

WINDOW, NUM_DOCUMENTS = 256, 1000
MODELS = ("qwen3_moe_tiny", "deepseek_moe_tiny")


def measure(shapes: Shapes, device: torch.device) -> list[Row]:
    rows = []
    for name in MODELS:
        expected_A = _scores(name, "float32", torch.device("cpu"), shapes)
        found_A = _scores(name, "bfloat16", device, shapes)
        quarter = len(expected_A) // 4
        lowest, expected = (scores_A.argsort()[:quarter] for scores_A in (found_A, expected_A))
        overlap = float(torch.isin(lowest, expected).double().mean())
        rows.append(Row(f"scores: Spearman, {name}", spearman(found_A, expected_A) or 0.0, ""))
        rows.append(Row(f"scores: lowest quarter in common, {name}", overlap, ""))
    return rows


def _scores(name: str, dtype: str, device: torch.device, shapes: Shapes) -> Tensor:
    """HEAPr's score of every atomic expert (A,), float64, on the CPU."""
    source = find_model(f"builtin:{name}", dtype=dtype)
    model = source.load(device)
    ids_NW = _text(source, shapes)
    scores = Heapr()(collect(model, ids_NW.split(8)), lambda index: model.layers[0].weights())
    return torch.cat([score_EF.flatten().double().cpu() for score_EF in scores.layers.values()])


def _text(source: ModelSource, shapes: Shapes) -> Tensor:
    """Docstrings as windows of tokens (N, W)."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = "\n\n".join(islice(docstrings(stdlib), NUM_DOCUMENTS))
    tokens_T = torch.tensor(source.tokenizer(text, verbose=False)["input_ids"])
    num_windows = min(len(tokens_T) // WINDOW, shapes.num_sequences)
    return tokens_T[: num_windows * WINDOW].view(num_windows, WINDOW)
