"""What every family must do, one class each: the contract between heapr and transformers' Mixture-of-Experts
models."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import heapr
from heapr.calibration.collector import collect
from heapr.errors import ConfigError
from heapr.model.check_walk import check_walk
from heapr.model.checkpoint import save_checkpoint
from heapr.model.experts.dispatch import observe_experts, use_heapr_experts
from heapr.model.experts.layout import Experts
from heapr.model.experts.loop import run_experts
from heapr.model.find_model import find_model
from heapr.model.layerwise import walk_layers
from heapr.model.load import ModelSource
from heapr.model.model_files import read_headers
from heapr.model.moe import MoEModel, experts_per_token
from heapr.model.passes import Way, final_hidden_states
from heapr.model.shard_writer import write_weights
from heapr.model.shelf import Files
from heapr.model.span import advance, reads_of
from heapr.model.stream import check_stream
from heapr.model.tape import Tape, hidden_of
from heapr.model.tensors import check_tensors
from heapr.pruning.repair import ExpertRepair, JointRepair
from heapr.pruning.surgery import mask, remove, remove_and_repair
from heapr.pruning.uniform import make_uniform, uniform_settings
from heapr.score.gradient import Heapr
from heapr.types import Plan
from tests.oracle import published_scores, streams_behind
from tests.same import assert_same_files, assert_same_model, assert_same_statistics, logits
from tests.tiny import FAMILIES, deep_model, no_weights, tiny_ids, tiny_model, write_description

IDS_NW = tiny_ids(num_sequences=2, length=10)
CPU = torch.device("cpu")
NO_UNIFORM = {  # families whose configuration has no field that is the routed experts' width alone
    "deepseek_v4", "hunyuan_v1_moe", "inkling", "llama4",
}  # fmt: skip
NOT_JUST_ADDED = {  # families that normalise or mix the experts' output before the residual stream gets it, or have several streams
    "afmoe", "axk1", "beam", "deepseek_v4", "flex_olmo", "gemma4", "hy_v4", "inkling", "inkling2", "kolibri1", "llama4", "qwen4_exp",
}  # fmt: skip
ROUNDS_OTHERWISE = {  # by spans, in the last bits: attention has another kernel where autograd records; gradients of several readers
    "inkling", "inkling2",
}  # fmt: skip
STRIDED = {
    "jamba"
}  # hidden states are strided in memory, not in files, and products of them round differently
# By what families multiply the experts' output when they add it, if not 1.
SCALES = {
    "cohere2_moe": 0.5,
    "minimax_m3_vl": 2.0,
}


def random_plan(model: MoEModel, width: int | None = None) -> Plan:
    """Individual widths with one expert emptied, or the same width everywhere."""
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for layer in model.layers:
        random_EF = torch.rand(layer.num_experts, layer.width, generator=generator)
        layers[layer.index] = random_EF > 0.4 if width is None else random_EF.argsort(dim=1) < width
    if width is None:
        layers[model.layers[0].index][0] = False
    return Plan(layers=layers)


@torch.no_grad()
def plain_pass(model: MoEModel, ids_NW: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Hidden states behind every decoder layer, and by decoder layer index the rows that flow into
    experts."""
    seen: dict[nn.Module, Tensor] = {}

    def run(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
        # Llama-4's rows are zero if not routed.
        seen[experts] = hidden_TD if routing else hidden_TD[hidden_TD.any(dim=1)]
        return run_experts(experts, hidden_TD, *routing)

    with use_heapr_experts(model.model, run):
        streams = streams_behind(model.body, model.decoder_layers, ids_NW)
    return streams, {layer.index: seen[layer.experts] for layer in model.layers}


def check_streamed(family: str, deep: MoEModel, source: ModelSource, folder: Path) -> None:
    """One layer at a time from the files: weights, statistics, repair, what is measured and what is
    written."""
    streamed = source.stream(CPU, tapes=folder)
    for index, layer in enumerate(deep.decoder_layers):
        with streamed.hold([index]):
            read = streamed.decoder_layers[index]
            tensors = [*read.named_parameters(), *read.named_buffers()]
            expected = dict([*layer.named_parameters(), *layer.named_buffers()])
            assert len(tensors) == len(expected)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors)
    batches = IDS_NW.split(1)
    tolerance = 1e-5 if family in ROUNDS_OTHERWISE else 0
    way = Way(streamed.spans, Files(folder / "calibration", about={}))
    assert_same_statistics(collect(streamed, batches, way=way), collect(deep, batches), tolerance)
    repair, plan = ExpertRepair(), random_plan(deep)
    repaired = MoEModel(copy.deepcopy(deep.model))
    for model in (streamed, repaired):
        remove_and_repair(model, plan, repair, batches)
    for (_, found), (_, wanted) in zip(
        final_hidden_states(streamed, batches), final_hidden_states(repaired, batches), strict=True
    ):
        rounding = 1e-5 if family in ROUNDS_OTHERWISE | STRIDED else 0
        torch.testing.assert_close(found, wanted, rtol=10 * rounding, atol=rounding)
    assert all(parameter.is_meta for layer in streamed.decoder_layers for parameter in layer.parameters())


