"""Repair: least squares, checked by hand, by torch's own solver on explicit matrices, and by what the layers
really put out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heapr.errors import ConfigError
from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import Experts, matrices_of
from heapr.model.experts.loop import run_experts
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.layerwise import walk_layers
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.stream import StreamTarget
from heapr.plugins import build
from heapr.pruning.activations import Activations, layer_output
from heapr.pruning.layer_repair import LayerRepair, Repair
from heapr.pruning.refit import refit_inputs
from heapr.pruning.repair import ExpertRepair, JointRepair
from heapr.pruning.surgery import mask, remove, remove_and_repair
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.types import Plan
from tests.same import assert_same_model
from tests.tiny import LAYOUTS, tiny_ids, tiny_model, tiny_qwen3_moe

REPAIRS: Sequence[Repair] = (
    ExpertRepair(), ExpertRepair(router_weighted=False), JointRepair(), JointRepair(direct_up_to=0), JointRepair(refits=1, refit_steps=3),
    JointRepair(target="residual_stream"),
)  # fmt: skip
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

    def error(self, experts: RaggedExperts) -> float:
        """What the layer's output loses, squared, per token, with these experts in place of the dense
        ones."""
        with torch.no_grad():
            lost_TD = run_experts(self.before, *vars(self.inputs).values()) - run_experts(
                experts, *vars(self.inputs).values()
            )
        return float(lost_TD.square().sum()) / len(lost_TD)

    def repaired(self, repair: Repair) -> tuple[RaggedExperts, LayerRepair]:
        experts = copy.deepcopy(self.after)
        with torch.no_grad():
            found = repair(self.before, experts, self.inputs)
        return experts, found


@pytest.fixture(autouse=True)
def normal_equations_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heapr.pruning.least_squares.ROWS", 5)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


def test_by_hand() -> None:
    """Two atomic experts, one of them removed. h = (1, 2) and (1, -1) for two tokens of weight 1, columns 3
    and 5: the loss is d = 5 * (2, -1), C = 1 + 1 = 2, B = 10 - 5 = 5, ridge = 0.5 * (1 + 1/2) * 2 = 1.5, so
    W' = 3 + 5 / 3.5."""
    experts = tiny_qwen3_moe(
        hidden_size=2, moe_intermediate_size=2, num_attention_heads=1, num_key_value_heads=1
    )
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
    with torch.no_grad():
        found = ExpertRepair(ridge=0.5)(before, layer.experts, inputs)
    torch.testing.assert_close(layer.experts.down_proj[:1].detach(), torch.tensor([[3 + 5 / 3.5, 0]]))
    assert found.error_before == pytest.approx((100 + 25) / 2) and found.num_repaired == 1
    assert found.error_after == pytest.approx(((10 - 5 / 3.5) ** 2 + (-5 - 5 / 3.5) ** 2) / 2)


def test_expert_repair_is_least_squares_of_each_expert(layer: Layer) -> None:
    """W_down C[:, S] C[S, S]^-1 (docs/method.md, 18) is what torch's solver finds for every expert's own
    output."""
    experts, _ = layer.repaired(ExpertRepair(ridge=TINY_RIDGE))
    z_TF, columns_FD = layer.z_dense(), layer.columns()
    expected = []
    for expert, kept_F in enumerate(layer.kept_EF):
        own = slice(8 * expert, 8 * expert + 8)
        expected.append(torch.linalg.lstsq(z_TF[:, own][:, kept_F], z_TF[:, own] @ columns_FD[own]).solution)
    torch.testing.assert_close(experts.down_proj.detach().double(), torch.cat(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "repair",
    [
        JointRepair(ridge=TINY_RIDGE),
        JointRepair(ridge=TINY_RIDGE, direct_up_to=0, max_steps=300, tolerance=1e-12),
    ],
)
def test_joint_repair_is_least_squares_of_the_layer(layer: Layer, repair: JointRepair) -> None:
    experts, _ = layer.repaired(repair)
    z_TS, columns_SD = layer.z_dense(), layer.columns()
    expected = torch.linalg.lstsq(z_TS[:, layer.kept_EF.flatten()], z_TS @ columns_SD).solution
    torch.testing.assert_close(experts.down_proj.detach().double(), expected, rtol=1e-3, atol=1e-3)


def test_both_ways_to_solve_agree_with_ridge(layer: Layer) -> None:
    direct, found = layer.repaired(JointRepair(ridge=0.1))
    blockwise, also_found = layer.repaired(
        JointRepair(ridge=0.1, direct_up_to=0, max_steps=100, tolerance=1e-12)
    )
    torch.testing.assert_close(blockwise.down_proj, direct.down_proj, rtol=1e-4, atol=1e-5)
    assert also_found.error_after == pytest.approx(found.error_after, rel=1e-5)


def test_more_steps_leave_less(layer: Layer) -> None:
    repairs = [
        JointRepair(ridge=TINY_RIDGE, direct_up_to=0, max_steps=number, tolerance=1e-12)
        for number in (1, 2, 4, 8)
    ]
    errors = [layer.repaired(repair)[1].error_after for repair in repairs]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]


