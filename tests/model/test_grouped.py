"""Grouped products give what the loop gives: outputs, gradients, statistics, of dense and of ragged experts."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from heapr.calibration.collector import LayerObserver
from heapr.model.checkpoint import save_checkpoint
from heapr.model.experts import grouped
from heapr.model.experts.dispatch import use_heapr_experts
from heapr.model.experts.grouped import Pairs, is_grouped, run_fastest, run_grouped
from heapr.model.experts.layout import Experts, matrices_of
from heapr.model.experts.loop import run_experts
from heapr.model.experts.packed import packed_bytes, width_buckets
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.moe import MoEModel
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.same import logits
from tests.tiny import tiny_ids, tiny_model, write_description

NUM_TOKENS, TOP_K = 40, 3
SERVED = ("qwen3_moe", "qwen2_moe", "deepseek", "aria", "nemotron_h")
RAGGED_WIDTHS = {"uneven": [70, 3, 0, 128, 64, 1], "one width": [128] * 6, "all empty": [0] * 6}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def qwen_experts(num_experts: int = 6, width: int = 128) -> Experts:
    """Their own initialization is empty memory."""
    config = Qwen3MoeConfig(hidden_size=32, num_experts=num_experts, moe_intermediate_size=width)
    experts = Qwen3MoeExperts(config).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=0.3)
    return experts


def ragged_experts(widths: list[int]) -> RaggedExperts:
    experts = RaggedExperts(qwen_experts(len(widths)), widths).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=0.3)
    return experts


def experts_of(family: str) -> Experts:
    return MoEModel(tiny_model(family)).layers[0].experts.requires_grad_(False)


def routed(experts: Experts, dtype: torch.dtype = torch.float32, model_width: int = 32) -> list[Tensor]:
    """Tokens and router weights that need a gradient, and experts, of which number 1 gets no token."""
    hidden_TD = torch.randn(NUM_TOKENS, model_width).to(dtype)
    chance_TE = torch.rand(NUM_TOKENS, experts.num_experts)
    chance_TE[:, 1] = 0
    expert_TK = chance_TE.topk(TOP_K, dim=1).indices
    p_TK = torch.rand(NUM_TOKENS, TOP_K).softmax(dim=1).to(dtype)
    return [hidden_TD.requires_grad_(), expert_TK, p_TK.requires_grad_()]


def outputs_and_gradients(run: object, experts: Experts, inputs: list[Tensor]) -> list[Tensor]:
    hidden_TD, expert_TK, p_TK = inputs
    output_TD = run(experts, hidden_TD, expert_TK, p_TK)
    if not output_TD.requires_grad:  # no expert has an atomic expert
        return [output_TD]
    weight_TD = torch.linspace(-1, 1, output_TD.numel()).view_as(output_TD).to(output_TD.dtype)
    grads = torch.autograd.grad(output_TD, [hidden_TD, p_TK], weight_TD)
    return [output_TD.detach(), *grads]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """By norms, in float64."""
    for one, other in zip(got, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        error = (one.double() - other.double()).norm()
        assert error <= tolerance * other.double().norm() + 1e-30, (error, other.norm())


class Seen:
    """An observer that keeps the rows of each expert, of both protocols."""

    def __init__(self, num_experts: int) -> None:
        self.of_expert: dict[int, dict[str, Tensor]] = {}
        self.num_experts = num_experts

    def __call__(self, h_SF: Tensor, router_weight_S: Tensor, output_SD: Tensor, offsets: Tensor) -> None:
        norm_S = torch.linalg.vector_norm(output_SD.detach(), dim=1, dtype=torch.float32)
        h_SF.register_hook(
            lambda grad_SF: self.add(
                Pairs(slice(None), offsets, h_SF.detach(), grad_SF, router_weight_S.detach(), norm_S)
            )
        )

    def add(self, pairs: Pairs) -> None:
        numbers = torch.arange(self.num_experts)[pairs.experts].tolist()
        for place, expert in enumerate(numbers):
            own = slice(int(pairs.offsets[place]), int(pairs.offsets[place + 1]))
            names = ("h_SF", "grad_SF", "router_weight_S", "output_norm_S")
            self.of_expert[expert] = {name: getattr(pairs, name)[own] for name in names}


@pytest.mark.parametrize("family", SERVED)
def test_every_layout_gives_what_the_loop_gives(family: str) -> None:
    experts = experts_of(family)
    inputs = routed(experts, model_width=16)
    assert is_grouped(experts, inputs[0])
    expected = outputs_and_gradients(run_experts, experts, inputs)
    assert_close(outputs_and_gradients(run_grouped, experts, inputs), expected, 1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_biases_and_weighed_inputs_are_left_to_the_loop(family: str) -> None:
    assert not is_grouped(experts_of(family), torch.randn(4, 16))


def test_what_grouped_products_cannot_do_is_left_to_the_loop() -> None:
    experts, hidden_TD = qwen_experts(), torch.randn(4, 32)
    assert is_grouped(experts, hidden_TD)
    assert not is_grouped(experts, hidden_TD.bfloat16()), "another dtype than the weights'"
    assert not is_grouped(experts, hidden_TD[:0]), "no tokens"
    assert not is_grouped(qwen_experts(width=6), hidden_TD), "rows of 24 bytes"
    assert not is_grouped(qwen_experts().double(), hidden_TD.double()), "a dtype that grouped_mm refuses"
    assert not is_grouped(copy.deepcopy(experts).requires_grad_(True), hidden_TD), "weights that train"
    experts.observer = lambda *_: None
    assert not is_grouped(experts, hidden_TD), "an observer that wants its tensors in the graph"


@pytest.mark.parametrize("broken", ["raises", "skips empty groups", "leaves nothing"])
def test_a_build_whose_products_are_wrong_is_found_out(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.nn.functional.grouped_mm

    def wrong(rows: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
        if broken == "raises":
            raise RuntimeError("strides")
        product = right(rows, matrices, offs=offs)
        return product.roll(5, dims=0) if broken == "skips empty groups" else product * float("nan")

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", wrong)
    assert not grouped.grouped_mm_works.__wrapped__("cpu", torch.float32)
    monkeypatch.undo()
    assert grouped.grouped_mm_works.__wrapped__("cpu", torch.bfloat16)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_outputs_and_gradients_equal_the_float64_loop(dtype: torch.dtype, tolerance: float) -> None:
    experts = qwen_experts().to(dtype)
    inputs = routed(experts, dtype)
    hidden_TD, expert_TK, p_TK = inputs
    wide = [hidden_TD.detach().double().requires_grad_(), expert_TK, p_TK.detach().double().requires_grad_()]
    expected = outputs_and_gradients(run_experts, copy.deepcopy(experts).double(), wide)
    got = outputs_and_gradients(run_grouped, experts, inputs)
    assert_close([tensor.double() for tensor in got], expected, tolerance)


def test_router_weights_in_float32_stay_so() -> None:
    experts = qwen_experts().bfloat16()
    hidden_TD, expert_TK, p_TK = routed(experts, torch.bfloat16)
    inputs = [hidden_TD, expert_TK, p_TK.detach().float().requires_grad_()]
    expected = outputs_and_gradients(run_experts, experts, inputs)
    assert_close(outputs_and_gradients(run_grouped, experts, inputs), expected, 1e-2)


@pytest.mark.parametrize("widths", [*RAGGED_WIDTHS.values(), None], ids=[*RAGGED_WIDTHS, "dense"])
def test_pairs_without_an_expert_count_for_nothing(
    widths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that grouped_mm leaves alone are poisoned."""
    experts = qwen_experts() if widths is None else ragged_experts(widths)
    inputs = routed(experts)
    inputs[1][::3, 0] = experts.num_experts
    inputs[1][:2] = experts.num_experts  # tokens without any expert
    expected = outputs_and_gradients(run_experts, experts, inputs)
    right = torch.nn.functional.grouped_mm

    def poisoned(rows: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
        product = right(rows, matrices, offs=offs)
        product[int(offs[-1]) :] = float("nan")
        return product

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned)
    assert_close(outputs_and_gradients(run_grouped, experts, inputs), expected, 1e-5)
    seen = experts.observer = Seen(experts.num_experts)
    run_grouped(experts, *inputs).sum().backward()
    assert sum(len(rows["h_SF"]) for rows in seen.of_expert.values()) == int((inputs[1] < 6).sum())
    assert all(rows["h_SF"].isfinite().all() for rows in seen.of_expert.values())