def check_streamed_checkpoint(source: ModelSource, folder: Path) -> None:
    """Byte by byte, in several files, under the names of the family's published checkpoints."""
    for name, model in (
        ("streamed", source.stream(CPU, read_ahead=True)),
        ("in_memory", source.load(CPU)),
    ):
        mask(model, random_plan(model))
        (folder / name).mkdir()
        write_weights(model, folder / name, max_shard_size="20KB", by_family=True)
    assert_same_files(folder / "streamed", folder / "in_memory")


def source_of(model: MoEModel, folder: Path) -> ModelSource:
    """Save a model, and find it again."""
    folder.mkdir(exist_ok=True)
    write_description(folder, model.model)
    model.model.save_pretrained(folder)
    return find_model(str(folder), dtype="float32")


class FamilyContract:
    """Abstract: a subclass names its family."""

    family: ClassVar[str]

    @pytest.fixture(scope="class")
    def dense(self) -> PreTrainedModel:
        return tiny_model(self.family)

    @pytest.fixture(scope="class")
    def original(self, dense: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_description(tmp_path_factory.mktemp("original"), dense)

    @pytest.fixture(scope="class")
    def deep(self) -> MoEModel:
        return MoEModel(deep_model(self.family))

    @pytest.fixture(scope="class")
    def deep_source(self, deep: MoEModel, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
        return source_of(deep, tmp_path_factory.mktemp("deep"))

    @pytest.fixture
    def model(self, dense: PreTrainedModel) -> MoEModel:
        return MoEModel(copy.deepcopy(dense))

    def test_capture_leaves_logits_unchanged(self, model: MoEModel) -> None:
        model.model.set_experts_implementation("eager")
        expected = logits(model.model, IDS_NW)
        seen: list[Tensor] = []
        watched = [(layer.experts, lambda *call: seen.append(call[-1].diff())) for layer in model.layers]
        with observe_experts(model.model, watched):
            observed = logits(model.model, IDS_NW)
        torch.testing.assert_close(observed, expected, rtol=2e-6, atol=2e-6)
        assert torch.equal(logits(model.model, IDS_NW), expected) and len(seen) == len(model.layers)
        assert all(count_E.shape == (4,) and count_E.sum() > 0 for count_E in seen)
        model.check_head()

    def test_heapr_score_equals_the_oracle(self, model: MoEModel) -> None:
        scores = Heapr()(collect(model, [IDS_NW]), no_weights)
        expected = published_scores(model.model, IDS_NW)
        for score_EF, expected_EF in zip(scores.layers.values(), expected, strict=True):
            assert ((score_EF - expected_EF).abs() <= 1e-4 * expected_EF.abs() + 1e-12).all()
            assert (expected_EF > 0).any()

    def test_experts_per_token(self, model: MoEModel) -> None:
        visits: list[int] = []
        watched = [(model.layers[-1].experts, lambda h_SF, *_: visits.append(len(h_SF)))]
        with observe_experts(model.model, watched):
            logits(model.model, IDS_NW)
        assert sum(visits) == experts_per_token(model.model) * IDS_NW.numel()

    def test_pruned_equals_masked(self, model: MoEModel, dense: PreTrainedModel) -> None:
        plan, masked = random_plan(model), MoEModel(copy.deepcopy(dense))
        remove(model, plan)
        mask(masked, plan)
        torch.testing.assert_close(
            logits(model.model, IDS_NW), logits(masked.model, IDS_NW), rtol=1e-5, atol=1e-5
        )
        assert (logits(model.model, IDS_NW) - logits(dense, IDS_NW)).abs().max() > 1e-3
        assert sum(sum(layer.widths) for layer in model.layers) == plan.num_kept

    def test_layers_one_by_one_give_what_plain_passes_give(self, deep: MoEModel) -> None:
        """Hidden states and experts' inputs of a deep model, and its statistics by spans, bit for bit."""
        check_walk(deep, needed_by="-", instead="-", gradients=True)
        streams, seen = plain_pass(deep, IDS_NW)
        reads, tape = reads_of(deep), Tape(IDS_NW)
        with torch.no_grad():
            for layer, stream_TD in enumerate(streams):
                hidden = hidden_of(advance(deep, tape, layer + 1, reads)[-1])
                assert torch.equal(hidden.flatten(0, 1), stream_TD)
        for layer, inputs, _ in walk_layers(deep, [IDS_NW]):
            assert torch.equal(inputs.hidden_TD, seen[layer.index])
        spans = [range(1), range(1, 3), range(3, len(streams))]
        whole, parts = collect(deep, [IDS_NW]), collect(deep, [IDS_NW], way=Way(spans))
        assert whole.layers.keys() == parts.layers.keys() == seen.keys()
        tolerance = 1e-5 if self.family in ROUNDS_OTHERWISE else 0
        for index, statistics in whole.layers.items():
            for name, tensor in statistics.items():
                of_parts = getattr(parts.layers[index], name)
                torch.testing.assert_close(
                    of_parts, tensor, rtol=tolerance, atol=tolerance * float(tensor.abs().max())
                )

    @pytest.mark.slow
    def test_streamed_equals_in_memory(
        self, deep: MoEModel, deep_source: ModelSource, tmp_path: Path
    ) -> None:
        check_streamed(self.family, deep, deep_source, tmp_path)

    @pytest.mark.slow
    def test_checkpoints_are_the_same_streamed(self, deep_source: ModelSource, tmp_path: Path) -> None:
        check_streamed_checkpoint(deep_source, tmp_path)

    def test_the_deep_model_has_every_kind_of_layer_twice(self, deep: MoEModel) -> None:
        kinds = Counter(
            kind
            for layer in deep.decoder_layers
            for kind in {type(module).__name__ for module in layer.modules()}
        )
        num_layers = len(deep.decoder_layers)
        for name, values in deep.model.config.to_dict().items():
            if isinstance(values, list) and len(values) == num_layers:
                kinds += Counter(f"{name}: {value}" for value in values)
        assert num_layers >= 4 and min(kinds.values()) >= 2, kinds

    def test_repair_lowers_the_error(self, model: MoEModel) -> None:
        """The layers' outputs come nearer to what they were, in every layer, by one expert alone and by all
        together."""
        for repair in (
            ExpertRepair(),
            JointRepair(direct_up_to=0, max_steps=3),
            JointRepair(refits=1, refit_steps=3),
        ):
            repaired = MoEModel(copy.deepcopy(model.model))
            found = remove_and_repair(repaired, random_plan(model), repair, [IDS_NW])
            assert found.keys() == {layer.index for layer in model.layers}
            assert all(layer.error_after <= layer.error_before for layer in found.values())
            assert sum(layer.num_repaired for layer in found.values()) > 0
            masked = MoEModel(copy.deepcopy(model.model))
            mask(
                masked,
                random_plan(model),
                {layer.index: dict(layer.experts.named_parameters()) for layer in repaired.layers},
            )
            torch.testing.assert_close(
                logits(repaired.model, IDS_NW), logits(masked.model, IDS_NW), rtol=1e-4, atol=1e-4
            )

    def test_stream_is_followed_or_refused(self, model: MoEModel) -> None:
        """Behind layers that were cut, too: checked at the last, against plain passes through all of it."""
        if self.family in NOT_JUST_ADDED:
            with pytest.raises(
                ConfigError,
                match=(
                    "pruning.repair.target=residual_stream: layer .*; give pruning.repair.target=layer_output"
                ),
            ):
                check_stream(model)
            return
        check_stream(model)
        check_stream(MoEModel(copy.deepcopy(model.model).bfloat16()))
        last = model.layers[-1].index
        expected = streams_behind(model.body, model.decoder_layers, IDS_NW)[last]
        pruned = MoEModel(copy.deepcopy(model.model))
        remove(pruned, random_plan(model))
        targets = {}
        for (layer, _, target), replacement in zip(
            walk_layers(model, IDS_NW.split(1), follow_stream=True), pruned.layers, strict=True
        ):
            targets[layer.index] = target
            if layer.index < last:
                layer.replace_experts(replacement.experts)
        with torch.no_grad():
            model.layers[-1].experts.down_proj.zero_()
        rest_TD = streams_behind(model.body, model.decoder_layers, IDS_NW)[last]
        added_TD = SCALES.get(self.family, 1) * targets[last].output_TD
        torch.testing.assert_close(added_TD, expected - rest_TD, rtol=1e-3, atol=1e-4)

    def test_ragged_checkpoint(self, model: MoEModel, ragged: RaggedCheckpoints) -> None:
        """Loaded by heapr here; `test_ragged_checkpoints_load_without_heapr` loads the same folders
        elsewhere."""
        remove(model, random_plan(model))
        folder = ragged.folder_of(self.family)
        assert_same_model(heapr.load_pruned(folder), model.model, IDS_NW)
        assert json.loads((folder / "config.json").read_text())["heapr"] == {"ratio": 0.4}

    def test_uniform_checkpoint(self, model: MoEModel, original: Path, tmp_path: Path) -> None:
        if self.family in NO_UNIFORM:
            with pytest.raises(ConfigError, match="pruning.form=uniform: .*use pruning.form=ragged"):
                uniform_settings(model.model.config, 4)
            return
        settings = uniform_settings(model.model.config, 4)
        remove(model, random_plan(model, width=4))
        expected = logits(model.model, IDS_NW)
        make_uniform(model, settings)
        torch.testing.assert_close(logits(model.model, IDS_NW), expected, rtol=1e-5, atol=2e-6)
        save_checkpoint(model, original, tmp_path / "uniform", about={})
        ours = ["deepseek_moe.py"] if self.family == "deepseek" else []  # transformers does not have it
        assert [path.name for path in (tmp_path / "uniform").glob("*.py")] == ours
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "uniform", dtype=torch.float32).eval()
        assert type(loaded) is type(model.model)
        assert_same_model(loaded, model.model, IDS_NW)

    def test_masked_checkpoint(
        self, model: MoEModel, original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        mask(model, random_plan(model))
        save_checkpoint(model, original, tmp_path / "masked", about={})
        before, after = (
            json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "masked")
        )
        heads = {name for name in before if "nextn" in name or "mtp" in name}
        same = before.keys() - heads - {"auto_map"}
        assert {name: after[name] for name in same} == {name: before[name] for name in same}
        assert (
            not any(after[name] for name in heads if type(after[name]) is int)
            and "keeps the field names" not in caplog.text
        )
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "masked", dtype=torch.float32).eval()
        assert type(loaded) is type(model.model)
        assert_same_model(loaded, model.model, IDS_NW)

    def test_every_tensor_of_its_files_is_taken(
        self, dense: PreTrainedModel, original: Path, tmp_path: Path
    ) -> None:
        dense.save_pretrained(tmp_path)
        source = find_model(str(shutil.copytree(original, tmp_path, dirs_exist_ok=True)), dtype="float32")
        headers = read_headers(tmp_path)
        assert source.remarks == [] and len(headers) > 10
        weights = [name for name in headers if name.endswith(("weight", "proj"))]
        name = max(weights, key=lambda name: math.prod(headers[name]["shape"]))
        eight_bits = {**headers, name: {**headers[name], "dtype": "F8_E4M3"}}
        with_scale = {**headers, f"{name}_scale_inv": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        for changed, what in (
            (eight_bits, f"{name} is F8_E4M3"),
            (with_scale, "scale_inv belongs to a quantised weight"),
        ):
            with pytest.raises(ConfigError, match=re.escape(what)):
                check_tensors(source.on_meta().model, changed, tmp_path)

    def test_training_step(self, model: MoEModel) -> None:
        """Ragged experts learn; what is frozen stays."""
        remove(model, random_plan(model))
        causal_lm = model.model.train()
        for name, parameter in causal_lm.named_parameters():
            parameter.requires_grad_("experts.down_proj" in name)
        before = {name: parameter.clone() for name, parameter in causal_lm.named_parameters()}
        causal_lm(input_ids=IDS_NW, labels=IDS_NW, use_cache=False).loss.backward()
        torch.optim.SGD([p for p in causal_lm.parameters() if p.requires_grad], lr=0.1).step()
        changed = {
            name
            for name, parameter in causal_lm.named_parameters()
            if not torch.equal(parameter, before[name])
        }
        assert changed and all("experts.down_proj" in name for name in changed)


for _family in FAMILIES:
    _name = "Test" + _family.title().replace("_", "")
    globals()[_name] = type(_name, (FamilyContract,), {"family": _family})


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_moe", "qwen3_next"])
def test_streamed_equals_in_memory(family: str, tmp_path: Path) -> None:
    """Of a few kinds; `make slow` tries every family."""
    deep = MoEModel(deep_model(family))
    source = source_of(deep, tmp_path / "model")
    check_streamed(family, deep, source, tmp_path)
    check_streamed_checkpoint(source, tmp_path)


class RaggedCheckpoints:
    """Ragged checkpoints of all families, each made when it is first asked for, with the logits of the model
    that was saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def folder_of(self, family: str) -> Path:
        folder = self.folder / family
        if not folder.exists():
            model = MoEModel(tiny_model(family))
            original = write_description(self.folder.with_name("originals") / family, model.model)
            remove(model, random_plan(model))
            save_checkpoint(model, original, folder, about={"ratio": 0.4})
            torch.save(logits(model.model, IDS_NW), folder / "logits.pt")
        return folder


@pytest.fixture(scope="session")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> RaggedCheckpoints:
    return RaggedCheckpoints(tmp_path_factory.mktemp("ragged"))


WITHOUT_HEAPR = """
import sys
sys.modules["heapr"] = None  # importing it fails
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
ids_NW = torch.load(sys.argv[2])
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids_NW, use_cache=False).logits, torch.load(folder / "logits.pt"), rtol=1e-5, atol=2e-6)
        generated = [model.generate(ids_NW[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=cache)
                     for cache in (True, False)]
    assert torch.equal(*generated) and generated[0].shape == (1, 14), folder.name
    print(folder.name)
"""


@pytest.mark.slow
def test_ragged_checkpoints_load_without_heapr(ragged: RaggedCheckpoints, tmp_path: Path) -> None:
    """In a process that cannot import heapr: the same logits, and generation with the cache equals generation
    without."""
    for family in FAMILIES:
        ragged.folder_of(family)
    torch.save(IDS_NW, tmp_path / "ids.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_HEAPR, str(ragged.folder), str(tmp_path / "ids.pt")]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == sorted(FAMILIES)
