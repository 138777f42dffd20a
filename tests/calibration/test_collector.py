"""The collector against slow oracles, and the equivalences that its statistics must have."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from heapr.calibration.collector import collect
from heapr.model.experts import dispatch, grouped
from heapr.model.experts.grouped import run_grouped
from heapr.model.moe import MoEModel
from heapr.model.passes import Way
from heapr.pruning.surgery import remove
from heapr.score.gradient import Heapr
from heapr.types import Plan, Statistics
from tests.oracle import published_scores, visits_of
from tests.same import assert_same_statistics
from tests.tiny import no_weights, tiny_ids, tiny_qwen3_moe


def test_heapr_score_equals_published_two_stage_procedure(causal_lm: PreTrainedModel, ids_NW: Tensor) -> None:
    """To 1e-5, and the same ranking; every family to 1e-4 in tests/model/test_families.py."""
    expected = published_scores(causal_lm, ids_NW)
    scores = Heapr()(collect(MoEModel(causal_lm), [ids_NW]), no_weights)
    for score_EF, expected_EF in zip(scores.layers.values(), expected, strict=True):
        assert ((score_EF - expected_EF).abs() <= 1e-5 * expected_EF.abs()).all()
    flat = torch.cat([s.flatten() for s in scores.layers.values()])
    assert (flat > 0).sum() > len(flat) / 2  # tokens were seen, by us and by the oracle
    flat_expected = torch.cat([s.flatten() for s in expected])
    assert torch.equal(flat.argsort(stable=True), flat_expected.argsort(stable=True))


def test_every_statistic_equals_its_definition(causal_lm: PreTrainedModel, ids_NW: Tensor) -> None:
    visits = visits_of(causal_lm, ids_NW)
    statistics = collect(MoEModel(causal_lm), [ids_NW])
    for layer_statistics, seen in zip(statistics.layers.values(), visits.values(), strict=True):
        for expert, list_of_visits in seen.items():
            h = torch.stack([v.h_F.detach() for v in list_of_visits]).double()
            g = torch.stack([v.h_F.grad for v in list_of_visits]).double()
            p = torch.stack([v.router_weight.detach() for v in list_of_visits]).double()
            norms = torch.stack([v.output_D.detach().norm() for v in list_of_visits]).double()
            expected = {
                "count_E": len(p), "router_weight_sum_E": p.sum(), "output_norm_sum_E": (p * norms).sum(),
                "h_sq_sum_EF": (h**2).sum(0), "g_sq_sum_EF": (g**2).sum(0), "gh_sq_sum_EF": ((g * h) ** 2).sum(0),
                "gh_sum_EF": (g * h).sum(0), "h_abs_sum_EF": h.abs().sum(0),
                "ph_sq_sum_EF": ((p[:, None] * h) ** 2).sum(0), "ph_abs_max_EF": (p[:, None] * h).abs().amax(0),
            }  # fmt: skip
            assert set(expected) == set(dict(layer_statistics.items()))
            for name, value in expected.items():
                got = getattr(layer_statistics, name)[expert]
                torch.testing.assert_close(
                    got, torch.as_tensor(value, dtype=torch.float64), rtol=1e-5, atol=1e-6
                )


def test_one_hook_for_each_layer_and_batch(
    model: MoEModel, ids_NW: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none for an expert, in a ragged model neither."""
    hooked: list[torch.Size] = []
    register = Tensor.register_hook
    monkeypatch.setattr(
        Tensor, "register_hook", lambda tensor, hook: hooked.append(tensor.shape) or register(tensor, hook)
    )
    pairs = torch.Size((2 * ids_NW[:4].numel(), 8))  # padded to the widest expert's width
    collect(model, ids_NW.split(4))
    kept_EF = torch.arange(8).expand(4, 8) < torch.tensor([[3], [8], [0], [5]])
    remove(model, Plan(layers={layer.index: kept_EF for layer in model.layers}))
    collect(model, ids_NW.split(4))
    assert hooked == [pairs] * len(model.layers) * 2 * 2


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_change_statistics_by_rounding_alone(
    model: MoEModel, ids_NW: Tensor, batch_size: int
) -> None:
    """Matrix products round otherwise for other shapes (docs/method.md, Statistics)."""
    assert_same_statistics(collect(model, ids_NW.split(batch_size)), collect(model, ids_NW.split(8)))


