"""Repair: least squares, checked by hand, by torch's own solver on explicit matrices, and by what the layers really put out."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heapr.errors import ConfigError
from heapr.model.layerwise import ExpertInputs
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.ragged_experts import RaggedExperts, run_experts
from heapr.pruning.repair import ExpertRepair, JointRepair, LayerRepair, Repair
from heapr.pruning.surgery import mask, remove, remove_and_repair
from heapr.types import Plan
from tests.tiny import LAYOUTS, tiny_ids, tiny_model, tiny_qwen3_moe

REPAIRS: Sequence[Repair] = (ExpertRepair(), ExpertRepair(router_weighted=False), JointRepair(), JointRepair(direct_up_to=0))
TINY_RIDGE = 1e-9


class Layer:
    """One layer of a tiny model, some of its atomic experts removed, with random inputs."""

    def __init__(self, num_tokens: int = 400, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        model = MoEModel(tiny_qwen3_moe())
        self.before = model.layers[0].experts
        self.kept_EF = torch.rand(4, 8, generator=generator) > 0.4
        pruned = MoEModel(copy.deepcopy(model.model))
        remove(pruned, Plan(layers={0: self.kept_EF, 1: torch.ones(4, 8, dtype=torch.bool)}))
        self.after = pruned.layers[0].experts
        self.inputs = ExpertInputs(
            hidden_TD=torch.randn(num_tokens, 16, generator=generator),
            expert_TK=torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(num_tokens)]),
            router_weight_TK=torch.rand(num_tokens, 2, generator=generator),
        )

    def z_dense(self) -> Tensor:
        """p h of all atomic experts of the layer (T, E * F), the slow way, float64."""
        z_TEF = torch.zeros(len(self.inputs.hidden_TD), 4, 8, dtype=torch.float64)
        for token, (hidden_D, expert_K, p_K) in enumerate(zip(*vars(self.inputs).values(), strict=True)):
            for expert, p in zip(expert_K.tolist(), p_K.tolist(), strict=True):
                gate_F, up_F = F.linear(hidden_D, self.before.gate_up_proj[expert]).chunk(2)
                z_TEF[token, expert] = p * (F.silu(gate_F) * up_F).double()
        return z_TEF.flatten(1)

    def columns(self) -> Tensor:
        """All columns w_k as rows (E * F, D), float64."""
        return self.before.down_proj.detach().double().transpose(1, 2).flatten(0, 1)

    def error(self, down_SD: Tensor) -> float:
        """What the layer's output loses, squared, per token, with these columns."""
        repaired: RaggedExperts = copy.deepcopy(self.after)
        with torch.no_grad():
            repaired.down_proj.copy_(down_SD)
            lost_TD = run_experts(self.before, *vars(self.inputs).values()) - run_experts(repaired, *vars(self.inputs).values())
        return float(lost_TD.square().sum()) / len(lost_TD)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


def test_by_hand() -> None:
    """Two atomic experts, one of them removed. h = (1, 2) and (1, -1) for two tokens of weight 1, columns 3 and 5: the loss is
    d = 5 * (2, -1), C = 1 + 1 = 2, B = 10 - 5 = 5, ridge = 0.5 * (1 + 1/2) * 2 = 1.5, so W' = 3 + 5 / 3.5."""
    experts = tiny_qwen3_moe(hidden_size=2, moe_intermediate_size=2, num_attention_heads=1, num_key_value_heads=1)
    model = MoEModel(experts)
    layer = model.layers[0]
    with torch.no_grad():  # a gate so large that silu is the identity times it
        layer.experts.gate_up_proj.zero_()
        layer.experts.gate_up_proj[0] = torch.tensor([[50.0, 0], [50, 0], [0.02, 0], [0, 0.02]])
        layer.experts.down_proj.zero_()
        layer.experts.down_proj[0] = torch.tensor([[3.0, 5], [0, 0]])
    inputs = ExpertInputs(torch.tensor([[1.0, 2], [1, -1]]), torch.tensor([[0], [0]]), torch.ones(2, 1))
    kept_EF = torch.zeros(4, 2, dtype=torch.bool)
    kept_EF[0, 0] = True
    before = layer.experts
    remove(model, Plan(layers={0: kept_EF, 1: torch.ones(4, 2, dtype=torch.bool)}))
    found = ExpertRepair(ridge=0.5)(before, layer.experts, inputs)
    torch.testing.assert_close(found.down_SD, torch.tensor([[3 + 5 / 3.5, 0]]))
    assert found.error_before == pytest.approx((100 + 25) / 2) and found.num_repaired == 1
    assert found.error_after == pytest.approx(((10 - 5 / 3.5) ** 2 + (-5 - 5 / 3.5) ** 2) / 2)