class AlikeExperts(Layer):
    """Experts that put out nearly the same and are always chosen in pairs: what one lacks the other can make
    up for, which couples the equations of experts as much as can be. Ten turns of block coordinate descent
    are 1 to 5 % above the minimum here."""

    def __init__(self, alike: float) -> None:
        super().__init__()
        model = MoEModel(tiny_qwen3_moe())
        experts = model.layers[0].experts
        with torch.no_grad():
            experts.gate_up_proj.copy_(alike * experts.gate_up_proj[:1] + (1 - alike) * experts.gate_up_proj)
        self.before = copy.deepcopy(experts)
        remove(model, Plan(layers={0: self.kept_EF, 1: torch.ones(4, 8, dtype=torch.bool)}))
        self.after = model.layers[0].experts
        generator = torch.Generator().manual_seed(1)
        p_TK = torch.rand(400, 1, generator=generator).expand(400, 2).contiguous()
        self.inputs = replace(
            self.inputs, expert_TK=torch.tensor([[0, 1], [2, 3]]).repeat(200, 1), router_weight_TK=p_TK
        )

    def objective(self, experts: RaggedExperts, ridge: float) -> float:
        """What joint repair minimises, the slow way."""
        z_TS = self.z_dense()[:, self.kept_EF.flatten()]
        change_SD = experts.down_proj.detach().double() - self.after.down_proj.detach().double()
        return len(z_TS) * self.error(experts) + ridge * float(
            z_TS.square().sum(0).mean() * change_SD.square().sum()
        )


@pytest.mark.parametrize("alike", [0.0, 0.9, 0.98])
@pytest.mark.parametrize("ridge", [1e-2, 1e-4])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3])
def test_steps_end_within_the_tolerance_of_the_minimum(
    alike: float, ridge: float, tolerance: float, caplog: pytest.LogCaptureFixture
) -> None:
    layer = AlikeExperts(alike)
    least = layer.objective(layer.repaired(JointRepair(ridge=ridge))[0], ridge)
    found = layer.objective(
        layer.repaired(JointRepair(ridge=ridge, direct_up_to=0, tolerance=tolerance))[0], ridge
    )
    assert found <= least * (1 + tolerance / (1 - tolerance))
    assert not caplog.records


def test_a_bound_on_steps_that_is_hit_is_told(caplog: pytest.LogCaptureFixture) -> None:
    AlikeExperts(0.9).repaired(JointRepair(direct_up_to=0, max_steps=3))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "after max_steps=3 the error may be above its minimum by a share of 0.7" in record.message


def test_reported_errors_are_those_of_the_layer(layer: Layer) -> None:
    for repair in REPAIRS[2:]:
        experts, found = layer.repaired(repair)
        assert found.error_before == pytest.approx(layer.error(layer.after), rel=1e-4)
        assert found.error_after == pytest.approx(layer.error(experts), rel=1e-4)


def test_more_freedom_is_better(layer: Layer) -> None:
    """No repair, each expert alone, all together, together with W_gate and W_up, and these once more."""
    repairs = [ExpertRepair(), JointRepair(), JointRepair(refits=1), JointRepair(refits=2)]
    errors = [layer.error(layer.after)] + [layer.error(layer.repaired(repair)[0]) for repair in repairs]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 5


@pytest.mark.parametrize("repair", REPAIRS)
def test_an_expert_without_tokens_stays_as_it_is(repair: Repair) -> None:
    layer = Layer()
    layer.inputs.expert_TK[layer.inputs.expert_TK == 1] = 4  # "none"
    experts, found = layer.repaired(repair)
    for new, was in zip(list(matrices_of(experts))[1], list(matrices_of(layer.after))[1], strict=True):
        assert new is was is None or torch.equal(new, was)
    assert found.num_repaired == 3 and found.error_after < found.error_before


