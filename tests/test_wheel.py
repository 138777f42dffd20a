"""The wheel: what is in it, and its commands in an empty folder, away from the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, PathDistribution
from pathlib import Path

import pytest

from tests.command import ROOT

SOURCES = ("heapr", "conf", "experiments", "hydra_plugins")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
# One process for all commands, since imports take longest.
COMMANDS = """
import sys
from heapr.main import main as run
from heapr.prefetch import main as prefetch
from heapr.sweep.command_line import main as sweep

small = ["calibration.num_samples=2", "calibration.sequence_length=16", "evaluation=none", "tracking=none"]
sys.argv = ["heapr-sweep", "--help"]
sweep()
sys.argv = ["heapr", "--config-dir", "mine", "score=mine", "pruning.ratio=0.5", *small]
run()
prefetch(["--config-dir", "mine", "score=mine", *small])
sys.argv = ["heapr-sweep", "experiment=ratio_curve", "model=tiny", "score=mine", "pruning.ratio=0.2"]
sys.argv += ["evaluation=none", "--config-dir=mine", "--dry-run"]
sweep()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    left_out = shutil.ignore_patterns("__pycache__", "results")
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    local = tree / "conf" / "local"
    local.mkdir(exist_ok=True)
    (local / "default.yaml").write_text("runtime:\n  num_threads: 3\n")
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=tree, capture_output=True, check=True)
    (packed,) = folder.glob("*.whl")
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def files_below(folder: Path, pattern: str) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob(pattern))
    return {path.as_posix() for path in paths if not {"local", "results", "__pycache__"} & set(path.parts)}


def test_the_wheel_holds_the_package_and_what_defines_runs(wheel: Path) -> None:
    assert files_below(wheel / "heapr", "*.py") == files_below(ROOT / "heapr", "*.py")
    assert files_below(wheel / "heapr" / "conf", "*") >= files_below(ROOT / "conf", "*.yaml")
    experiments = wheel / "heapr" / "experiments"
    assert files_below(experiments, "experiment.yaml") == files_below(ROOT / "experiments", "experiment.yaml")
    assert (experiments / "published" / "cost.csv").is_file()
    builtin = Path("heapr", "model", "builtin")
    assert files_below(wheel / builtin, "*") == files_below(ROOT / builtin, "*")
    assert (wheel / "heapr" / "py.typed").is_file() and (wheel / "hydra_plugins" / "heapr_jobs.py").is_file()


def test_settings_of_the_machine_that_built_it_stay_there(wheel: Path) -> None:
    assert not (wheel / "heapr" / "conf" / "local").exists()


def test_both_commands_are_there(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info")
    points = PathDistribution(metadata).entry_points
    commands: list[EntryPoint] = sorted(points, key=lambda point: point.name)
    assert [point.name for point in commands] == ["heapr", "heapr-sweep"]
    assert all(callable(point.load()) for point in commands)


@pytest.mark.slow
def test_commands_run_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "score").mkdir(parents=True)
    own = tmp_path / "mine" / "score" / "mine.yaml"
    own.write_text("# mine\n_target_: heapr.score.data_free.Magnitude\n")
    environment = os.environ | {"PYTHONPATH": str(wheel), "COLUMNS": "200"}
    command = [sys.executable, "-c", COMMANDS]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "heapr-sweep experiment=<name>" in result.stdout and "ratio_curve" in result.stdout
    assert "1 jobs" in result.stdout and "here     model builtin" in result.stderr
    (summary,) = (tmp_path / "outputs" / "runs").glob("*/summary.json")
    config = json.loads(summary.read_text())["config"]
    assert config["score"] == {"_target_": "heapr.score.data_free.Magnitude"}
    assert config["pruning"]["ratio"] == 0.5 and config["runtime"]["num_threads"] is None
    (checkpoint,) = (tmp_path / "outputs" / "artifacts" / "prune").glob("*/checkpoint/model.safetensors")
    assert checkpoint.is_file()