@pytest.mark.gpu
def test_a_gpu_gives_the_statistics_of_the_cpu(causal_lm: PreTrainedModel, ids_NW: Tensor) -> None:
    expected = collect(MoEModel(causal_lm), [ids_NW])
    got = Statistics.from_tensors(collect(MoEModel(causal_lm.cuda()), [ids_NW]).to_tensors())
    assert_same_statistics(got, expected, tolerance=1e-3)


def test_two_halves_merged_equal_the_whole(model: MoEModel, ids_NW: Tensor) -> None:
    halves = [collect(model, [half]) for half in ids_NW.split(4)]
    assert_same_statistics(halves[0].merge(halves[1]), collect(model, ids_NW.split(4)), tolerance=1e-12)


def test_capture_leaves_model_as_it_was(causal_lm: PreTrainedModel, ids_NW: Tensor) -> None:
    causal_lm.model.embed_tokens.weight.requires_grad_(False)
    needed = [p.requires_grad for p in causal_lm.parameters()]
    before = causal_lm(input_ids=ids_NW).logits
    implementation = causal_lm.get_experts_implementation()
    collect(MoEModel(causal_lm), [ids_NW])
    assert torch.equal(causal_lm(input_ids=ids_NW).logits, before)
    assert causal_lm.get_experts_implementation() == implementation
    assert [p.requires_grad for p in causal_lm.parameters()] == needed
    assert all(p.grad is None for p in causal_lm.parameters())


def test_unrouted_experts_are_counted_as_such() -> None:
    model = tiny_qwen3_moe()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[2] = 0.0
        model.model.layers[1].mlp.gate.weight[[0, 1]] *= 50
    statistics = collect(MoEModel(model), [tiny_ids(1, 3)])
    counts = statistics.layers[1].count_E
    assert counts.sum() == 3 * 2
    scores = Heapr()(statistics, no_weights).layers[1]
    assert (counts == 0).any()
    assert (scores[counts == 0] == -1).all()
    assert (scores[counts > 0] >= 0).all()


SPOILED = {
    "model.layers.0.mlp.gate.weight": "router_weight_sum_E of layer 0",
    "model.layers.0.mlp.experts.down_proj": "output_norm_sum_E of layer 0",
    "model.layers.1.mlp.experts.gate_up_proj": "h_abs_sum_EF of layer 1",
    "lm_head.weight": "the loss, behind the last layer,",
}


@pytest.mark.parametrize(("parameter", "place"), SPOILED.items())
def test_not_a_number_stops_and_names_layer_and_batch(
    causal_lm: PreTrainedModel, ids_NW: Tensor, parameter: str, place: str
) -> None:
    def batches() -> Iterator[Tensor]:
        yield ids_NW[:2]
        with torch.no_grad():
            causal_lm.get_parameter(parameter).fill_(float("nan"))
        yield ids_NW[2:4]

    with pytest.raises(FloatingPointError, match=f"{place}(, expert [0-9]+,|) is NaN or infinite in batch 1"):
        collect(MoEModel(causal_lm), batches())


def test_an_infinite_gradient_is_found_in_the_last_layer_it_reached(
    causal_lm: PreTrainedModel, ids_NW: Tensor
) -> None:
    model = MoEModel(causal_lm)
    causal_lm.model.norm.register_full_backward_hook(
        lambda module, grad_input, grad_output: (grad_input[0] * float("inf"),)
    )
    with pytest.raises(
        FloatingPointError, match="g_sq_sum_EF of layer 1, expert [0-9]+, is NaN or infinite in batch 0"
    ):
        collect(model, [ids_NW])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_have_the_scores_of_their_float32_copy(
    ids_NW: Tensor, dtype: torch.dtype
) -> None:
    low = tiny_qwen3_moe().to(dtype)
    scores = Heapr()(collect(MoEModel(low), [ids_NW]), no_weights).layers[0]
    reference = Heapr()(collect(MoEModel(copy.deepcopy(low).float()), [ids_NW]), no_weights).layers[0]
    correlation = torch.corrcoef(torch.stack([scores.flatten().log(), reference.flatten().log()]))[0, 1]
    assert correlation > 0.99


