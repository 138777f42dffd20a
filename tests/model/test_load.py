"""Identity of models: what they are, never where they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from heapr.errors import ConfigError
from heapr.model.load import find_model
from tests.experiment import write_model
from tests.tiny import tiny_ids, tiny_qwen3_moe


def test_identity_follows_weights_and_dtype_not_path(tmp_path: Path) -> None:
    first = write_model(tmp_path / "first")
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    (copy / "README.md").write_text("a card changes nothing")
    other = write_model(tmp_path / "other", seed=1)
    identity = {
        name: find_model(str(path), dtype="float32").identity for name, path in {"first": first, "copy": copy, "other": other}.items()
    }
    assert identity["first"] == identity["copy"]
    assert identity["first"] != identity["other"]
    assert identity["first"] != find_model(str(first), dtype="bfloat16").identity


def test_the_builtin_model_is_small_and_complete() -> None:
    source = find_model("builtin:qwen3_moe_tiny", dtype="float32")
    model = source.load(torch.device("cpu"))
    assert 2e6 <= sum(p.numel() for p in model.model.parameters()) <= 4e6
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
    with torch.no_grad():
        expected = find_model(str(whole), dtype="float32").load(torch.device("cpu")).model(input_ids=ids_NW).logits
        for folder, device_map in ((sharded, None), (whole, "auto")):
            model = find_model(str(folder), dtype="float32").load(torch.device("cpu"), device_map)
            assert torch.equal(model.model(input_ids=ids_NW).logits, expected)


def test_remote_code_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "nobody_knows", "auto_map": {"AutoConfig": "configuration.TheirConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ValueError('their code ran')\n")
    with pytest.raises(ConfigError, match="needs the Python code beside its weights.*model.trust_remote_code=true") as caught:
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
