"""Wrong values, keys and options on the command line of run.py, and what its one line says."""

from __future__ import annotations

import email
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from heapr.errors import ConfigError
from heapr.evaluation.zero_shot_names import check_task_name
from heapr.text.corpora import TextFiles
from heapr.text.published_corpora import WikiText2
from tests.bad_input.refusals import refused

HUGE = str(2**64)
LONG = "a" * 300  # longer than any file's name may be

# Arguments, separated by blanks, and a part of the line.
NUMBERS = [
    (f"calibration.num_samples={HUGE}", "calibration.num_samples"),
    (f"calibration.sequence_length={HUGE}", "calibration.sequence_length"),
    (f"calibration.batch_size={HUGE}", "calibration.batch_size"),
    (f"calibration.seed={HUGE}", "calibration.seed"),
    (f"calibration.seed=-{HUGE}", "calibration.seed"),
    (f"calibration.max_characters={HUGE}", "calibration.max_characters"),
    (f"runtime.num_threads={HUGE}", "runtime.num_threads"),
    (
        "calibration.num_samples=50 calibration.sequence_length=100 calibration.max_characters=1000",
        "1000 of text can give",
    ),
    ("runtime.num_threads=100000000", "runtime.num_threads"),
    ("runtime.num_threads=0", "runtime.num_threads"),
    ("runtime.wait_minutes=nan", "runtime.wait_minutes"),
    ("runtime.checkpoint_seconds=inf", "runtime.checkpoint_seconds=inf is no finite number"),
    ("runtime.wait_minutes=-1", "runtime.wait_minutes"),
    ("pruning.rounds=1000000", "pruning.rounds"),
    (f"pruning.rounds={HUGE}", "pruning.rounds"),
    ("pruning.rounds=0", "pruning.rounds"),
    (f"pruning.width_multiple={2**67}", "pruning.width_multiple"),
    (f"pruning.protected_layers=[{HUGE}]", "pruning.protected_layers"),
    ("pruning.protected_layers=[-1]", "pruning.protected_layers"),
    ("pruning.protected_layers=[0,0]", "pruning.protected_layers"),
    ("pruning.protected_layers=null", "pruning.protected_layers"),
    ("pruning.ratio=nan", "pruning.ratio"),
    ("pruning.ratio=-.inf", "pruning.ratio"),
    ("pruning.ratio=1e400", "pruning.ratio"),
    ("pruning.ratio=-1e-9", "pruning.ratio"),
    ("pruning.ratio=null", "pruning.ratio"),
    ("pruning.ratio=true", "pruning.ratio"),
    (f"evaluation.perplexity.window={HUGE}", "evaluation.perplexity.window"),
    (f"evaluation.perplexity.batch_size={HUGE}", "evaluation.perplexity.batch_size"),
    ("evaluation.perplexity.window=[3]", "evaluation.perplexity.window"),
    ("evaluation.perplexity.window=null", "evaluation.perplexity.window"),
    (f"evaluation.fidelity.max_windows={HUGE}", "evaluation.fidelity.max_windows"),
    (f"evaluation.zero_shot.limit={HUGE}", "evaluation.zero_shot.limit"),
    (f"evaluation.zero_shot.num_fewshot={HUGE}", "evaluation.zero_shot.num_fewshot"),
    (f"evaluation.zero_shot.batch_size={HUGE}", "evaluation.zero_shot.batch_size"),
    (f"evaluation.truth.num_groups={HUGE}", "evaluation.truth.num_groups"),
    (f"evaluation.truth.seed={HUGE}", "evaluation.truth.seed"),
    (f"evaluation.truth.sample_size={HUGE}", "evaluation.truth.sample_size"),
    (f"evaluation.throughput.new_tokens={HUGE}", "evaluation.throughput.new_tokens"),
    (f"evaluation.throughput.prompt_length={HUGE}", "evaluation.throughput.prompt_length"),
    (f"evaluation.throughput.repeats={HUGE}", "evaluation.throughput.repeats"),
    (f"pruning/repair=joint pruning.repair.refits={HUGE}", "pruning.repair.refits"),
    (f"pruning/repair=joint pruning.repair.max_steps={HUGE}", "pruning.repair.max_steps"),
    ("pruning/repair=joint pruning.repair.ridge=nan", "pruning.repair.ridge"),
    (f"score=random score.seed={HUGE}", "score.seed"),
    ("score=camera score.alpha=2", "score.alpha"),
    ("runtime.checkpoint_seconds=-1", "give a number of at least 0"),
    ("evaluation.throughput.repeats=1000000", "evaluation.throughput.repeats=1000000 is above 1000"),
    ("calibration=mixture calibration.corpus.parts.pydocs.weight=1e308 calibration.corpus.parts.numpydocs.weight=1e308", "add up to inf"),
    ("score=camera score.alpha=inf", "score.alpha"),
]  # fmt: skip

