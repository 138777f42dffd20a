"""Zero-shot accuracy on one task, through lm-eval.

In: a model and the name of a task. Out: `accuracy/<task>`, `accuracy_norm/<task>`, their standard errors
`accuracy_stderr/<task>` and `accuracy_norm_stderr/<task>`, any other metric of the task as `<metric>/<task>`,
and the exact protocol.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from heapr.errors import ConfigError
from heapr.evaluation import zero_shot_local
from heapr.evaluation.measurement import Material, Need
from heapr.evaluation.zero_shot_engine import evaluate_task
from heapr.evaluation.zero_shot_names import check_task_name
from heapr.evaluation.zero_shot_tasks import (
    LoadedTask,
    check_end_token,
    check_fewshot,
    generates_text,
    load_task,
)
from heapr.files import hash_files, user_path
from heapr.model.load import ModelSource
from heapr.types import Evaluation, Metrics

logger = logging.getLogger(__name__)

PREFIX = "accuracy/"
AVERAGE = f"{PREFIX}average"


class ZeroShot:
    """Evaluates a task of lm-eval, a task of your own, or the built-in task (zero_shot_local.py).

    Args:
        task: name of a task, group or tag.
        num_fewshot: examples before each question, at least 0. None uses the task's default, which is 0 for
            the paper's tasks.
        limit: number of questions of each task to ask, from the first on; at least 1. None asks all.
        batch_size: requests per pass, at least 1, or "auto" for the largest that fits a GPU. Changes the
            result only by rounding.
        include_path: folder with tasks of your own: lm-eval's YAML files, with their code and data.

    Raises:
        ConfigError: the folder does not exist, holds a damaged YAML file, or the task is unknown.
    """

    needs = frozenset({Need.MODEL, Need.TASK})

    def __init__(
        self,
        task: str,
        *,
        num_fewshot: Annotated[int, Ge(0)] | None = None,
        limit: Annotated[int, Ge(1)] | None = None,
        batch_size: Annotated[int, Ge(1)] | Literal["auto"] = "auto",
        include_path: str | None = None,
    ) -> None:
        self.task = task
        self.num_fewshot = num_fewshot
        self.limit = limit
        self.batch_size = batch_size
        self.name = f"{PREFIX}{task}"
        self.objectives = (self.name,)
        self._folder = None if include_path is None else user_path(include_path)
        if self._folder is not None and not self._folder.is_dir():
            raise ConfigError(
                f"evaluation.zero_shot.include_path='{include_path}' is not a folder; give a folder with"
                " lm-eval's YAML files"
            )
        check_task_name(task, self._folder)
        self._loaded: LoadedTask | None = None

    def identity(self) -> dict[str, Any]:
        """What determines the metrics.

        lm-eval's own tasks are identified by its version, your tasks by the content of your folder, and the
        built-in task by its text.
        """
        what = {
            "evaluator": "zero_shot",
            "task": self.task,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "lm_eval": version("lm_eval"),
        }
        if self._is_local:
            return what | zero_shot_local.identity()
        if self._folder is not None:
            what["include_sha256"] = _hash_folder(self._folder)
        return what

    def prepare(self, source: ModelSource) -> None:
        self._tokenizer = source.tokenizer
        self.fetch()
        assert self._loaded is not None
        check_end_token(self._loaded, self._tokenizer)
        check_fewshot(self._loaded, self.num_fewshot)

    def refuse_generation(self) -> None:
        """Refuse tasks that generate text, token after token.

        Raises:
            ConfigError: this is one of them.
        """
        assert self._loaded is not None, "prepare() comes first"
        if generates_text(self._loaded):
            raise ConfigError(
                f"zero-shot task '{self.task}' generates text, and a streamed model would be read from the"
                " disk once for every token; leave the task out, or give runtime.stream=false"
            )

    def fetch(self) -> None:
        """Load the task and its data from the local cache or the hub.

        Raises:
            ConfigError: the task is unknown, or its data cannot be loaded.
        """
        folder = self._folder
        if self._is_local:
            # Deleted together with this object.
            self._made = tempfile.TemporaryDirectory(prefix="heapr-")
            folder = Path(self._made.name)
            zero_shot_local.write_task(folder)
        content = "" if folder is None else _hash_folder(folder)
        self._loaded = load_task(self.task, folder, content)

    def __call__(self, material: Material) -> Evaluation:
        assert self._loaded is not None, "prepare() comes first"
        return evaluate_task(
            self._loaded,
            material.model(),
            tokenizer=self._tokenizer,
            batch_size=self.batch_size,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            ranks=material.ranks,
        )

    @property
    def _is_local(self) -> bool:
        return self.task == zero_shot_local.NAME


def average_accuracy(measurements: Sequence[str], metrics: Metrics) -> Metrics:
    """Unweighted means over tasks, with standard errors.

    `accuracy/average` is the mean of `acc`, as in the paper's main table. `accuracy_norm/average` is the mean
    of `acc_norm`, as in its comparison of scopes, with `acc` for tasks without `acc_norm` (winogrande).

    Args:
        measurements: names of all measurements; names of tasks begin with "accuracy/".
        metrics: their metrics.

    Returns:
        the means. Empty if there are no tasks or one has no accuracy; without `accuracy_norm/average` if no
        task has `acc_norm`.
    """
    tasks = [name.removeprefix(PREFIX) for name in measurements if name.startswith(PREFIX)]
    without = [task for task in tasks if f"accuracy/{task}" not in metrics]
    if not tasks or without:
        if without:
            logger.info("%-9s no average accuracy: %s has none", "evaluate", ", ".join(without))
        return {}
    kinds = dict.fromkeys(tasks, "accuracy")
    averages = _average(kinds, "accuracy", metrics)
    with_norm = [task for task in tasks if f"accuracy_norm/{task}" in metrics]
    if with_norm:
        kinds |= dict.fromkeys(with_norm, "accuracy_norm")
        averages |= _average(kinds, "accuracy_norm", metrics)
    return averages


def _average(kinds: Mapping[str, str], name: str, metrics: Metrics) -> Metrics:
    """Mean accuracy over tasks, and its standard error for independent tasks.

    Args:
        kinds: "accuracy" or "accuracy_norm" by task.
        name: "accuracy" or "accuracy_norm", of the mean.
        metrics: of all tasks.
    """
    values = [metrics[f"{kind}/{task}"] for task, kind in kinds.items()]
    errors = [metrics.get(f"{kind}_stderr/{task}", math.nan) for task, kind in kinds.items()]
    averages = {f"{name}/average": sum(values) / len(kinds)}
    error = math.hypot(*errors) / len(kinds)
    if math.isfinite(error):
        averages[f"{name}_stderr/average"] = error
    return averages


def _hash_folder(folder: Path) -> str:
    """sha256 over names and contents of all files in a folder and its subfolders, without Python's caches."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return hash_files(folder, paths)
