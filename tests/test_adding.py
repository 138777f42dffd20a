"""docs/adding.md: what it prints is put where it says, and run."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

from heapr.compose_experiment import compose_experiment
from heapr.run_experiment import run
from tests.command import ROOT
from tests.experiment import CONF, write_model

BLOCK = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)  # indented lines, and empty ones between
YAML = {  # of conf/, as the page describes them
    "score/peak.yaml": "# peak\n_target_: own_peak.Peak\n",
    "corpus/man.yaml": "# man\n_target_: own_manpages.ManPages\nfolder: {folder}\nsection: 1\nsplit: all\n",
    "evaluation/evaluators/mine.yaml": "# mine\nmine:\n  _target_: own_largestlogit.LargestLogit\n",
}


def printed_modules() -> dict[str, str]:
    """The classes that the page prints, by name."""
    page = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
    found = {}
    for block in BLOCK.findall(page):
        for name in re.findall(r"^    class (\w+)", block, re.MULTILINE):
            found[name] = dedent(block)
    return found


def test_everything_that_is_printed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = printed_modules()
    assert modules.keys() == {"Peak", "ManPages", "LargestLogit"}
    names = [f"own_{name.lower()}" for name in modules]
    for name, code in zip(names, modules.values(), strict=True):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name, content in YAML.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True)
        path.write_text(content.format(folder=tmp_path))
    (tmp_path / "man1").mkdir()
    for page in ("ls", "cat"):
        (tmp_path / "man1" / f"{page}.txt").write_text(f"{page} does what {page} does. " * 20)
    overrides = [
        f"hydra.searchpath=['file://{tmp_path / 'conf'}']", "score=peak", "corpus@calibration.corpus=man", "evaluation/corpora=[]",
        "evaluation/evaluators@evaluation=[mine]", f"plugins.allow=[{','.join(names)}]", "calibration.num_samples=4", "calibration.sequence_length=32", "tracking=none",
        "model=hf", f"model.path={write_model(tmp_path / 'model')}", "model.dtype=float32", f"paths.outputs={tmp_path / 'outputs'}",
    ]  # fmt: skip
    (tmp_path / "run").mkdir()
    metrics = run(compose_experiment(overrides, CONF), tmp_path / "run").metrics
    assert metrics["dense"].keys() == metrics["pruned"].keys() == {"largest_logit"}
    assert metrics["dense"] != metrics["pruned"]
    assert metrics["size"]["atomic_experts_removed_ratio"] == 0.25
