"""The provider of models: how often a dense model is asked for, and which models it gives."""

from __future__ import annotations

import pytest
import torch

from heapr.errors import ConfigError, TooLargeError
from heapr.model.moe import MoEModel
from heapr.provider import ModelProvider
from heapr.pruning.layer_repair import Repair
from heapr.pruning.repair import ExpertRepair, JointRepair
from heapr.types import Plan, Pruning
from tests.tiny import SHARED_INSIDE, deep_model, tiny_qwen3_moe


class Loads:
    """Gives a dense model, and counts."""

    def __init__(self, most: int = 9) -> None:
        self.number, self._most = 0, most

    def __call__(self) -> MoEModel:
        self.number += 1
        if self.number > self._most:
            raise TooLargeError("no room")
        return MoEModel(tiny_qwen3_moe())


def pruning_of(num_kept: int) -> Pruning:
    kept_EF = torch.arange(8).expand(4, 8) < num_kept
    return Pruning(Plan({0: kept_EF, 1: kept_EF}))


def widths(model: MoEModel) -> set[int]:
    return {width for layer in model.layers for width in layer.widths}


def provider(load: Loads, form: str = "ragged") -> ModelProvider:
    return ModelProvider(load, repair=None, form=form, stock_settings={})


def test_nothing_is_loaded_before_a_model_is_asked_for_and_rounds_cut_the_same_one() -> None:
    load = Loads()
    models = provider(load)
    assert load.number == 0
    assert widths(models.dense()) == {8} and models.dense() is models.dense()
    assert widths(models.pruned(pruning_of(6))) == {6}
    assert widths(models.pruned(pruning_of(4))) == {4} and models.pruned(pruning_of(4)) is models.final(
        pruning_of(4)
    )
    assert load.number == 1
    assert widths(models.dense()) == {8} and load.number == 2


def test_both_are_two_loads_and_too_large_in_one_line() -> None:
    load = Loads()
    dense, pruned = provider(load).both(pruning_of(4))
    assert (widths(dense), widths(pruned), load.number) == ({8}, {4}, 2)
    with pytest.raises(TooLargeError, match="the dense and the pruned model do not fit on 'cpu' together"):
        provider(Loads(most=1)).both(pruning_of(4))


def test_the_masked_form_keeps_the_old_shape() -> None:
    load = Loads()
    model = provider(load, "masked").final(pruning_of(4))
    assert widths(model) == {8} and load.number == 1
    assert (
        not model.layers[0].experts.down_proj[:, :, 4:].any()
        and model.layers[0].experts.down_proj[:, :, :4].any()
    )


def repairing(repair: Repair | None, **changes: object) -> ModelProvider:
    return ModelProvider(
        lambda: MoEModel(deep_model("gemma4", **changes)), repair=repair, form="ragged", stock_settings={}
    )


def test_layers_that_cannot_be_run_one_by_one_are_refused_for_repair_alone() -> None:
    with pytest.raises(
        ConfigError,
        match="pruning.repair: Gemma4ForCausalLM cannot be run layer by layer: .*; give pruning/repair=none",
    ):
        repairing(ExpertRepair(), **SHARED_INSIDE["gemma4"]).dense()
    repairing(None, **SHARED_INSIDE["gemma4"]).dense()
    repairing(ExpertRepair()).dense()


def test_a_stream_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="pruning.repair.target=residual_stream: layer 0 of Gemma4ForCausalLM does not just add",
    ):
        repairing(JointRepair(target="residual_stream")).dense()
