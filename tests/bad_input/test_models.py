"""Damaged and impossible models, tokenizers, plans and checkpoints: one line, before weights are loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from heapr.artifacts import PLAN, PLANS, REPAIRED
from heapr.files import hash_file
from heapr.model.find_model import find_model
from heapr.model.model_files import INDEX, WEIGHTS
from heapr.prepare import prepare
from heapr.pruning.load_pruned import load_pruned
from heapr.ready import make_ready
from tests.bad_input.refusals import refused_call
from tests.experiment import compose_experiment, run_in, write_model, write_texts

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad_models")
    write_model(folder / "model")
    write_texts(folder)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "model", tmp_path / "model"))


def refusal_of_model(folder: Path, texts: Path) -> str:
    """The line with which a run of a model refuses."""
    settings = [setting for setting in write_texts(texts) if not setting.startswith("evaluation")]

    def start() -> None:
        config = compose_experiment(
            "model=hf", f"model.path={folder}", "model.dtype=float32", "tracking=none", "evaluation=none", *settings,
            f"paths.outputs={folder.parent / 'outputs'}",
        )  # fmt: skip
        experiment = prepare(config)
        _ = experiment.source.tokenizer
        make_ready(experiment)

    return refused_call(start)


def fields(**changes: Any) -> Change:
    """Change fields of config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def content(name: str, text: str | bytes) -> Change:
    """Replace a file."""
    encoded = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(encoded)