NULLS = [
    ("++model=null", "model"),
    ("++calibration=null", "calibration"),
    ("++calibration.corpus=null", "calibration.corpus"),
    ("++calibration.corpus=3", "calibration.corpus"),
    ("++calibration.corpus=[]", "calibration.corpus"),
    ("++score=null", "score"),
    ("++score=3", "score"),
    ("+pruning=null", "pruning"),
    ("++pruning=null", "pruning"),
    ("++pruning=3", "pruning"),
    ("++pruning=[1]", "pruning"),
    ("++pruning.repair=3", "pruning.repair"),
    ("++evaluation=null", "evaluation"),
    ("++evaluation=3", "evaluation"),
    ("++evaluation.corpora=null", "evaluation.corpora"),
    ("++evaluation.corpora=3", "evaluation.corpora"),
    ("++evaluation.corpora=[1]", "evaluation.corpora"),
    ("++evaluation.corpora.pydocs=null", "evaluation.corpora.pydocs"),
    ("++evaluation.perplexity=3", "evaluation.perplexity"),
    ("++evaluation.zero_shot.tasks=null", "evaluation.zero_shot.tasks"),
    ("++evaluation.zero_shot.tasks=[null]", "evaluation.zero_shot.tasks"),
    ("++evaluation.zero_shot.tasks={a:1}", "evaluation.zero_shot.tasks"),
    ("++tracking=null", "tracking"),
    ("++runtime=null", "runtime"),
    ("++paths=null", "paths"),
    ("++dry_run=null", "dry_run"),
    ("~pruning", "pruning"),
    ("~score", "score"),
    ("~model.path", "model.path"),
    ("~paths", "paths"),
]

KEYS = [
    ("+pruning.raito=0.5", "did you mean pruning.ratio?"),
    ("++pruning.raito=0.5", "did you mean pruning.ratio?"),
    ("+calibration.num_sample=3", "did you mean calibration.num_samples?"),
    ("+score.alpha=1", "unknown key 'score.alpha'"),
    ("+evaluation.perplexity.windw=3", "did you mean evaluation.perplexity.window?"),
    ("+nonsense=1", "nonsense"),
    ("+evaluation.nonsense=1", "evaluation.nonsense"),
    ("++evaluation.nonsense={a:1}", "evaluation.nonsense"),
    ("score=[heapr,fisher]", "score takes one option"),
    ("model=[tiny,tiny_deepseek]", "model takes one option"),
    ("+score=fisher", "score"),
    ("score@pruning=fisher", "score"),
]