def test_an_expert_with_few_tokens_moves_less_per_token_than_one_with_many() -> None:
    """The same inputs once and a hundred times: plain ridge regression would give the same columns."""
    few, many = Layer(num_tokens=6), Layer(num_tokens=6)
    many.inputs = ExpertInputs(*(tensor.repeat(100, 1) for tensor in vars(few.inputs).values()))
    moved = [
        (layer.repaired(ExpertRepair(ridge=0.1))[0].down_proj - layer.after.down_proj).norm()
        for layer in (few, many)
    ]
    assert moved[0] < 0.9 * moved[1]


def test_weights_that_get_no_better_in_the_models_dtype_stay() -> None:
    """A ridge so large that the change vanishes in bfloat16."""
    layer = Layer()
    layer.before, layer.after = layer.before.bfloat16(), layer.after.bfloat16()
    layer.inputs = ExpertInputs(
        layer.inputs.hidden_TD.bfloat16(), layer.inputs.expert_TK, layer.inputs.router_weight_TK.bfloat16()
    )
    for repair in (ExpertRepair(ridge=1e9), JointRepair(ridge=1e9), JointRepair(ridge=1e9, refits=1)):
        experts, found = layer.repaired(repair)
        assert (
            all(map(torch.equal, experts.parameters(), layer.after.parameters())) and found.num_repaired == 0
        )
        assert found.error_after == found.error_before


def test_gauss_newton_step_is_least_squares_to_first_order() -> None:
    """The change of W_gate and W_up against torch's solver on the explicit derivative, by autograd."""
    layer, ridge = Layer(num_tokens=60), 0.03
    experts = copy.deepcopy(layer.after)
    old_RD = experts.gate_up_proj.detach().clone()

    def output(rows_RD: Tensor) -> Tensor:
        return torch.func.functional_call(
            experts, {"gate_up_proj": rows_RD}, tuple(vars(layer.inputs).values())
        )

    with torch.no_grad():
        lost_TD = layer_output(layer.before, layer.inputs) - layer_output(experts, layer.inputs)
        change_RD = torch.cat(
            refit_inputs(Activations(experts, layer.inputs), lost_TD, ridge=ridge, num_steps=200)
        )
    x_TD = layer.inputs.hidden_TD.double()
    jacobian = torch.autograd.functional.jacobian(output, old_RD).double()  # (T, D, R, D)
    scale_R = (jacobian.square().sum((1, 3)) / x_TD.square().sum(1, keepdim=True)).sum(0)
    moment_DD = x_TD.T @ x_TD / len(x_TD)
    moment_DD += ridge * moment_DD.diagonal().mean() * torch.eye(len(moment_DD))
    penalty = ridge * scale_R.mean() * torch.block_diag(*[moment_DD] * len(scale_R))
    jacobian_PQ = jacobian.flatten(2).flatten(0, 1)
    expected = torch.linalg.solve(
        jacobian_PQ.T @ jacobian_PQ + penalty, jacobian_PQ.T @ lost_TD.double().flatten()
    )
    torch.testing.assert_close(change_RD.double().flatten(), expected, rtol=1e-2, atol=2e-3)
    assert expected.abs().max() > 0.1


class Asked(ExpertRepair):
    """Counts how often it is asked to repair a layer."""

    num_layers = 0

    def __call__(
        self,
        before: Experts,
        after: RaggedExperts,
        inputs: ExpertInputs,
        *,
        target: StreamTarget | None = None,
        ranks: Ranks = ONE_PROCESS,
    ) -> LayerRepair:
        self.num_layers += 1
        return super().__call__(before, after, inputs, target=target, ranks=ranks)


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_layer_that_loses_nothing_is_not_asked_and_stays_as_it_is(family: str) -> None:
    model, cut = MoEModel(tiny_model(family)), MoEModel(tiny_model(family))
    first, *others = [layer.index for layer in model.layers]
    plan = Plan(layers={index: torch.ones(4, 8, dtype=torch.bool) for index in (first, *others)})
    for index in others:
        plan.layers[index][:, 5:] = False
    repair = Asked()
    found = remove_and_repair(model, plan, repair, [tiny_ids(num_sequences=2, length=10)])
    remove(cut, plan)
    assert repair.num_layers == len(others) and found[first] == LayerRepair(
        error_before=0.0, error_after=0.0, num_repaired=0
    )
    same = [
        all(map(torch.equal, *pair)) for pair in zip(parameters_of(model), parameters_of(cut), strict=True)
    ]
    assert same == [True] + [False] * len(others)


