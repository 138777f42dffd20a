"""Dense and pruned models run the same arithmetic: a plan that keeps everything changes no bit of any
metric."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heapr.evaluation.fidelity import Fidelity
from heapr.evaluation.measurement import Measurement, measure
from heapr.evaluation.perplexity import Perplexity
from heapr.evaluation.truth import Truth
from heapr.evaluation.zero_shot import ZeroShot
from heapr.inputs import BUILTIN_FOLDER
from heapr.model.experts.dispatch import use_comparable_experts
from heapr.model.find_model import find_model
from heapr.model.loss import next_token_loss
from heapr.model.moe import MoEModel
from heapr.pruning.surgery import mask, remove
from heapr.text.corpora import TextFiles
from heapr.types import Plan
from tests.evaluation.material import material_of, of_model, only
from tests.evaluation.test_zero_shot import write_task
from tests.tiny import LAYOUTS, tiny_ids, tiny_model

TEXT = "A docstring says what a function takes, what it returns, and which errors it raises.\n" * 4
FORMS: dict[str, Callable[[MoEModel, Plan], None]] = {"ragged": remove, "masked": mask}


def everything(model: MoEModel) -> Plan:
    """The plan that keeps all."""
    return Plan(
        layers={
            layer.index: torch.ones(layer.num_experts, layer.width, dtype=torch.bool)
            for layer in model.layers
        }
    )


def kept_whole(model: MoEModel, form: str) -> MoEModel:
    """The model after surgery that removes nothing."""
    pruned = MoEModel(copy.deepcopy(model.model))
    FORMS[form](pruned, everything(model))
    return pruned


def losses(model: MoEModel, ids_NW: Tensor) -> Tensor:
    with torch.no_grad(), use_comparable_experts(model.model):
        return next_token_loss(model, model.hidden_states(input_ids=ids_NW), ids_NW)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3_moe_tiny", "deepseek_moe_tiny"])
def test_builtin_models_measure_the_same_to_the_last_bit(name: str, dtype: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    corpus = TextFiles([str(tmp_path / "text.txt")], split="all")
    source = find_model(str(BUILTIN_FOLDER / name), dtype=dtype)
    dense = source.load(torch.device("cpu"))
    zero_shot = ZeroShot("sums", include_path=str(write_task(tmp_path / "tasks")))
    # Few tokens of each expert.
    measurements: list[Measurement] = [
        Perplexity(corpus, window=8, batch_size=1),
        zero_shot,
    ]
    for measurement in measurements:
        measurement.prepare(source)
    expected = [measure(measurement, of_model(dense)) for measurement in measurements]
    assert not dense.is_ragged and dense.model.get_experts_implementation() != {"": "heapr"}, (
        "all is as it was"
    )
    for form in FORMS:
        pruned = kept_whole(dense, form)
        assert [measure(measurement, of_model(pruned)) for measurement in measurements] == expected, form
        fidelity = Fidelity(corpus, window=8, batch_size=1, max_windows=None)
        fidelity.prepare(source)
        assert fidelity(only(dense_and_pruned=(dense, pruned))).metrics == {
            "kl_to_dense/text_files": 0,
            "top1_agreement/text_files": 1,
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LAYOUTS)
def test_every_way_to_store_experts(family: str, dtype: torch.dtype) -> None:
    dense, ids_NW = MoEModel(tiny_model(family).to(dtype)), tiny_ids(2, 9)
    for form in FORMS:
        assert torch.equal(losses(kept_whole(dense, form), ids_NW), losses(dense, ids_NW)), form


def test_what_lies_unaligned_in_memory_is_no_difference() -> None:
    """As tensors lie that are mapped from a file of safetensors."""
    dense, ids_NW = MoEModel(tiny_model("qwen3_moe")), tiny_ids(2, 9)
    moved = MoEModel(copy.deepcopy(dense.model))
    for layer in moved.layers:
        for parameter in layer.experts.parameters():
            memory = torch.empty(parameter.numel() + 1)[1:].view_as(parameter)
            parameter.data = memory.copy_(parameter.data)
            assert parameter.data_ptr() % 64
    assert torch.equal(losses(moved, ids_NW), losses(dense, ids_NW))


def test_truth_is_measured_with_the_same_forward() -> None:
    """The dense model's mean loss is that of a model that keeps everything."""
    model = find_model(str(BUILTIN_FOLDER / "qwen3_moe_tiny"), dtype="bfloat16").load(torch.device("cpu"))
    material = material_of(model.model, tiny_ids(3, 12))
    whole = kept_whole(material.model(), "ragged")
    truth = Truth(num_groups=2, sample_size=1, max_sequences=None, seed=0, batch_size=2)
    expected = truth(dataclasses.replace(material, model=lambda: whole)).metrics
    assert truth(material).metrics == expected
