"""A run gives its sweeper a number, and a saved configuration runs again; both as Hydra does it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from heapr.errors import ConfigError
from heapr.objective import check_objective, known_objectives, objective_value
from heapr.saved_run import with_saved_run
from heapr.unknown_keys import explain_unknown_key
from tests.command import run_py_here
from tests.experiment import CONF, write_model, write_texts
from tests.test_main import assert_refused

ALONE = ["evaluation.fidelity=null", "evaluation.throughput=null", "evaluation.truth=null"]
INCREASE = "perplexity_increase/text_files"


class Halving(Sweeper):
    """Tries two ratios, then the middle between the better one and zero; keeps what each run returned."""

    returned: ClassVar[dict[float, float]] = {}
    kept: ClassVar[list[object]] = []

    def __init__(self, **_: object) -> None:
        """Hydra's own sweeper has arguments, which this one does not need."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.config, self.launcher = (
            config,
            Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=task_function, config=config
            ),
        )

    def sweep(self, arguments: list[str]) -> Any:
        self._try([0.75, 0.5], arguments)
        best = min(self.returned, key=self.returned.__getitem__)
        self._try([best / 2], arguments)

    def _try(self, ratios: Sequence[float], arguments: list[str]) -> None:
        jobs = [[*arguments, f"pruning.ratio={ratio}"] for ratio in ratios]
        results = self.launcher.launch(jobs, initial_job_idx=len(self.returned))
        for ratio, result in zip(ratios, results, strict=True):
            self.returned[ratio] = result.return_value
            self.kept += [result.cfg, result.hydra_cfg]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("material")
    write_model(folder / "model")
    model = ["model=hf", f"model.path={folder / 'model'}", "model.dtype=float32"]
    return [*model, *write_texts(folder), *ALONE, "tracking=none", "pruning.save_checkpoint=false"]


def summaries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("summary.json"))]


