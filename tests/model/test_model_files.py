"""Which files are loaded, that the identity is made of exactly these, and what is refused because it could be
meant in two ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import load_file, save_file

from heapr.errors import ConfigError
from heapr.model.find_model import find_model
from heapr.model.model_files import INDEX, WEIGHTS, weight_files
from tests.experiment import write_model
from tests.tiny import tiny_qwen3_moe


def sharded(folder: Path, below: str = "") -> Path:
    """The same model in three shards or more, in the folder or in one below it."""
    write_model(folder)
    (folder / WEIGHTS).unlink()
    tiny_qwen3_moe().save_pretrained(folder, max_shard_size="30KB")
    if below:
        index = json.loads((folder / INDEX).read_text())
        (folder / below).mkdir()
        for name in set(index["weight_map"].values()):
            (folder / name).rename(folder / below / name)
        index["weight_map"] = {tensor: f"{below}/{name}" for tensor, name in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))
    return folder


LAYOUTS = {
    "one file": write_model,
    "shards": sharded,
    "shards in a subfolder": lambda folder: sharded(folder, "weights"),
}


def identity(folder: Path, digests: Path | None = None) -> dict[str, str]:
    return find_model(str(folder), dtype="float32", digests=digests).identity


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_identity_is_made_of_the_weights_that_are_loaded(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LAYOUTS[layout](tmp_path / "model")
    opened: list[str] = []
    safe_open = transformers.modeling_utils.safe_open
    monkeypatch.setattr(
        transformers.modeling_utils,
        "safe_open",
        lambda file, **kwargs: opened.append(str(file)) or safe_open(file, **kwargs),
    )
    find_model(str(folder), dtype="float32").load(torch.device("cpu"))
    assert sorted(opened) == [str(folder / name) for name in weight_files(folder)]
    before = identity(folder, tmp_path / "digests")
    assert before == identity(folder)
    for path in opened:
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert identity(folder, tmp_path / "digests") != before, path
        Path(path).write_bytes(content)
    assert identity(folder, tmp_path / "digests") == before


@pytest.mark.parametrize(
    "name",
    ["model.fp16.safetensors", "consolidated.safetensors", "old/model.safetensors", "pytorch_model.bin"],
)
def test_weights_that_are_not_loaded_change_no_identity(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    before = identity(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"something else")
    assert identity(folder) == before
    find_model(str(folder), dtype="float32").load(torch.device("cpu"))


def test_an_index_of_the_one_file_beside_it_is_no_second_candidate(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)})
    )
    find_model(str(folder), dtype="float32").load(torch.device("cpu"))


def both(folder: Path) -> None:
    shutil.copy(write_model(folder.with_name("stale")) / WEIGHTS, folder)


def tensor_twice(folder: Path) -> None:
    first, second, *_ = weight_files(folder)
    tensors = load_file(folder / first)
    save_file(
        {**load_file(folder / second), min(tensors): tensors[min(tensors)]}, folder / second, {"format": "pt"}
    )


def only_a_variant(folder: Path) -> None:
    (folder / INDEX).rename(folder / "model.safetensors.index.fp16.json")
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))


def nothing(folder: Path) -> None:
    for name in [*weight_files(folder), INDEX]:
        (folder / name).unlink()


def field_in_config(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))

    return change


REFUSED = {
    both: (
        r"are there twice: model.safetensors, and the \d+ files that model.safetensors.index.json names; .*"
        r" remove whichever is"
    ),
    tensor_twice: r"are ambiguous: .* is in model-.* and in model-.*; get both files again",
    only_a_variant: (
        "cannot be loaded: model-.*fp16.* is not a file that is read; put them there as model.safetensors, or as"
        " shards with"
    ),
    nothing: "cannot be loaded: there are none; put them there as",
    lambda folder: (folder / "adapter_config.json").write_text(
        "{}"
    ): "holds an adapter .*; merge it into the model's weights",
    field_in_config(
        "transformers_weights", "model.fp16.safetensors"
    ): "names its weights in `transformers_weights`.* remove this field",
    field_in_config("quantization_config", {}): "has an empty quantization_config; remove this field",
    field_in_config(
        "quantization_config", {"quant_method": "gptq"}
    ): r"are quantised \(gptq\), which transformers cannot dequantise; give a bfloat16 or float32 copy",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: REFUSED[change][:30])
def test_what_could_be_meant_in_two_ways_is_refused_in_one_line(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = sharded(tmp_path / "model")
    change(folder)
    with pytest.raises(ConfigError, match=REFUSED[change]) as caught:
        find_model(str(folder), dtype="float32")
    assert "\n" not in str(caught.value)


def test_code_from_elsewhere_is_not_trusted_with_the_folders(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    field_in_config("auto_map", {"AutoModelForCausalLM": "someone/else--modeling.Model"})(folder)
    find_model(str(folder), dtype="float32")
    with pytest.raises(
        ConfigError, match=r"takes its Python code from elsewhere \(someone/else--modeling.Model\)"
    ):
        find_model(str(folder), dtype="float32", trust_remote_code=True)
