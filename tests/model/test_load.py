"""Identity of models: what they are, never where they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from heapr.model.load import find_model
from tests.experiment import write_model


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
