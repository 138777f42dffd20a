"""Identity of models: what they are, never where they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate import dispatch_model

from heapr.calibration.collector import collect
from heapr.errors import ConfigError, TooLargeError
from heapr.model.experts.dispatch import skip_experts
from heapr.model.find_model import find_model
from heapr.model.moe import MoEModel
from tests.experiment import write_model
from tests.same import assert_same_model
from tests.tiny import tiny_ids, tiny_qwen3_moe


def test_identity_follows_weights_and_dtype_not_path(tmp_path: Path) -> None:
    first = write_model(tmp_path / "first")
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    (copy / "README.md").write_text("a card changes nothing")
    other = write_model(tmp_path / "other", seed=1)
    identity = {
        name: find_model(str(path), dtype="float32").identity
        for name, path in {"first": first, "copy": copy, "other": other}.items()
    }
    assert identity["first"] == identity["copy"]
    assert identity["first"] != identity["other"]
    assert identity["first"] != find_model(str(first), dtype="bfloat16").identity


@pytest.mark.parametrize("name", ["qwen3_moe_tiny", "deepseek_moe_tiny"])
def test_the_builtin_models_are_small_and_complete(name: str) -> None:
    source = find_model(f"builtin:{name}", dtype="float32")
    model = source.load(torch.device("cpu"))
    assert 1.9e6 <= sum(p.numel() for p in model.model.parameters()) <= 4e6
    assert len(model.layers) >= 3 and all(layer.num_experts >= 16 for layer in model.layers)
    assert source.config.num_experts_per_tok == 4
    assert sum(path.stat().st_size for path in source.folder.iterdir()) <= 8 * 2**20
    text = source.tokenizer.decode(model.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)[0])
    assert text


def test_shards_and_device_maps_change_nothing(tmp_path: Path) -> None:
    whole, sharded = write_model(tmp_path / "whole"), write_model(tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    tiny_qwen3_moe().save_pretrained(sharded, max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    ids_NW = tiny_ids(1, 8)
    expected = find_model(str(whole), dtype="float32").load(torch.device("cpu")).model
    for folder, device_map in ((sharded, None), (whole, "auto")):
        model = find_model(str(folder), dtype="float32").load(torch.device("cpu"), device_map)
        assert_same_model(model.model, expected, ids_NW)


def test_remote_code_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "nobody_knows", "auto_map": {"AutoConfig": "configuration.TheirConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ValueError('their code ran')\n"
    )
    with pytest.raises(
        ConfigError, match="needs the Python code beside its weights.*model.trust_remote_code=true"
    ) as caught:
        find_model(str(folder), dtype="float32")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match="their code ran"):
        find_model(str(folder), dtype="float32", trust_remote_code=True)


def test_a_hub_model_is_identified_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a local hub cache, in which a branch points at a commit, without a network."""
    cache = tmp_path / "hub" / "models--someone--some-moe"
    commit = "c" * 40
    write_model(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    (cache / "refs" / "experiment").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    identity = {"hub": "someone/some-moe", "commit": commit, "dtype": "float32"}
    for revision in (None, "main", "experiment", commit):
        source = find_model("someone/some-moe", dtype="float32", revision=revision)
        assert source.identity == identity
    assert len(source.load(torch.device("cpu")).layers) == 2
    with pytest.raises(ConfigError, match="neither a local folder nor in the local hub cache"):
        find_model("someone/some-moe", dtype="float32", revision="d" * 40)


def test_a_model_spread_by_accelerate_gives_the_same(tmp_path: Path) -> None:
    """With the hooks that a device map of several devices brings; loss, gradients and counting of FLOPs go
    through them."""
    plain = MoEModel(tiny_qwen3_moe())
    hooked = MoEModel(dispatch_model(tiny_qwen3_moe(), {"": "cpu"}, force_hooks=True))
    hooked.check_head()
    ids_NW = tiny_ids(2, 8)
    for name, tensor in collect(plain, [ids_NW]).layers[0].items():
        assert torch.equal(getattr(collect(hooked, [ids_NW]).layers[0], name), tensor)
    with skip_experts(hooked.model), torch.no_grad():
        skipped = hooked.model(input_ids=ids_NW).logits
    with torch.no_grad():
        assert torch.equal(hooked.model(input_ids=ids_NW).logits, plain.model(input_ids=ids_NW).logits)
    assert not torch.equal(skipped, plain.model(input_ids=ids_NW).logits)


def test_what_does_not_fit_into_memory_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_model(str(write_model(tmp_path / "model")), dtype="float32")

    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", out_of_memory)
    with pytest.raises(TooLargeError, match="do not fit into memory as float32"):
        source.load(torch.device("cpu"))


DAMAGED = {
    "cut short": lambda config: json.dumps(config)[:-20],
    "a list": lambda config: "[]",
    "a wrong type": lambda config: json.dumps(config | {"hidden_size": "sixteen"}),
    "a zero": lambda config: json.dumps(config | {"num_attention_heads": 0}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_configurations_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    config = write_model(tmp_path / "model") / "config.json"
    config.write_text(DAMAGED[damage](json.loads(config.read_text())))
    with pytest.raises(ConfigError, match="config.json .*(cannot be used|describes no model)") as caught:
        find_model(str(config.parent), dtype="float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", ["{}", "[]", "{", '{"weight_map": []}'])
def test_damaged_indices_of_weights_are_refused_in_one_line(tmp_path: Path, index: str) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match="model.safetensors.index.json is damaged; get it again"):
        find_model(str(folder), dtype="float32")


def test_trusted_code_is_part_of_the_identity(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "modeling.py").write_text("x = 1")
    untrusted, trusted = (
        find_model(str(folder), dtype="float32", trust_remote_code=trust).identity for trust in (False, True)
    )
    (folder / "modeling.py").write_text("x = 2")
    assert find_model(str(folder), dtype="float32").identity == untrusted
    assert (
        len(
            {
                str(untrusted),
                str(trusted),
                str(find_model(str(folder), dtype="float32", trust_remote_code=True).identity),
            }
        )
        == 3
    )


def test_hub_weights_that_are_not_here_are_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--someone--some-moe"
    commit = "c" * 40
    folder = write_model(cache / "snapshots" / commit)
    (folder / "model.safetensors").unlink()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = find_model("someone/some-moe", dtype="float32")
    assert not source.has_weights
    with pytest.raises(
        ConfigError,
        match="weights of model.path='someone/some-moe' are not all in .*, and the hub cannot be reached",
    ):
        source.load(torch.device("cpu"))


@pytest.mark.parametrize(
    ("dtype", "found"), [("bfloat16", torch.bfloat16), (None, torch.float32), ("float8_e4m3fn", None)]
)
def test_the_dtype_of_the_weights_is_what_the_configuration_says(
    tmp_path: Path, dtype: str | None, found: torch.dtype | None
) -> None:
    path = write_model(tmp_path / "model") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dtype": dtype}))
    if found is None:
        with pytest.raises(
            ConfigError,
            match="says dtype float8_e4m3fn; give model.dtype as one of float32, bfloat16, float16",
        ):
            find_model(str(path.parent), dtype=None)
    else:
        assert find_model(str(path.parent), dtype=None).dtype is found