NAMES = [
    ("runtime.device=gpu", "runtime.device='gpu' is unknown"),
    ("runtime.device=cuda:99", "torch sees"),
    ("runtime.device=cuda:-1", "runtime.device"),
    (f"runtime.device=cuda:{HUGE}", "runtime.device"),
    ("runtime.device=cpu:1", "CPUs have no number"),
    ("runtime.device=meta", "meta devices are not supported"),
    ("runtime.device=mps", "runtime.device"),
    ("runtime.device=''", "runtime.device"),
    ("runtime.device=null", "runtime.device"),
    ("runtime.device=0", "runtime.device"),
    ("runtime.stream=perhaps", "runtime.stream"),
    ("model.dtype=float8", "model.dtype"),
    ("model.dtype=null", "model.dtype"),
    (f"model.name={LONG}", "model.name"),
    ("model.name=''", "model.name"),
    ("model.name=a/b", "model.name"),
    (f"model.path={LONG}", "longer than a path may be"),
    (f"model.path=someone/{LONG}", "model.path"),
    (f"model.path=/{'a/' * 3000}", "longer than a path may be"),
    ("model.path=''", "model.path"),
    ("model.path=builtin:", "model.path"),
    ("model.path=builtin:../..", "no such built-in model"),
    ("model.path=/etc/hostname", "model.path"),
    ("model.path=someone/some-model model.revision=../../x", "model.path"),
    (f"tracking.project={LONG}", "tracking.project"),
    (f"paths.outputs={LONG}", "longer than a path may be"),
    ("paths.outputs=", "paths.outputs"),
    ("paths.outputs=null", "paths.outputs"),
    ("paths.outputs='  '", "paths.outputs"),
    ("paths.outputs=/etc/hostname", "paths.outputs"),
    (f"evaluation.zero_shot.tasks=[{LONG}]", "zero-shot task"),
    ("evaluation.zero_shot.tasks=['']", "zero-shot task"),
    ("evaluation.zero_shot.tasks=[../x]", "zero-shot task"),
    ("evaluation.zero_shot.tasks=[pydocs_continuation,pydocs_continuation]", "evaluation measures"),
    (f"evaluation/corpora=[text_files] +evaluation.corpora.text_files.name={LONG} evaluation.corpora.text_files.paths=[/etc/hostname]", "name"),
    ("evaluation/corpora=[text_files] +evaluation.corpora.text_files.name=../x evaluation.corpora.text_files.paths=[/etc/hostname]", "name"),
    ("calibration.corpus.split=dev", "split"),
    (f"calibration=text_files calibration.corpus.paths=[/tmp/{LONG}.txt]", "longer than a path may be"),
    ("calibration=wikitext2 calibration.corpus.split=dev", "wikitext2 has no split 'dev'"),
    ("calibration=numpydocs calibration.corpus.package=no_such_package", "no_such_package"),
    ("calibration=numpydocs calibration.corpus.package=''", "package"),
    ("calibration=numpydocs calibration.corpus.package=.x", "package"),
    ("calibration=numpydocs calibration.corpus.package=a.b.c", "package"),
    ("hydra.job.chdir=true", "hydra.job.chdir"),
    ("hydra.output_subdir=/etc", "leads out of the run's folder"),
    ("hydra.output_subdir=../x", "leads out of the run's folder"),
    ("hydra.run.dir=", "names no folder"),
    ("hydra.searchpath=[file:///no/such]", "hydra.searchpath names '/no/such'"),
    ("-m hydra.sweep.subdir=/etc pruning.ratio=0.2,0.3", "leads out of the sweep's folder"),
    ("-m hydra.sweep.subdir=x pruning.ratio=0.2,0.3", "one folder for all jobs"),
    ("-m hydra.sweeper.max_batch_size=0 pruning.ratio=0.2,0.3", "hydra.sweeper.max_batch_size=0 is below 1"),
    ("hydra.job_logging.version=2", "Unsupported version: 2"),
    ("hydra.job_logging.root.level=NONSENSE", "hydra.job_logging"),
    ("hydra.job.env_copy=[NO_SUCH_VARIABLE]", "the environment has no variable 'NO_SUCH_VARIABLE'"),
    ("score=../score/heapr", "is a path, not the name of an option"),
    ("score=heapr,fisher", "add -m to run once for each"),
    ("model.revision=main", "model.revision='main' is a version on the hub"),
    ("evaluation.zero_shot.include_path=''", "a path is empty"),
    ("calibration=text_files calibration.corpus.paths=['']", "a path is empty"),
    ("--cfg=nonsense", "invalid choice: 'nonsense'"),
    ("--info nonsense", "invalid choice: 'nonsense'"),
    ("--cfg", "invalid choice: 'tracking=none'"),
    ("--shell-completion", "install"),
    ("hydra/launcher=nonsense", "nonsense"),
    ("-m hydra/launcher=nonsense", "nonsense"),
]  # fmt: skip

FOR_NO_RUN = [
    ("calibration.num_samples=100000000", "calibration.num_samples"),
    ("calibration.num_samples=200000", "cannot give"),
    (
        "calibration.num_samples=8 evaluation/corpora=[pydocs] evaluation.zero_shot.num_fewshot=100000",
        "num_fewshot",
    ),
    ("evaluation.zero_shot.tasks=[pydocs_continuatio]", "did you mean pydocs_continuation"),
    ("model.path=someone/some-model", "the hub cannot be reached"),
    ("calibration=wikitext2 calibration.sequence_length=64", "wikitext2"),
]


def test_a_folder_of_text_that_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    """Otherwise text would be left out in silence. Permissions are no matter for an administrator."""

    def walk(folder: Path, onerror: Callable[[OSError], None]) -> Iterator[tuple[str, list[str], list[str]]]:
        yield str(folder), ["locked"], ["a.txt"]
        onerror(PermissionError(errno.EACCES, "Permission denied", f"{folder}/locked"))

    with mock.patch("os.walk", walk), pytest.raises(ConfigError, match="locked': Permission denied"):
        TextFiles([str(tmp_path)], split="all")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    """In the place of a data set's file, and of a file of tasks."""
    os.mkfifo(tmp_path / "wiki.test.txt")
    os.mkfifo(tmp_path / "task.yaml")
    with pytest.raises(ConfigError, match="should hold one file with 'test' in its name"):
        WikiText2("test", str(tmp_path))
    with pytest.raises(
        ConfigError, match="task.yaml', in a folder of tasks, cannot be read: it is not a file"
    ):
        check_task_name("mine", tmp_path)


@pytest.fixture(autouse=True)
def small_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The docstrings of one package, since those of all take seconds to collect."""
    folder = str(Path(email.__file__).parent)
    monkeypatch.setattr("heapr.text.corpora.sysconfig", SimpleNamespace(get_path=lambda name: folder))


@pytest.mark.parametrize(("arguments", "part"), [*NUMBERS, *NULLS, *KEYS, *NAMES, *FOR_NO_RUN])
def test_a_wrong_argument_is_named_in_one_line(tmp_path: Path, arguments: str, part: str) -> None:
    assert part in (line := refused(tmp_path, *arguments.split(" "), "tracking=none")), line
    assert not list(tmp_path.glob("outputs/artifacts/*/*/manifest.json"))
