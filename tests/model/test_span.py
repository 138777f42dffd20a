"""Spans of decoder layers and the tape that answers for the layers before; whole families:
test_families.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from heapr.calibration.collector import collect
from heapr.errors import ConfigError
from heapr.model.check_walk import check_walk
from heapr.model.layerwise import walk_layers
from heapr.model.moe import MoEModel
from heapr.model.span import advance, reads_of, run_rest, run_span
from heapr.model.tape import Tape, hidden_of, parts_of
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.oracle import streams_behind
from tests.tiny import SHARED_INSIDE, deep_model, tiny_ids

IDS_NW = tiny_ids(num_sequences=4, length=10)
# Blocks of 2: what layers 1 and 3 put out is read ever after.
INKLING2_READS = [
    [],
    [0],
    [1],
    [1, 2],
    [1, 3],
    [1, 3, 4],
    [1, 3, 5],
]


def deep(family: str, **changes: object) -> MoEModel:
    return MoEModel(deep_model(family, **changes))


def held(tape: Tape) -> list[int]:
    """Layers whose outputs the tape has not forgotten."""
    return [
        layer
        for layer, answer in enumerate(tape.answers(len(tape)))
        if any(isinstance(part, Tensor) for part in parts_of(answer))
    ]


def check(model: MoEModel, *, gradients: bool = True) -> None:
    check_walk(model, needed_by="pruning.repair", instead="pruning/repair=none", gradients=gradients)


def test_layers_whose_outputs_are_read_again_are_seen() -> None:
    assert list(map(sorted, reads_of(deep("inkling2")).of_layer)) == INKLING2_READS
    assert list(map(sorted, reads_of(deep("qwen3_moe")).of_layer)) == [[], [0], [1], [2], [3]]
    reads = reads_of(deep("inkling2"))
    assert reads.by(range(2, 4)) == {1} and reads.by(range(4, 6)) == {1, 3} and reads.by(range(6)) == set()


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "expected"), [("qwen3_moe", [[0], [1], [2], [3]]), ("inkling2", [[0], [1], [1, 2], [1, 3]])]
)
def test_the_tape_holds_what_later_layers_read(family: str, expected: list[list[int]]) -> None:
    model = deep(family)
    reads, tape = reads_of(model), Tape(IDS_NW)
    for layer, holds in enumerate(expected):
        advance(model, tape, layer + 1, reads)
        assert held(tape) == holds


@torch.no_grad()
def test_what_is_forgotten_cannot_be_read() -> None:
    model, tape = deep("inkling2"), Tape(IDS_NW)
    tape.put(run_span(model, IDS_NW, range(4), []))
    assert torch.equal(run_rest(model, IDS_NW, tape.answers(4)), model.hidden_states(input_ids=IDS_NW))
    tape.keep({3})
    with pytest.raises(AttributeError, match="that the tape has forgotten"):
        run_rest(model, IDS_NW, tape.answers(4))


@torch.no_grad()
def test_a_changed_layer_is_seen_by_all_that_read_it() -> None:
    model, changed = deep("inkling2"), deep("inkling2")
    remove(changed, Plan(layers={layer.index: torch.arange(8).repeat(4, 1) < 3 for layer in changed.layers}))
    expected = {layer.index: inputs for layer, inputs, _ in walk_layers(changed, [IDS_NW])}
    for (layer, inputs, _), replacement in zip(
        walk_layers(model, IDS_NW.split(3)), changed.layers, strict=True
    ):
        torch.testing.assert_close(inputs.hidden_TD, expected[layer.index].hidden_TD)
        layer.replace_experts(replacement.experts)
    reads, tape, streams = (
        reads_of(changed),
        Tape(IDS_NW),
        streams_behind(changed.body, changed.decoder_layers, IDS_NW),
    )
    for layer, stream_TD in enumerate(streams):
        torch.testing.assert_close(
            hidden_of(advance(model, tape, layer + 1, reads)[-1]).flatten(0, 1), stream_TD
        )


@pytest.mark.parametrize("family", SHARED_INSIDE)
def test_layers_that_share_inside_their_arguments_are_refused(family: str) -> None:
    model = deep(family, **SHARED_INSIDE[family])
    refusal = (
        "pruning.repair: .*ForCausalLM cannot be run layer by layer: layer 2 run alone raises KeyError.*;"
        " give pruning/repair=none"
    )
    with pytest.raises(ConfigError, match=refusal):
        check(model)
    assert collect(model, [IDS_NW]).num_tokens == IDS_NW.numel()  # one span over all layers is not concerned
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.decoder_layers)


class Keeps:
    """What layer 1 keeps inside for layer 2."""

    def __init__(self, model: MoEModel, *, by_batch: bool) -> None:
        self.kept: dict[object, Tensor] = {}
        self.batch: object = None
        if by_batch:
            model.model.get_input_embeddings().register_forward_pre_hook(self.see)
        model.decoder_layers[1].mlp.register_forward_hook(self.keep)
        model.decoder_layers[2].mlp.register_forward_hook(self.add)

    def see(self, _: nn.Module, args: tuple[Tensor]) -> None:
        self.batch = tuple(args[0].flatten().tolist())

    def keep(self, _: nn.Module, __: object, output: Tensor) -> None:
        self.kept[self.batch] = output

    def add(self, _: nn.Module, __: object, output: Tensor) -> Tensor:
        return output + self.kept[self.batch]


def test_a_layer_that_keeps_something_for_the_next_one_is_refused() -> None:
    model = deep("qwen3_moe")
    check(model)
    Keeps(model, by_batch=False)
    with pytest.raises(ConfigError, match="layer 2 run alone gives a different output"):
        check(model, gradients=False)


def test_a_gradient_that_is_lost_is_refused() -> None:
    model = deep("qwen3_moe")
    Keeps(model, by_batch=True)
    check(model, gradients=False)
    with pytest.raises(ConfigError, match="the gradient behind layer 0 differs"):
        check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4"])
def test_rounding_is_not_refused(family: str, dtype: torch.dtype) -> None:
    check(MoEModel(deep_model(family).to(dtype)))


def test_weights_that_are_not_numbers_are_left_to_calibration() -> None:
    model = deep("qwen3_moe")
    with torch.no_grad():
        model.layers[0].experts.down_proj[:] = torch.nan
    check(model)