@pytest.mark.parametrize("widths", [RAGGED_WIDTHS["uneven"], None], ids=["ragged", "dense"])
def test_an_observer_sees_what_the_loop_shows(widths: list[int] | None) -> None:
    """Every expert's rows, those of width 0 included; a ragged expert's behind its own width are zero."""
    experts = qwen_experts() if widths is None else ragged_experts(widths)
    inputs = routed(experts)
    found = []
    for run in (run_experts, run_grouped):
        experts.observer = Seen(experts.num_experts)
        outputs_and_gradients(run, experts, inputs)
        found.append(experts.observer.of_expert)
    assert found[0].keys() == found[1].keys()
    for expert, expected in found[0].items():
        own = slice(None) if widths is None else slice(widths[expert])
        for name, rows in expected.items():
            got = found[1][expert][name]
            columns = own if name in {"h_SF", "grad_SF"} else slice(None)
            torch.testing.assert_close(got[..., columns], rows[..., columns], rtol=1e-4, atol=1e-6)
        behind = found[1][expert]["h_SF"][:, own.stop :] if own.stop is not None else torch.zeros(1)
        assert not behind.any()


@pytest.mark.parametrize("widths", RAGGED_WIDTHS.values(), ids=RAGGED_WIDTHS)
def test_ragged_experts_give_what_the_loop_gives(widths: list[int]) -> None:
    experts = ragged_experts(widths)
    inputs = routed(experts)
    assert is_grouped(experts, inputs[0])
    expected = outputs_and_gradients(run_experts, experts, inputs)
    assert_close(outputs_and_gradients(run_grouped, experts, inputs), expected, 1e-5)