def test_a_sweeper_finds_the_best_by_what_runs_return(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("hydra_plugins.halving")  # where Hydra wants its plug-ins
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Halving, "__module__", module.__name__)
    module.Halving = Halving  # type: ignore[attr-defined]
    Plugins.instance().register(Halving)
    Halving.returned, Halving.kept = {}, []
    result = run_py_here(
        "-m", *overrides, "hydra.sweeper._target_=hydra_plugins.halving.Halving", "plugins.allow=[hydra_plugins.halving]", f"objective={INCREASE}",
        folder=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = {}
    for summary in summaries(tmp_path):
        expected[summary["config"]["pruning"]["ratio"]] = summary["metrics"]["comparison"][INCREASE]
    assert Halving.returned == expected
    assert len(expected) == 3 and all(type(number) is float for number in Halving.returned.values())
    assert Halving.kept == [None] * 6, "configurations of finished jobs, which would add up in a long sweep"


def test_a_metric_may_be_of_the_pruned_model_of_its_size_or_of_both() -> None:
    metrics = {"dense": {"a": 1.0}, "pruned": {"a": 2.0}, "size": {"b": 3}, "comparison": {"c": 4.0}}
    values = [objective_value(name, metrics) for name in ("a", "b", "c", None)]
    assert values == [2.0, 3.0, 4.0, None]
    with pytest.raises(ConfigError, match="objective=d was not measured: .* it has a, b, c"):
        objective_value("d", metrics)


def test_the_mean_accuracy_can_be_an_objective_where_a_task_is_measured() -> None:
    task = SimpleNamespace(name="accuracy/piqa", objectives=("accuracy/piqa",))
    other = SimpleNamespace(name="perplexity/ptb", objectives=("perplexity/ptb",))
    check_objective("accuracy/average", [other, task, task])
    assert known_objectives([task, task])[1:] == ["accuracy/piqa", "accuracy/average"]
    with pytest.raises(ConfigError, match="objective=accuracy/average is not measured here"):
        check_objective("accuracy/average", [other])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> Path:
    """The folder of a run, two folders below the one that it was started in."""
    folder = tmp_path_factory.mktemp("saved")
    result = run_py_here(*overrides, "score=fisher", "pruning.ratio=0.5", folder=folder)
    assert result.returncode == 0, result.stderr
    (run,) = (folder / "outputs" / "runs").iterdir()
    return run


def test_a_saved_configuration_runs_again(saved: Path) -> None:
    """From the folder of the run or its .hydra, with fields changed; results, log and folder as usual."""
    start = saved.parents[2]
    again = run_py_here("--config-path", f"outputs/runs/{saved.name}/.hydra", folder=start)
    changed = run_py_here(f"--config-path={saved}", "pruning.ratio=0.25", folder=start)
    assert (again.returncode, changed.returncode) == (0, 0), again.stderr + changed.stderr
    before, same, other = summaries(saved.parent)
    assert same["config"] == before["config"] and same["metrics"] == before["metrics"]
    assert all(stage["cached"] for stage in same["stages"])
    assert other["config"]["pruning"]["ratio"] == 0.25
    assert other["config"]["score"] == before["config"]["score"]
    folders = sorted(saved.parent.iterdir())
    assert len(folders) == 3 and all((folder / "run.log").stat().st_size for folder in folders)


def test_the_last_of_several_saved_configurations_counts(tmp_path: Path) -> None:
    """As for Hydra, whichever of the option's names each has."""
    for name in ("a", "b"):
        hydras = tmp_path / name / ".hydra"
        hydras.mkdir(parents=True)
        for file in ("config.yaml", "hydra.yaml", "overrides.yaml"):
            (hydras / file).write_text("")
    for first, last in (("-cp", "--config-path"), ("--config-path", "-cp"), ("-cp", "-cp")):
        arguments = [f"{first}={tmp_path / 'a'}", "seed=1", last, str(tmp_path / "b")]
        found = with_saved_run(arguments, CONF)
        assert found[0] == f"--config-path={tmp_path / 'b' / '.hydra'}" and found[-1] == "seed=1"
        assert str(tmp_path / "a") not in " ".join(found)


def test_a_saved_configuration_takes_fields_only(saved: Path, tmp_path: Path) -> None:
    path = f"--config-path={saved}"
    refused = run_py_here(path, "score=heapr_sum", folder=tmp_path)
    assert_refused(
        refused, "'score=heapr_sum' chooses an option, and a saved configuration takes only fields"
    )
    assert "score=fisher" not in refused.stderr and refused.stderr.endswith(" score=heapr_sum\n")
    unknown = run_py_here(path, "+pruning.raito=0.3", folder=tmp_path)
    assert_refused(unknown, "did you mean pruning.ratio?")
    mistyped = run_py_here(path, "pruning.ratio=lots", folder=tmp_path)
    assert_refused(
        mistyped, "pruning.ratio: Value 'lots' of type 'str' could not be converted to Float; give"
    )


def test_options_of_ones_own_are_known_options(tmp_path: Path) -> None:
    (tmp_path / "mine" / "score").mkdir(parents=True)
    (tmp_path / "mine" / "score" / "mine.yaml").write_text(
        "_target_: heapr.score.data_free.Random\nseed: 3\n"
    )
    for option in (["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", str(tmp_path / "mine")]):
        refused = run_py_here(*option, "score=mien", folder=tmp_path)
        assert_refused(refused, "did you mean mine? known options of score: activation, ")
        assert "magnitude, mine, random" in refused.stderr
    of_it = run_py_here("--config-dir=mine", "score=mine", "score.sede=4", folder=tmp_path)
    assert_refused(of_it, "did you mean score.seed?")
    of_its_own_group = run_py_here("--config-dir=mine", "score=3", folder=tmp_path)
    assert_refused(of_its_own_group, "magnitude, mine, random")


def test_the_nearest_key_is_of_any_depth() -> None:
    known = {"pruning": {"ratio": 1, "repair": {"ridge": 1}}, "score": {"seed": 1}}
    messages = {path: explain_unknown_key(path, known) for path in ("ridge", "pruning.ridge", "scor", "a.b")}
    assert messages["ridge"].endswith("did you mean pruning.repair.ridge?")
    assert messages["pruning.ridge"].endswith("did you mean pruning.repair.ridge?")
    assert messages["scor"] == "unknown key 'scor'; did you mean score? known here: pruning, score"
    assert messages["a.b"] == "unknown key 'a'; known here: pruning, score"
    often = {group: {"seed": 1} for group in ("a", "b", "c", "d")}
    assert (
        explain_unknown_key("seed", often) == "unknown key 'seed'; did you mean a.seed or b.seed or c.seed?"
    )