def test_mixed_dense_and_sparse_layers_keep_their_decoder_index() -> None:
    model = MoEModel(tiny_qwen3_moe(num_hidden_layers=3, mlp_only_layers=[1]))
    assert list(collect(model, [tiny_ids(2, 8)]).layers) == [0, 2]


SPANS = [range(1), range(1, 3), range(3, 4)]


@pytest.mark.parametrize("cut", [False, True])
def test_statistics_by_spans_are_those_of_one_pass(ids_NW: Tensor, cut: bool) -> None:
    """Bit for bit, of several batches and of a model that is cut already; every family in
    tests/model/test_families.py."""
    model = MoEModel(tiny_qwen3_moe(num_hidden_layers=4))
    if cut:
        remove(
            model,
            Plan(
                layers={layer.index: torch.arange(8).repeat(4, 1) < layer.index + 3 for layer in model.layers}
            ),
        )
    told: list[list[tuple[int, float]]] = [[], []]
    whole = collect(model, ids_NW.split(3), on_batch=lambda *batch: told[0].append(batch))
    parts = collect(model, ids_NW.split(3), way=Way(SPANS), on_batch=lambda *batch: told[1].append(batch))
    assert told[0] == told[1] and len(told[0]) == 3
    assert (whole.loss_sum, whole.num_tokens, whole.num_predicted_tokens) == (
        parts.loss_sum,
        parts.num_tokens,
        parts.num_predicted_tokens,
    )
    for index, layer in whole.layers.items():
        for name, tensor in layer.items():
            assert torch.equal(getattr(parts.layers[index], name), tensor), (index, name)


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("model.layers.1.mlp.experts.gate_up_proj", "the output of decoder layer 1"),
        ("model.layers.3.mlp.gate.weight", "router_weight_sum_E of layer 3"),
        ("lm_head.weight", "the loss, behind the last layer,"),
    ],
)
def test_not_a_number_by_spans_names_layer_and_batch(ids_NW: Tensor, parameter: str, place: str) -> None:
    causal_lm = tiny_qwen3_moe(num_hidden_layers=4)
    with torch.no_grad():
        causal_lm.get_parameter(parameter).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=f"{place}(, expert [0-9]+,|) is NaN or infinite in batch 0"):
        collect(MoEModel(causal_lm), ids_NW.split(4), way=Way(SPANS))


def test_batches_of_one_span_are_asked_for_one_by_one(ids_NW: Tensor) -> None:
    """So that a progress bar around them tells the truth."""
    told: list[str] = []

    def batches() -> Iterator[Tensor]:
        for ids in ids_NW.split(4):
            told.append("asked")
            yield ids

    collect(MoEModel(tiny_qwen3_moe()), batches(), on_batch=lambda *_: told.append("done"))
    assert told == ["asked", "done"] * 2


@pytest.mark.parametrize("kept", [None, [[3], [8], [0], [5]], [[8]] * 4], ids=["dense", "ragged", "all kept"])
def test_grouped_experts_give_the_statistics_of_the_loop(
    model: MoEModel, ids_NW: Tensor, monkeypatch: pytest.MonkeyPatch, kept: list[list[int]] | None
) -> None:
    if kept is not None:
        kept_EF = torch.arange(8).expand(4, 8) < torch.tensor(kept)
        remove(model, Plan(layers={layer.index: kept_EF for layer in model.layers}))
    expected = collect(model, ids_NW.split(4))
    monkeypatch.setattr(dispatch, "run_fastest", run_grouped)
    monkeypatch.setattr(grouped, "run_experts", None)
    assert_same_statistics(collect(model, ids_NW.split(4)), expected)