def test_widths_are_rounded_up_to_a_few_buckets() -> None:
    assert width_buckets([70, 3, 0, 128, 64, 1]) == {128: [0, 3], 64: [1, 4, 5], 0: [2]}
    assert width_buckets([100, 104, 65]) == {104: [0, 1, 2]}, "not beyond the widest"
    assert width_buckets([100, 30]) == {128: [0], 64: [1]}, "unless its width is odd"
    assert len(width_buckets(range(1, 769))) == 12


def test_a_changed_weight_is_packed_anew() -> None:
    experts = ragged_experts(RAGGED_WIDTHS["uneven"])
    inputs = routed(experts)
    before = run_grouped(experts, *inputs)
    packed = experts.packed
    assert torch.equal(run_grouped(experts, *inputs), before) and experts.packed is packed
    experts.down_proj.mul_(2)
    torch.testing.assert_close(run_grouped(experts, *inputs), 2 * before)


def test_packing_costs_what_it_says() -> None:
    """Widths 70 and 128 take two rows of 128, 3, 64 and 1 take three of 64: 448 in place of 266."""
    own, copies = packed_bytes(ragged_experts(RAGGED_WIDTHS["uneven"]))
    assert (own, copies) == (266 * 3 * 32 * 4, 448 * 3 * 32 * 4)


