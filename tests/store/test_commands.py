"""python -m heapr.store: what is there, and what is removed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from heapr.artifacts import MANIFEST, SUMMARY
from heapr.locks import locked
from heapr.origin import Origin
from heapr.past_seconds import PastSeconds
from heapr.sealed import DamagedError, read_sealed, sealed_text
from heapr.store import Store, garbage
from heapr.store.commands import main
from heapr.store.manifest import trusted_manifest
from heapr.store.publishing import lock_path
from heapr.store.references import needs_of_runs, refer, stale_references
from heapr.store.verify import Hashes, verify
from tests.store.mutations import CPU, STEPS, Damage, data_of, make_all, nothing


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of results: two experiments, and the runs that made them."""
    outputs = tmp_path_factory.mktemp("pristine") / "outputs"
    make_all(outputs / "artifacts")
    store = Store(outputs / "artifacts", CPU)
    for name, steps in (("runs/a", STEPS[:6]), ("sweeps/b/0", STEPS[6:])):
        (outputs / name).mkdir(parents=True)
        store.refer(outputs / name, [step.origin for step in steps[-1:]])
    return outputs


@pytest.fixture
def outputs(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "outputs"))


def names(outputs: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in (outputs / "artifacts").glob("[!.]*/[!.]*")}


def run(capsys: pytest.CaptureFixture[str], outputs: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output."""
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--outputs", str(outputs)])
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out + printed.err


def test_ls_and_show_say_what_it_is_and_who_needs_it(
    capsys: pytest.CaptureFixture[str], outputs: Path
) -> None:
    prune, score = STEPS[2].origin, STEPS[1].origin
    code, text = run(capsys, outputs, "ls")
    assert code == 0 and "8 artifacts, " in text
    (line,) = [line for line in text.splitlines() if line.split()[:2] == ["prune", prune.key]]
    assert f"score/{score.key}" in line and "repair checkpoint" in line and "0 runs, 1 artifact" in line
    code, text = run(capsys, outputs, "show", STEPS[5].origin.key[:8])
    assert code == 0 and f"made from: prune/{prune.key}" in text and str(outputs / "runs" / "a") in text
    assert '"stage": "evaluate"' in text and "made from it: nothing" in text
    code, text = run(capsys, outputs, "show", "nothing")
    assert code == 2 and text.startswith("error: key 'nothing' means no artifact") and text.count("\n") == 1
    code, text = run(capsys, outputs / "nowhere", "ls")
    assert code == 2 and "is not there" in text and text.count("\n") == 1


@pytest.mark.parametrize(
    "kind", ["flip_a_bit", "manifest_is_nonsense", "swap_folders", "folder_becomes_a_file"]
)
def test_verify_names_the_damage_and_nothing_else_fails_by_it(
    capsys: pytest.CaptureFixture[str], outputs: Path, kind: str
) -> None:
    root = outputs / "artifacts"
    assert run(capsys, outputs, "verify")[0] == 0
    damage = Damage(root, seed=5)
    getattr(damage, kind)()
    code, text = run(capsys, outputs, "verify")
    name = f"{damage.path.parent.name}/{damage.path.name}"
    assert code == 1 and f"{name} is damaged: " in text
    assert run(capsys, outputs, "ls")[0] == 0
    PastSeconds(root)  # which forecasts of sweeps read


def test_verify_looks_again_at_what_may_be_changing(
    capsys: pytest.CaptureFixture[str], outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a card between its old description and its new one."""
    looks = []

    def damaged_once(path: Path, part: str, hashes: Hashes) -> dict[str, object]:
        looks.append(path)
        if len(looks) == 1:
            raise DamagedError("README.md has 2 bytes, not 1")
        return verify(path, part, hashes)

    monkeypatch.setattr("heapr.store.inspector.verify", damaged_once)
    assert run(capsys, outputs, "verify")[0] == 0 and looks[0] == looks[1]


def test_ls_goes_on_while_files_are_removed(
    capsys: pytest.CaptureFixture[str], outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = Path.lstat

    def removed(path: Path) -> os.stat_result:
        if path.name == "plan.safetensors":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return status(path)

    monkeypatch.setattr(Path, "lstat", removed)
    assert run(capsys, outputs, "ls")[0] == 0


@pytest.mark.parametrize("seconds", [-1, 10**400])
def test_a_manifest_with_an_impossible_number_is_damaged(outputs: Path, seconds: int) -> None:
    """However well it is sealed: whoever forecasts divides it."""
    path = outputs / "artifacts" / "score" / STEPS[1].origin.key
    manifest = read_sealed(path / MANIFEST)
    (path / MANIFEST).write_text(sealed_text(manifest | {"seconds": seconds}))
    with pytest.raises(DamagedError, match="seconds is a number that cannot be"):
        trusted_manifest(path)


def test_a_calibration_of_a_newer_version_spoils_no_forecast(outputs: Path) -> None:
    store = Store(outputs / "artifacts", CPU)
    newer = Origin("calibrate", 99, {"model": {}, "tokens": "10M"}, {})
    store.get(newer, nothing, STEPS[0].write)
    PastSeconds(store.root)


def test_gc_keeps_what_a_run_or_sweep_needs_and_what_that_was_made_from(
    capsys: pytest.CaptureFixture[str], outputs: Path
) -> None:
    before = data_of(outputs / "artifacts")
    code, text = run(capsys, outputs, "gc", "--delete")
    assert code == 0 and text.startswith("0 artifacts") and data_of(outputs / "artifacts") == before
    shutil.rmtree(outputs / "sweeps" / "b")
    unneeded = {f"{step.origin.stage}/{step.origin.key}" for step in STEPS[6:]}
    code, text = run(capsys, outputs, "gc")
    assert code == 0 and all(f"{name}, " in text for name in unneeded) and "without --delete" in text
    assert data_of(outputs / "artifacts") == before
    assert run(capsys, outputs, "gc", "--delete")[0] == 0
    assert names(outputs) == {f"{step.origin.stage}/{step.origin.key}" for step in STEPS[:6]}
    assert run(capsys, outputs, "verify")[0] == 0
    assert len(list((outputs / "artifacts" / ".runs").iterdir())) == 1


def test_gc_goes_by_summaries_too(capsys: pytest.CaptureFixture[str], outputs: Path) -> None:
    shutil.rmtree(outputs / "artifacts" / ".runs")  # as of a run that could not write there
    last = STEPS[5].origin
    summary = {"stages": [{"stage": last.stage, "key": last.key}]}
    (outputs / "runs" / "a" / SUMMARY).write_text(json.dumps(summary))
    assert run(capsys, outputs, "gc", "--delete")[0] == 0
    assert names(outputs) == {f"{step.origin.stage}/{step.origin.key}" for step in STEPS[:6]}


def test_gc_removes_nothing_if_it_cannot_tell(capsys: pytest.CaptureFixture[str], outputs: Path) -> None:
    shutil.rmtree(outputs / "sweeps" / "b")
    (outputs / "runs" / "a" / SUMMARY).write_text("{")
    before = names(outputs)
    code, text = run(capsys, outputs, "gc", "--delete")
    assert code == 2 and f"cannot tell what a run needs: '{outputs / 'runs' / 'a' / SUMMARY}'" in text
    assert names(outputs) == before


@pytest.mark.parametrize("closed", ["artifacts/.runs", "runs", "runs/a", "sweeps/b"])
def test_gc_removes_nothing_if_it_may_not_look(
    capsys: pytest.CaptureFixture[str], outputs: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    """Where another user's run may say what it needs."""
    before, listed = names(outputs), os.listdir

    def refuse(folder: Path) -> list[str]:
        if Path(folder) == outputs / closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    code, text = run(capsys, outputs, "gc", "--delete")
    assert code == 2 and f"'{outputs / closed}': Permission denied" in text and text.count("\n") == 1
    assert names(outputs) == before
    code, text = run(capsys, outputs, "ls")
    assert code == 0 and "cannot be read" in text


def test_a_run_whose_folder_may_not_be_looked_at_needs_its_artifacts(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, status = outputs / "artifacts", Path.stat
    before, _ = needs_of_runs(root)

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if path.name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return status(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    assert needs_of_runs(root) == (before, []) and not stale_references(root)


@pytest.mark.parametrize("folder", ["~nobody-has-this-name", "x" * 300, "a/" * 3000, "two\nlines"])
def test_a_folder_that_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: str
) -> None:
    code, text = run(capsys, Path(folder) if folder.startswith("~") else tmp_path / folder, "ls")
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1


def test_gc_leaves_what_is_in_use(capsys: pytest.CaptureFixture[str], outputs: Path) -> None:
    shutil.rmtree(outputs / "sweeps" / "b")
    used = outputs / "artifacts" / STEPS[-1].origin.stage / STEPS[-1].origin.key
    with locked(lock_path(used), "it"):
        code, text = run(capsys, outputs, "gc", "--delete")
    assert code == 0 and "in use" in text and used.is_dir()


@pytest.mark.parametrize("is_late", [False, True])
def test_gc_keeps_what_a_run_has_come_to_need(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """After the list was made, or while it is being removed."""
    root = outputs / "artifacts"
    shutil.rmtree(outputs / "sweeps" / "b")
    listed = garbage.find_garbage(root)
    kept, first = listed.artifacts[0], listed.artifacts[-1]  # the last of the list goes first

    def come() -> None:
        folder = outputs / "runs" / "new"
        folder.mkdir(exist_ok=True)
        refer(root, folder, [kept.name])

    if is_late:
        remove = garbage._remove_artifact

        def remove_and_come(path: Path) -> None:
            remove(path)
            time.sleep(0.01)  # a folder's time of change goes by ticks of the clock
            come()

        monkeypatch.setattr(garbage, "_remove_artifact", remove_and_come)
    else:
        come()
    removed = garbage.remove_garbage(root, listed)
    assert first.path in removed and not first.path.exists()
    assert kept.path.is_dir() and kept.path not in removed


def test_gc_removes_what_a_run_needs_if_it_is_told_to(
    capsys: pytest.CaptureFixture[str], outputs: Path
) -> None:
    """And what was made from it, which means nothing without it."""
    assert run(capsys, outputs, "gc", "--also", STEPS[2].origin.key, "--delete")[0] == 0
    gone = {STEPS[2].origin.key, STEPS[5].origin.key}
    assert names(outputs) == {
        f"{step.origin.stage}/{step.origin.key}" for step in STEPS if step.origin.key not in gone
    }


def test_gc_removes_damaged_copies(capsys: pytest.CaptureFixture[str], outputs: Path) -> None:
    root = outputs / "artifacts"
    Damage(root, seed=0).remove_the_manifest()
    make_all(root)
    code, text = run(capsys, outputs, "gc")
    assert code == 0 and "a damaged copy" in text and list(root.glob("*/.*.damaged-*"))
    run(capsys, outputs, "gc", "--delete")
    assert not list(root.glob("*/.*.damaged-*")) and len(names(outputs)) == 8


def test_a_store_that_is_moved_with_its_runs_keeps_its_references(
    capsys: pytest.CaptureFixture[str], outputs: Path
) -> None:
    moved = outputs.rename(outputs.with_name("moved"))
    assert os.listdir(moved)
    code, text = run(capsys, moved, "gc")
    assert code == 0 and text.startswith("0 artifacts")