def setting_of_tokenizer(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def index(weight_map: Any) -> Change:
    """Put an index of weights into the folder, and rename the weights."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def pickled_in_disguise(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}) * 100)


def header(text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text.encode())

    return change


def not_readable(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def pipe(name: str) -> Change:
    """Put a pipe in the place of a file; who opens it waits."""
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


DEEP = "[" * 100_000

MODELS: dict[str, tuple[Change, str]] = {
    "0 experts per token": (fields(num_experts_per_tok=0), "config.json"),
    "99 experts per token": (fields(num_experts_per_tok=99), "config.json"),
    "-1 experts per token": (fields(num_experts_per_tok=-1), "config.json"),
    "experts per token are text": (fields(num_experts_per_tok="two"), "config.json"),
    "experts per token are a list": (fields(num_experts_per_tok=[2]), "config.json"),
    "no experts": (fields(num_local_experts=0), "has no MoE layer"),
    "minus one expert": (fields(num_local_experts=-1), "has no MoE layer"),
    "experts without width": (fields(moe_intermediate_size=0), "config.json"),
    "negative width": (fields(moe_intermediate_size=-8), "config.json"),
    "width is text": (fields(moe_intermediate_size="8"), "config.json"),
    "width is a fraction": (fields(moe_intermediate_size=8.5), "config.json"),
    "hidden size 0": (fields(hidden_size=0), "config.json"),
    "hidden size of 2^70": (fields(hidden_size=2**70), "config.json"),
    "width of 2^62": (fields(moe_intermediate_size=2**62), "config.json"),
    "vocabulary 0": (fields(vocab_size=0), "config.json"),
    "vocabulary -5": (fields(vocab_size=-5), "config.json"),
    "vocabulary is null": (fields(vocab_size=None), "config.json"),
    "no layers": (fields(num_hidden_layers=0), "has no MoE layer"),
    "layers are a list": (fields(num_hidden_layers=[1]), "config.json"),
    "a million layers": (fields(num_hidden_layers=10**6), "heapr reads at most 2000"),
    "a billion experts": (fields(num_experts=10**9), "heapr reads at most 65536"),
    "a billion labels": (fields(num_labels=10**9), "heapr reads at most 65536"),
    "a text model inside": (fields(text_config={"hidden_size": 8}), "has a text_config"),
    "longest text is text": (setting_of_tokenizer(model_max_length="x"), "model_max_length='x'"),
    "tokenizer is a pipe": (pipe("tokenizer.json"), "tokenizer.json' should be a file"),
    "generation settings are a pipe": (pipe("generation_config.json"), "generation_config.json' should be a file"),
    "no attention heads": (fields(num_attention_heads=0), "config.json"),
    "no key heads": (fields(num_key_value_heads=0), "config.json"),
    "positions are text": (fields(max_position_embeddings="many"), "config.json"),
    "no positions": (fields(max_position_embeddings=0), "config.json"),
    "unknown activation": (fields(hidden_act="nonsense"), "config.json"),
    "activation is a number": (fields(hidden_act=3), "config.json"),
    "unknown dtype": (fields(dtype="float7", torch_dtype="float7"), "config.json"),
    "model type is a list": (fields(model_type=["a"]), "config.json"),
    "model type is null": (fields(model_type=None), "config.json"),
    "model type is unknown": (fields(model_type="nonsense"), "config.json"),
    "not a mixture": (fields(model_type="llama"), "model"),
    "architectures are text": (fields(architectures="x"), "config.json"),
    "auto_map is a list": (fields(auto_map=["x"]), "config.json"),
    "quantised": (fields(quantization_config={"quant_method": "nonsense"}), "quantised"),
    "quantisation is text": (fields(quantization_config="fp8"), "quantization_config"),
    "config.json is a list": (content("config.json", "[]"), "config.json"),
    "config.json is null": (content("config.json", "null"), "config.json"),
    "config.json is empty": (content("config.json", ""), "config.json"),
    "config.json is no JSON": (content("config.json", "{"), "config.json"),
    "config.json is no UTF-8": (content("config.json", b"\xff\xfe{}"), "config.json"),
    "config.json is too deep": (content("config.json", DEEP), "config.json"),
    "generation settings are a list": (content("generation_config.json", "[]"), "generation_config.json"),
    "generation settings are a number": (content("generation_config.json", "3"), "generation_config.json"),
    "generation settings are no JSON": (content("generation_config.json", "{"), "generation_config.json"),
    "tokenizer is a list": (content("tokenizer.json", "[]"), "the tokenizer"),
    "tokenizer is null": (content("tokenizer.json", "null"), "the tokenizer"),
    "tokenizer is empty": (content("tokenizer.json", ""), "the tokenizer"),
    "tokenizer is no UTF-8": (content("tokenizer.json", b"\xff"), "the tokenizer"),
    "tokenizer has no model": (content("tokenizer.json", "{}"), "the tokenizer"),
    "tokenizer's settings are a list": (content("tokenizer_config.json", "[]"), "the tokenizer"),
    "tokenizer's settings are text": (content("tokenizer_config.json", '"a"'), "the tokenizer"),
    "tokenizer's settings are no JSON": (content("tokenizer_config.json", "{"), "the tokenizer"),
    "special tokens are a list": (content("special_tokens_map.json", "[]"), "the tokenizer"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("token*")], "tokenizer"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "there are none"),
    "weights are pickled": (pickled, "are pickled (*.bin), which is not read"),
    "weights are pickled in disguise": (pickled_in_disguise, "model.safetensors is damaged"),
    "weights are empty": (content(WEIGHTS, b""), "is damaged"),
    "weights are cut": (lambda folder: os.truncate(folder / WEIGHTS, 500), "is damaged"),
    "weights are a folder": (not_readable, "weights"),
    "header is a list": (header("[]"), "is damaged"),
    "header is too deep": (header(DEEP), "is damaged"),
    "entry without offsets": (header('{"a":{}}'), "is damaged"),
    "entry of text": (header('{"a":"b"}'), "is damaged"),
    "offsets are text": (header('{"a":{"dtype":"F32","shape":[],"data_offsets":["x","y"]}}'), "is damaged"),
    "offsets are negative": (header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,-4]}}'), "is damaged"),
    "entry without dtype": (header('{"a":{"shape":[],"data_offsets":[0,0]}}'), "is damaged"),
    "shape is text": (header('{"a":{"dtype":"F32","shape":"x","data_offsets":[0,0]}}'), "is damaged"),
    "shape is negative": (header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}'), "is damaged"),
    "dtype is a list": (header('{"a":{"dtype":[],"shape":[],"data_offsets":[0,0]}}'), "is damaged"),
    "index is empty": (index({}), "model.safetensors.index.json is damaged"),
    "index of a list": (index([]), "model.safetensors.index.json is damaged"),
    "index of text": (index("x"), "model.safetensors.index.json is damaged"),
    "index names numbers": (index({"a": 3}), "model.safetensors.index.json is damaged"),
    "index names null": (index({"a": None}), "model.safetensors.index.json is damaged"),
    "index leads out": (index({"a": "../part.safetensors"}), "names '../part.safetensors'"),
    "index leads out further on": (index({"a": "b/../../part.safetensors"}), "names 'b/../../part.safetensors'"),
    "index is absolute": (index({"a": "/etc/passwd"}), "names '/etc/passwd'"),
    "index names nothing": (index({"a": ""}), "names ''"),
    "index names a pickled file": (index({"a": "pytorch_model.bin"}), "names 'pytorch_model.bin'"),
    "index names the missing": (index({"a": "missing.safetensors"}), "missing.safetensors is missing"),
    "index is no JSON": (content(INDEX, "{"), "is damaged"),
    "index is too deep": (content(INDEX, DEEP), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be(name: str, model: Path, original: Path) -> None:
    change, part = MODELS[name]
    change(model)
    assert part in refusal_of_model(model, original)


@pytest.fixture(scope="module")
def pruned(original: Path) -> Path:
    """The folder of a prune artifact, with repair and checkpoint."""
    settings = [setting for setting in write_texts(original) if not setting.startswith("evaluation")]
    run_in(
        original / "pruned", "model=hf", f"model.path={original / 'model'}", "model.dtype=float32", "evaluation=none",
        "pruning/repair=expert", *settings,
    )  # fmt: skip
    (folder,) = (original / "pruned" / "outputs" / "artifacts" / "prune").glob("*/")
    return folder


def plan(change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> Change:
    """Rewrite the plan with other tensors or other metadata."""

    def rewrite(folder: Path) -> None:
        with safe_open(folder / PLAN, framework="pt") as file:
            before = dict(file.metadata())
        tensors = load_file(folder / PLAN)
        change(tensors)
        save_file(tensors, folder / PLAN, before | metadata)

    return rewrite


def save_like(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Replace a file's tensors and keep its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    """Leave the plan's tensors as they are."""


BAD_PLANS: dict[str, tuple[Change, str]] = {
    "not there": (lambda folder: (folder / PLAN).unlink(), "cannot be read"),
    "a folder": (lambda folder: ((folder / PLAN).unlink(), (folder / PLAN).mkdir()), "cannot be read"),
    "a pipe": (pipe(PLAN), "it is not a file"),
    "empty": (content(PLAN, b""), "cannot be read"),
    "pickled": (content(PLAN, pickle.dumps([1]) * 50), "cannot be read"),
    "cut": (lambda folder: os.truncate(folder / PLAN, 100), "cannot be read"),
    "an emptied layer": (plan(lambda tensors: tensors["layers.1"].zero_()), "removes every atomic expert of layers.1"),
    "a layer too few": (plan(lambda tensors: tensors.pop("layers.1")), "does not fit"),
    "a layer too many": (plan(lambda tensors: tensors.update({"layers.9": tensors["layers.1"].clone()})), "does not fit"),
    "no layers": (plan(lambda tensors: tensors.clear()), "does not fit"),
    "another dtype": (plan(lambda tensors: tensors.update({"layers.1": tensors["layers.1"].int()})), "does not fit"),
    "another name": (plan(lambda tensors: tensors.update({"nonsense": torch.zeros(1)})), "does not fit"),
    "metadata are no JSON": (plan(nothing, model="{"), "cannot be read"),
    "metadata are a list": (plan(nothing, model="[]"), "cannot be read"),
    "metadata are null": (plan(nothing, model="null"), "cannot be read"),
    "metadata of another model": (plan(nothing, model='{"sha256":"0"}'), "was made for other weights"),
    "repaired weights elsewhere": (plan(nothing, repaired="../repaired.safetensors"), "cannot be read"),
    "repaired weights absolute": (plan(nothing, repaired="/etc/passwd"), "cannot be read"),
    "repaired weights nowhere": (plan(nothing, repaired=""), "cannot be read"),
    "repaired weights missing": (lambda folder: (folder / REPAIRED).unlink(), "are not beside it"),
    "repaired weights empty": (content(REPAIRED, b""), "cannot be read"),
    "repaired weights of other names": (
        lambda folder: save_like({"a": torch.zeros(1), "b.c": torch.zeros(1)}, folder / REPAIRED), "does not fit",
    ),
    "repaired weights of other shapes": (
        lambda folder: save_like({name: value[..., None] for name, value in load_file(folder / REPAIRED).items()}, folder / REPAIRED),
        "does not fit",
    ),
    "repaired weights of a layer too few": (
        lambda folder: save_like({name: value for name, value in load_file(folder / REPAIRED).items() if "layers.1" not in name}, folder / REPAIRED),
        "does not fit",
    ),
    "repaired weights of integers": (
        lambda folder: save_like({name: value.int() for name, value in load_file(folder / REPAIRED).items()}, folder / REPAIRED),
        "does not fit",
    ),
    "repaired weights that are NaN": (
        lambda folder: save_like({name: value * float("nan") for name, value in load_file(folder / REPAIRED).items()}, folder / REPAIRED),
        "NaN or infinite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PLANS)
def test_a_plan_that_cannot_be(name: str, pruned: Path, original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pruned, tmp_path / "prune", ignore=shutil.ignore_patterns("checkpoint")))
    change, part = BAD_PLANS[name]
    change(folder)
    line = refused_call(lambda: load_pruned(original / "model", plan=folder / PLAN))
    assert part in line and str(folder) in line


CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "widths are missing": (lambda folder: fields(**{width_field(folder): None})(folder), "config.json"),
    "widths are a number": (lambda folder: fields(**{width_field(folder): 3})(folder), "config.json"),
    "widths are of another number": (lambda folder: fields(**{width_field(folder): {}})(folder), "config.json"),
    "widths are negative": (
        lambda folder: fields(**{width_field(folder): [[-1] * 4] * 2})(folder), "config.json",
    ),
    "model type is another's": (fields(model_type="heapr_nonsense"), "was pruned from a 'nonsense' model"),
    "no weights": (lambda folder: [path.unlink() for path in folder.glob("*.safetensors")], "weights"),
    "config.json is a list": (content("config.json", "[]"), "config.json"),
}  # fmt: skip


def width_field(checkpoint: Path) -> str:
    """Name of the field of a checkpoint's config.json that holds the widths of its experts."""
    config = json.loads((checkpoint / "config.json").read_text())
    return next(name for name in config if "widths" in name)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be(name: str, pruned: Path, tmp_path: Path, original: Path) -> None:
    folder = Path(shutil.copytree(pruned / "checkpoint", tmp_path / "checkpoint"))
    change, part = CHECKPOINTS[name]
    change(folder)
    assert part in refused_call(lambda: load_pruned(folder))
    assert part in refusal_of_model(folder, original)


def test_arguments_of_load_pruned(original: Path) -> None:
    for arguments, part in (
        ({"path": original / "no"}, "no such folder"),
        ({"path": original / ("a" * 300)}, "longer than a path may be"),
        ({"path": original / "model", "device": "gpu"}, "device='gpu' is unknown"),
        ({"path": original / "model", "dtype": "float7"}, "float7"),
        ({"path": original / "model", "plan": original / "no.safetensors"}, "cannot be read"),
    ):
        assert part in refused_call(lambda given=arguments: load_pruned(**given))


def test_code_beside_weights_runs_only_if_the_user_says_so(model: Path, tmp_path: Path) -> None:
    fields(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="evil")(
        model
    )
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "model.trust_remote_code=true" in refused_call(lambda: find_model(str(model), dtype="float32"))
    assert "model.trust_remote_code=true" in refused_call(lambda: load_pruned(model))
    assert not (tmp_path / "ran").exists()


def test_the_plan_in_a_checkpoint_has_the_hashes_of_its_code_which_is_short(pruned: Path) -> None:
    checkpoint = pruned / "checkpoint"
    with safe_open(checkpoint / PLANS / PLAN, framework="pt") as file:
        hashes = json.loads(file.metadata()["code_sha256"])
    code = list(checkpoint.glob("*.py"))
    assert hashes == {path.name: hash_file(path) for path in code} and len(code) >= 1
    assert sum(path.stat().st_size for path in code) < 60_000
    copied, original = load_file(checkpoint / PLANS / PLAN), load_file(pruned / PLAN)
    assert all(torch.equal(copied[name], kept_EF) for name, kept_EF in original.items())
