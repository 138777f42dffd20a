"""Files of safetensors: equal content is equal bytes, in every process, and the library reads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from heapr.files import hash_file
from heapr.tensors_file import DTYPES, save_tensors
from heapr.types import TensorDict
from tests.experiment import run_in, write_texts
from tests.tiny import byte_tokenizer, tiny_qwen3_moe


def some_of_each_dtype() -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"of.{dtype}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    strided = torch.rand(4, 6, generator=generator).T[::2]
    return tensors | {
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "strided": strided,
        'é"\\': torch.ones(1),
    }


@pytest.mark.parametrize("metadata", [None, {"model": '{"sha256": "é\\n"}'}])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = some_of_each_dtype()
    save_tensors(tmp_path / "ours", tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors, metadata = some_of_each_dtype(), {"b": "2", "a": "1", "c": "3"}
    save_tensors(tmp_path / "file", tensors, metadata)
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == metadata
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )


def test_every_process_and_every_order_of_entries_gives_the_same_bytes(tmp_path: Path) -> None:
    """The library's order of metadata changes with every call."""
    program = (
        "import sys, torch; from pathlib import Path; from heapr.tensors_file import save_tensors\n"
        "save_tensors(Path(sys.argv[1]), {name: torch.ones(2) for name in 'fedcba'}, {name: name for name in"
        " 'fedcba'})\n"
    )
    here, elsewhere = tmp_path / "forwards", tmp_path / "backwards"
    save_tensors(here, {name: torch.ones(2) for name in "abcdef"}, {name: name for name in "abcdef"})
    subprocess.run([sys.executable, "-c", program, str(elsewhere)], check=True)
    assert here.read_bytes() == elsewhere.read_bytes()


@pytest.mark.parametrize("form", ["ragged", "masked"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_runs_write_the_same_artifacts(tmp_path: Path, form: str, is_tied: bool) -> None:
    """Every file of safetensors that a run leaves, the checkpoint's included."""
    tiny_qwen3_moe(tie_word_embeddings=is_tied).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    texts = [override for override in write_texts(tmp_path) if override.startswith("calibration")]
    settings = [
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        "model.dtype=float32",
        *texts,
        "evaluation=none",
        "recipe=best",
    ]
    digests = []
    for number in range(2):
        run_in(tmp_path / str(number), *settings, f"pruning.form={form}")
        root = tmp_path / str(number) / "outputs" / "artifacts"
        digests.append(
            {str(path.relative_to(root)): hash_file(path) for path in sorted(root.rglob("*.safetensors"))}
        )
    assert len(digests[0]) == 7  # tokens, statistics, scores, plan and its copy, repaired weights, weights
    assert all(digest == digests[0] for digest in digests)
