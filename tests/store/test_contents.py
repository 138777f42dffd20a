"""Every stage knows its files and what is in them, whatever hashes and checksums say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heapr.sealed import DamagedError
from heapr.store import Store
from heapr.store.contents import contents_of
from heapr.store.verify import Hashes, verify
from heapr.tensors_file import save_tensors
from tests.store.mutations import CPU, STEPS, Made, nothing

CALIBRATE, SCORE, PLAN, REPAIR, CHECKPOINT, EVALUATE = STEPS[:6]
FLOATS_EF = torch.zeros(2, 3)


def tensors(name: str, **content: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_tensors(
        folder / name, {key.replace("_", ".", 1): content[key] for key in content}
    )


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


WRONG = [
    (SCORE, tensors("scores.safetensors", layers_1=FLOATS_EF.double()), "is F64"),
    (SCORE, tensors("scores.safetensors", layers_1=FLOATS_EF[0]), r"is F32 \[3\]"),
    (SCORE, tensors("scores.safetensors", weights=FLOATS_EF), "does not belong there"),
    (SCORE, tensors("scores.safetensors"), "has no layers"),
    (SCORE, text("scores.safetensors", "no tensors"), "is not a file of tensors"),
    (SCORE, text("notes.txt", "of another stage"), "is not a file of such an artifact"),
    (CALIBRATE, without("tokens.safetensors"), "tokens.safetensors is missing in the manifest"),
    (PLAN, tensors("plan.safetensors", layers_1=FLOATS_EF[0] > 0), r"is BOOL \[3\]"),
    (PLAN, tensors("plan.safetensors"), "has no layers"),
    (CALIBRATE, tensors("tokens.safetensors", ids=torch.zeros(2, 3)), "ids in tokens.safetensors is F32"),
    (CALIBRATE, tensors("statistics.safetensors", loss_sum=torch.zeros(())), "loss.sum in"),
    (PLAN, tensors("plan.safetensors", layers_1=FLOATS_EF), "is F32"),
    (PLAN, text("allocation.json", "[]"), "is not a JSON object"),
    (REPAIR, text("repair.json", "{"), "is not JSON"),
    (REPAIR, tensors("repaired.safetensors", **{"layers_1.down_proj": FLOATS_EF}), "belongs to another plan"),
    (CHECKPOINT, tensors("checkpoint/heapr/plan.safetensors", layers_1=FLOATS_EF > 0), "belongs to another plan"),
    (CHECKPOINT, without("checkpoint/config.json"), "config.json is missing in the manifest"),
    (EVALUATE, text("metrics.json", "null"), "is not a JSON object"),
    (EVALUATE, without("metrics.json"), "metrics.json is missing in the manifest"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "spoil", "problem"), WRONG)
def test_files_of_the_wrong_kind_are_refused(
    tmp_path: Path, step: Made, spoil: Callable[[Path], None], problem: str
) -> None:
    """Written wrongly from the start, so that all hashes fit."""

    def write(folder: Path, value: None) -> None:
        step.write(folder, value)
        spoil(folder)

    store = Store(tmp_path, CPU)
    for earlier in STEPS[: STEPS.index(step)]:
        store.get(earlier.origin, nothing, earlier.write, earlier.part)
    path = store.get(step.origin, nothing, write, step.part).path
    with pytest.raises(DamagedError, match=problem):
        verify(path, step.part, Hashes(None))
    assert not store.has(step.origin, step.part)
    assert not store.get(step.origin, nothing, step.write, step.part).cached
    assert store.has(step.origin, step.part)


def test_every_step_of_a_pipeline_has_contents() -> None:
    assert all(contents_of(step.origin.stage, step.part) is not None for step in STEPS)
    assert contents_of("unknown", "") is None and contents_of("score", "unknown") is None


def test_a_link_to_an_artifact_is_none(tmp_path: Path) -> None:
    path = Store(tmp_path, CPU).get(CALIBRATE.origin, nothing, CALIBRATE.write).path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match="its folder is a symbolic link"):
        verify(path, "", Hashes(None))