def test_dense_experts_never_wait_for_the_device() -> None:
    """Fake tensors have no values that the host could read."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        config = Qwen3MoeConfig(hidden_size=32, num_experts=6, moe_intermediate_size=64)
        experts = Qwen3MoeExperts(config)
        for name, weight in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(weight.bfloat16(), requires_grad=False))
        experts.observer = Observed()
        hidden_TD, p_TK = (torch.zeros(9, size, dtype=torch.bfloat16, requires_grad=True) for size in (32, 2))
        expert_TK = torch.zeros(9, 2, dtype=torch.int64)
        run_grouped(experts, hidden_TD, expert_TK, p_TK).sum().backward()
        assert hidden_TD.grad.shape == (9, 32) and p_TK.grad.shape == (9, 2)
        with pytest.raises(RuntimeError):
            run_experts(experts, hidden_TD, expert_TK, p_TK)


class Observed(nn.Module):
    def add(self, pairs: Pairs) -> None:
        assert pairs.h_SF.shape == pairs.grad_SF.shape == (18, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("widths", [RAGGED_WIDTHS["uneven"], None], ids=["ragged", "dense"])
def test_a_gpu_gives_the_float64_loop(dtype: torch.dtype, tolerance: float, widths: list[int] | None) -> None:
    experts = (qwen_experts() if widths is None else ragged_experts(widths)).to("cuda", dtype)
    torch.seed()
    inputs = [tensor.detach().cuda() for tensor in routed(experts, dtype)]
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    expected = outputs_and_gradients_on_gpu(run_experts, copy.deepcopy(experts).double(), wide)
    got = outputs_and_gradients_on_gpu(run_grouped, experts, inputs)
    assert_close([tensor.double() for tensor in got], expected, tolerance)


def outputs_and_gradients_on_gpu(run: object, experts: Experts, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs]
    output_TD = run(experts, *leaves)
    weight_TD = torch.linspace(-1, 1, output_TD.numel(), device="cuda").view_as(output_TD)
    grads = torch.autograd.grad(output_TD, [leaves[0], leaves[2]], weight_TD.to(output_TD.dtype))
    return [output_TD.detach(), *grads]


def test_a_plan_that_keeps_everything_changes_no_bit() -> None:
    """As `use_comparable_experts` needs on a GPU: the same products, of matrices in the same layout."""
    dense = qwen_experts(width=72)
    ragged = RaggedExperts(dense, [72] * 6).requires_grad_(False).fill(matrices_of(dense))
    inputs = routed(dense)
    assert torch.equal(run_grouped(ragged, *inputs), run_grouped(dense, *inputs))


def test_packed_weights_are_freed_with_the_context() -> None:
    model = MoEModel(tiny_model("qwen3_moe"))
    kept_EF = torch.arange(8).expand(4, 8) < 5
    remove(model, Plan(layers={layer.index: kept_EF for layer in model.layers}))
    with torch.no_grad(), use_heapr_experts(model.model, run_grouped):
        logits(model.model, tiny_ids(1, 4))
        assert all(layer.experts.packed is not None for layer in model.layers)
    assert all(layer.experts.packed is None for layer in model.layers)


def test_a_checkpoint_brings_the_grouped_way_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files beside it are modules of their own, with classes of their own."""
    model = MoEModel(tiny_model("qwen3_moe"))
    original = write_description(tmp_path / "original", model.model)
    kept_EF = torch.arange(8).expand(4, 8) < torch.tensor([[3], [8], [0], [5]])
    remove(model, Plan(layers={layer.index: kept_EF for layer in model.layers}))
    save_checkpoint(model, original, tmp_path / "beside_checkpoint", about={})
    monkeypatch.syspath_prepend(tmp_path)
    ragged, beside = (import_module(f"beside_checkpoint.{name}") for name in ("ragged", "grouped"))
    ours = model.layers[0].experts.requires_grad_(False)
    theirs = ragged.RaggedExperts(ours, ours.widths).requires_grad_(False).fill(matrices_of(ours))
    inputs = routed(ours, model_width=16)
    assert beside.is_grouped(theirs, inputs[0]) and theirs.run is beside.run_fastest
    expected = outputs_and_gradients(run_experts, ours, inputs)
    assert_close(outputs_and_gradients(beside.run_grouped, theirs, inputs), expected, 1e-5)


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for() -> None:
    """By dense experts under observation, in bfloat16: other dtypes have a grouped_mm that waits."""
    layer = MoEModel(tiny_model("qwen3_moe").cuda().bfloat16().requires_grad_(False)).layers[0]
    hidden_TD, expert_TK, p_TK = (
        tensor.detach().cuda() for tensor in routed(layer.experts, torch.bfloat16, 16)
    )
    layer.experts.observer = LayerObserver(layer)
    for mode in ("default", "error"):  # the first round compiles the kernel
        torch.cuda.set_sync_debug_mode(mode)
        try:
            leaves = [hidden_TD.requires_grad_(), expert_TK, p_TK.requires_grad_()]
            run_fastest(layer.experts, *leaves).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert layer.experts.observer.sums["count_E"].sum() == 2 * expert_TK.numel()


@pytest.mark.parametrize(
    ("device", "is_served", "expected"),
    [("cpu", True, "loop"), ("cuda", False, "loop"), ("cuda", True, "grouped")],
)
def test_a_gpu_takes_grouped_products_where_they_serve(
    monkeypatch: pytest.MonkeyPatch, device: str, is_served: bool, expected: str
) -> None:
    monkeypatch.setattr(grouped, "is_grouped", lambda *_: is_served)
    monkeypatch.setattr(grouped, "run_experts", lambda *_: "loop")
    monkeypatch.setattr(grouped, "run_grouped", lambda *_: "grouped")
    tokens = SimpleNamespace(device=torch.device(device))
    assert run_fastest(None, tokens) == expected


@pytest.mark.parametrize("widths", [RAGGED_WIDTHS["uneven"], None], ids=["ragged", "dense"])
def test_inference_mode_changes_nothing(widths: list[int] | None) -> None:
    experts = qwen_experts() if widths is None else ragged_experts(widths)
    inputs = [tensor.detach() for tensor in routed(experts)]
    expected = run_grouped(experts, *inputs)
    experts.packed = None
    with torch.inference_mode():
        assert torch.equal(run_grouped(experts, *inputs), expected)
    leaves = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs]
    run_grouped(experts, *leaves).sum().backward()  # with what was packed in inference mode
    assert leaves[0].grad.isfinite().all()