def test_expert_repair_is_least_squares_of_each_expert(layer: Layer) -> None:
    """W_down C[:, S] C[S, S]^-1 (docs/method.md, 7) is what torch's solver finds for every expert's own output."""
    found = ExpertRepair(ridge=TINY_RIDGE)(layer.before, layer.after, layer.inputs)
    z_TF, columns_FD = layer.z_dense(), layer.columns()
    expected = []
    for expert, kept_F in enumerate(layer.kept_EF):
        own = slice(8 * expert, 8 * expert + 8)
        expected.append(torch.linalg.lstsq(z_TF[:, own][:, kept_F], z_TF[:, own] @ columns_FD[own]).solution)
    torch.testing.assert_close(found.down_SD.double(), torch.cat(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("repair", [JointRepair(ridge=TINY_RIDGE), JointRepair(ridge=TINY_RIDGE, direct_up_to=0, num_sweeps=300)])
def test_joint_repair_is_least_squares_of_the_layer(layer: Layer, repair: JointRepair) -> None:
    found = repair(layer.before, layer.after, layer.inputs)
    z_TS, columns_SD = layer.z_dense(), layer.columns()
    expected = torch.linalg.lstsq(z_TS[:, layer.kept_EF.flatten()], z_TS @ columns_SD).solution
    torch.testing.assert_close(found.down_SD.double(), expected, rtol=1e-3, atol=1e-3)


def test_both_ways_to_solve_agree_with_ridge(layer: Layer) -> None:
    direct = JointRepair(ridge=0.1)(layer.before, layer.after, layer.inputs)
    blockwise = JointRepair(ridge=0.1, direct_up_to=0, num_sweeps=100)(layer.before, layer.after, layer.inputs)
    torch.testing.assert_close(blockwise.down_SD, direct.down_SD, rtol=1e-4, atol=1e-5)
    assert blockwise.error_after == pytest.approx(direct.error_after, rel=1e-5)


def test_every_sweep_lowers_what_is_minimised(layer: Layer) -> None:
    errors = [
        JointRepair(ridge=TINY_RIDGE, direct_up_to=0, num_sweeps=n)(layer.before, layer.after, layer.inputs).error_after
        for n in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]


def test_reported_errors_are_those_of_the_layer(layer: Layer) -> None:
    for repair in (JointRepair(), JointRepair(direct_up_to=0)):
        found = repair(layer.before, layer.after, layer.inputs)
        assert found.error_before == pytest.approx(layer.error(layer.after.down_proj.detach()), rel=1e-4)
        assert found.error_after == pytest.approx(layer.error(found.down_SD), rel=1e-4)


def test_together_is_better_than_each_alone(layer: Layer) -> None:
    alone = ExpertRepair()(layer.before, layer.after, layer.inputs)
    together = JointRepair()(layer.before, layer.after, layer.inputs)
    assert layer.error(together.down_SD) < layer.error(alone.down_SD) < layer.error(layer.after.down_proj.detach())


def columns_of(layer: Layer, found: LayerRepair, expert: int) -> Tensor:
    return found.down_SD.split(layer.after.widths)[expert]


@pytest.mark.parametrize("repair", REPAIRS)
def test_an_expert_without_tokens_stays_as_it_is(repair: Repair) -> None:
    layer = Layer()
    layer.inputs.expert_TK[layer.inputs.expert_TK == 1] = 4  # "none"
    found = repair(layer.before, layer.after, layer.inputs)
    assert torch.equal(columns_of(layer, found, 1), layer.after.down_proj.detach().split(layer.after.widths)[1])
    assert found.num_repaired == 3 and found.error_after < found.error_before


def test_an_expert_with_few_tokens_moves_less_per_token_than_one_with_many() -> None:
    """The same inputs once and a hundred times: plain ridge regression would give the same columns."""
    few, many = Layer(num_tokens=6), Layer(num_tokens=6)
    many.inputs = ExpertInputs(*(tensor.repeat(100, 1) for tensor in vars(few.inputs).values()))
    moved = [
        (ExpertRepair(ridge=0.1)(layer.before, layer.after, layer.inputs).down_SD - layer.after.down_proj).norm() for layer in (few, many)
    ]
    assert moved[0] < 0.9 * moved[1]


def test_columns_that_get_no_better_in_the_models_dtype_stay(layer: Layer) -> None:
    """A ridge so large that the change vanishes in bfloat16."""
    half_before, half_after = copy.deepcopy(layer.before).bfloat16(), copy.deepcopy(layer.after).bfloat16()
    inputs = ExpertInputs(layer.inputs.hidden_TD.bfloat16(), layer.inputs.expert_TK, layer.inputs.router_weight_TK.bfloat16())
    for repair in (ExpertRepair(ridge=1e9), JointRepair(ridge=1e9)):
        found = repair(half_before, half_after, inputs)
        assert torch.equal(found.down_SD, half_after.down_proj) and found.num_repaired == 0
        assert found.error_after == found.error_before


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("repair", REPAIRS)
def test_nothing_removed_nothing_repaired(family: str, repair: Repair) -> None:
    model = MoEModel(tiny_model(family))
    ids_NW = tiny_ids(num_sequences=2, length=10)
    expected = model.model(input_ids=ids_NW).logits
    plan = Plan(layers={layer.index: torch.ones(4, 8, dtype=torch.bool) for layer in model.layers})
    found = remove_and_repair(model, plan, repair, [ids_NW])
    assert all(layer.error_before < 1e-9 for layer in found.values())  # not zero where a layout multiplies in another order
    torch.testing.assert_close(model.model(input_ids=ids_NW).logits, expected, rtol=1e-5, atol=1e-5)


def plan_for(layers: Sequence[MoELayer]) -> Plan:
    generator = torch.Generator().manual_seed(1)
    return Plan(layers={layer.index: torch.rand(4, 8, generator=generator) > 0.5 for layer in layers})


def test_sequential_repair_knows_the_layers_before_and_parallel_does_not() -> None:
    ids_NW = tiny_ids(num_sequences=4, length=10)
    found, models = {}, {}
    for is_sequential in (True, False):
        models[is_sequential] = MoEModel(tiny_qwen3_moe())
        repair = JointRepair(sequential=is_sequential)
        found[is_sequential] = remove_and_repair(models[is_sequential], plan_for(models[is_sequential].layers), repair, [ids_NW])
    assert torch.equal(found[True][0].down_SD, found[False][0].down_SD)  # nothing is before the first layer
    assert not torch.equal(found[True][1].down_SD, found[False][1].down_SD)
    only_last = MoEModel(tiny_qwen3_moe())
    plan = Plan(layers={0: torch.ones(4, 8, dtype=torch.bool), 1: plan_for(only_last.layers).layers[1]})
    alone = remove_and_repair(only_last, plan, JointRepair(), [ids_NW])
    torch.testing.assert_close(alone[1].down_SD, found[False][1].down_SD)  # measured in the model as it was
    for is_sequential, model in models.items():
        again = MoEModel(tiny_qwen3_moe())
        remove(again, plan_for(again.layers), {index: layer.down_SD for index, layer in found[is_sequential].items()})
        assert torch.equal(again.model(input_ids=ids_NW).logits, model.model(input_ids=ids_NW).logits)


def test_repaired_masked_model_is_the_repaired_pruned_one() -> None:
    ids_NW = tiny_ids(num_sequences=4, length=10)
    pruned, masked = MoEModel(tiny_qwen3_moe()), MoEModel(tiny_qwen3_moe())
    plan = plan_for(pruned.layers)
    found = remove_and_repair(pruned, plan, JointRepair(), [ids_NW])
    mask(masked, plan, {index: layer.down_SD for index, layer in found.items()})
    torch.testing.assert_close(masked.model(input_ids=ids_NW).logits, pruned.model(input_ids=ids_NW).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: ExpertRepair(ridge=0.0), lambda: JointRepair(ridge=-1.0), lambda: JointRepair(num_sweeps=0)])
def test_values_out_of_range(make: object) -> None:
    with pytest.raises(ConfigError, match="give "):
        make()  # type: ignore[operator]