def parameters_of(model: MoEModel) -> list[list[Tensor]]:
    """Of each layer's experts."""
    return [list(layer.experts.parameters()) for layer in model.layers]


def plan_for(layers: Sequence[MoELayer]) -> Plan:
    generator = torch.Generator().manual_seed(1)
    return Plan(layers={layer.index: torch.rand(4, 8, generator=generator) > 0.5 for layer in layers})


def test_sequential_repair_knows_the_layers_before_and_parallel_does_not() -> None:
    ids_NW = tiny_ids(num_sequences=4, length=10)
    found, models = {}, {}
    for is_sequential in (True, False):
        models[is_sequential] = MoEModel(tiny_qwen3_moe())
        repair = JointRepair(sequential=is_sequential)
        found[is_sequential] = remove_and_repair(
            models[is_sequential], plan_for(models[is_sequential].layers), repair, [ids_NW]
        )
    columns = {
        key: [layer.experts.down_proj.detach() for layer in model.layers] for key, model in models.items()
    }
    assert torch.equal(columns[True][0], columns[False][0])  # nothing is before the first layer
    assert not torch.equal(columns[True][1], columns[False][1]) and found[True][1] != found[False][1]
    only_last = MoEModel(tiny_qwen3_moe())
    plan = Plan(layers={0: torch.ones(4, 8, dtype=torch.bool), 1: plan_for(only_last.layers).layers[1]})
    remove_and_repair(only_last, plan, JointRepair(), [ids_NW])
    # Measured in the model as it was.
    torch.testing.assert_close(only_last.layers[1].experts.down_proj.detach(), columns[False][1])


def test_residual_stream_as_target_makes_up_for_earlier_layers() -> None:
    """What is still missing in the stream behind the last layer is orthogonal to everything that its columns
    could change."""
    ids_NW, streams, models = tiny_ids(num_sequences=20, length=20), [], []
    for target in ("layer_output", "residual_stream", None):
        model = MoEModel(tiny_qwen3_moe())
        if target is not None:
            remove_and_repair(
                model, plan_for(model.layers), JointRepair(ridge=TINY_RIDGE, target=target), ids_NW.split(7)
            )
        hook = model.decoder_layers[-1].register_forward_hook(
            lambda *arguments: streams.append(arguments[-1].flatten(0, 1))
        )
        with torch.no_grad():
            model.body(input_ids=ids_NW, use_cache=False)
        hook.remove()
        models.append(model)
    own_TD, missing_TD = (
        (streams[2] - stream) / streams[2].square().mean(1, keepdim=True).sqrt() for stream in streams[:2]
    )
    assert missing_TD.square().sum() < own_TD.square().sum()
    _, (last, inputs, _) = walk_layers(models[1], [ids_NW])
    activations = Activations(last.experts, inputs.weighted(streams[2].square().mean(1).rsqrt()))
    for expert in range(4):
        z_nS, missing_nD = activations.z(expert).detach(), missing_TD[activations.tokens(expert)]
        assert (z_nS.T @ missing_nD).abs().max() < 1e-4 * z_nS.norm() * missing_nD.norm()


@pytest.mark.parametrize("whole", [0, 1])
def test_layers_that_lose_nothing_stay_as_they_are(whole: int) -> None:
    """Protected ones, for example; even behind a layer that lost something."""
    model, ids_NW = MoEModel(tiny_qwen3_moe()), tiny_ids(num_sequences=20, length=20)
    was = copy.deepcopy([layer.experts for layer in model.layers])
    plan = plan_for(model.layers)
    plan.layers[whole][:] = True
    found = remove_and_repair(model, plan, JointRepair(target="residual_stream", refits=1), [ids_NW])
    for new, old in zip(matrices_of(model.layers[whole].experts), matrices_of(was[whole]), strict=True):
        assert torch.equal(new.inputs_GD, old.inputs_GD) and torch.equal(new.down_DF, old.down_DF)
    assert found[whole].num_repaired == 0 < found[1 - whole].num_repaired


@pytest.mark.parametrize("repair", [JointRepair(), JointRepair(refits=1)])
def test_repaired_weights_make_the_same_model_again_and_a_masked_one(repair: Repair) -> None:
    ids_NW = tiny_ids(num_sequences=4, length=10)
    pruned, again, masked = (MoEModel(tiny_qwen3_moe()) for _ in range(3))
    plan = plan_for(pruned.layers)
    remove_and_repair(pruned, plan, repair, [ids_NW])
    repaired = {layer.index: dict(layer.experts.named_parameters()) for layer in pruned.layers}
    remove(again, plan, repaired)
    mask(masked, plan, repaired)
    expected = pruned.model(input_ids=ids_NW).logits
    assert_same_model(again.model, pruned.model, ids_NW)
    torch.testing.assert_close(masked.model(input_ids=ids_NW).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("ExpertRepair", {"ridge": 0.0}, "ridge=0.0 is not above 0; give a number above 0"),
        ("JointRepair", {"ridge": float("inf")}, "ridge=inf is not finite"),
        ("JointRepair", {"max_steps": 0}, "max_steps=0 is below 1; give a whole number of at least 1"),
        (
            "JointRepair",
            {"tolerance": 1.0},
            "tolerance=1.0 is not below 1; give a number above 0 and below 1",
        ),
        ("JointRepair", {"refits": -1}, "refits=-1 is below 0"),
        (
            "JointRepair",
            {"target": "stream"},
            "target=stream is unknown; give layer_output or residual_stream",
        ),
        (
            "JointRepair",
            {"target": "residual_stream", "sequential": False},
            "target=residual_stream needs pruning.repair.sequential=true",
        ),
    ],
)
def test_options_that_cannot_be(name: str, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"pruning.repair.{message}"):
        build({"_target_": f"heapr.pruning.repair.{name}", **option}, "pruning.repair")


def test_a_ridge_too_small_for_repeated_activations_is_said_so() -> None:
    """Two tokens and more kept atomic experts than that: singular without ridge."""
    layer = Layer(num_tokens=2)
    for repair in (
        ExpertRepair(ridge=1e-300),
        JointRepair(ridge=1e-300),
        JointRepair(ridge=1e-300, direct_up_to=0),
    ):
        with pytest.raises(ConfigError, match="pruning.repair.ridge is too small"):
            layer.repaired(repair)


def test_a_step_that_makes_it_worse_is_taken_back(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever direction comes out of the linear model, the true error decides."""
    uphill = [torch.full((2 * width, 16), 5.0) for width in layer.after.widths]
    monkeypatch.setattr("heapr.pruning.repair.refit_inputs", lambda *_, **__: uphill)
    experts, found = layer.repaired(JointRepair(refits=1))
    columns_alone, expected = layer.repaired(JointRepair())
    assert torch.equal(experts.gate_up_proj, layer.after.gate_up_proj)
    assert found.error_after <= expected.error_after < found.error_before
    assert layer.error(experts) <= layer.error(columns_alone) * (1 + 1e-6)


def test_a_step_that_is_too_long_is_halved(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the best step loses more than none, one and a half times less."""

    def stretched(factor: float) -> RaggedExperts:
        def stretch(*arguments: object, **options: object) -> list[Tensor]:
            return [factor * rows_GD for rows_GD in refit_inputs(*arguments, **options)]

        monkeypatch.setattr("heapr.pruning.repair.refit_inputs", stretch)
        return layer.repaired(JointRepair(refits=1))[0]

    too_long, half_of_it = stretched(3.0), stretched(1.5)
    assert not torch.equal(too_long.gate_up_proj, layer.after.gate_up_proj)
    torch.testing.assert_close(too_long.gate_up_proj, half_of_it.gate_up_proj)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize(("name", "value"), [("down_proj", float("nan")), ("gate_up_proj", 1e25)])
def test_the_layer_and_expert_that_are_not_finite_are_named(repair: Repair, name: str, value: float) -> None:
    """A weight that is NaN, and activations whose squares float32 cannot hold."""
    model = MoEModel(tiny_qwen3_moe())
    half_EF = (torch.arange(8) < 4).expand(4, 8)
    with torch.no_grad():
        model.layers[1].experts.get_parameter(name)[2] = value
    plan = Plan(layers={0: half_EF, 1: half_EF})
    with pytest.raises(FloatingPointError, match="layer 1, expert 2 are NaN or infinite"):
        remove_and_repair(model, plan, repair, [tiny_ids(num_sequences=4, length=12)])
