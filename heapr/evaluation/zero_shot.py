"""Zero-shot accuracy on one task, through lm-eval.

In: a model and the name of a task. Out: `accuracy/<task>`, `accuracy_norm/<task>`, their standard errors as
`accuracy_stderr/<task>` and `accuracy_norm_stderr/<task>`, any other metric of the task as `<metric>/<task>`,
and how exactly it was measured.
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
from heapr.evaluation.zero_shot_engine import LoadedTask, check_end_token, evaluate_task, load_task
from heapr.files import hash_files, user_path
from heapr.model.load import ModelSource
from heapr.types import Evaluation, Metrics

logger = logging.getLogger(__name__)

PREFIX = "accuracy/"


class ZeroShot:
    """One task of lm-eval, one of your own, or the one that is made here (zero_shot_local.py).

    Args:
        task: name of a task, group or tag.
        num_fewshot: examples before each question, at least 0; none leaves it to the task: 0 for the paper's.
        limit: only the first questions of each task, at least 1; none takes all.
        batch_size: requests per pass, at least 1, or "auto": the largest that fits a GPU; changes the result
            by rounding alone.
        include_path: folder with tasks of your own: lm-eval's YAML files, and the code and data beside them.

    Raises:
        ConfigError: there is no such folder.
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
        self.task, self.num_fewshot, self.limit, self.batch_size = task, num_fewshot, limit, batch_size
        self.name = f"{PREFIX}{task}"
        self._folder = None if include_path is None else user_path(include_path)
        if self._folder is not None and not self._folder.is_dir():
            raise ConfigError(
                f"evaluation.zero_shot.include_path='{include_path}' is no folder; give one with lm-eval's"
                " YAML files"
            )
        self._loaded: LoadedTask | None = None

    def identity(self) -> dict[str, Any]:
        """lm-eval's version stands for its own tasks; the content of your folder, or of the text, for those
        made here."""
        what = {
            "evaluator": "zero_shot",
            "task": self.task,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "lm_eval": version("lm_eval"),
        }
        if self._is_local:
            return what | zero_shot_local.identity()
        return what if self._folder is None else what | {"include_sha256": _hash_folder(self._folder)}

    def prepare(self, source: ModelSource) -> None:
        self._tokenizer = source.tokenizer
        self.fetch()
        assert self._loaded is not None
        check_end_token(self._loaded, self._tokenizer)

    def fetch(self) -> None:
        """Load the task and its data: from the local cache, or from the hub.

        Raises:
            ConfigError: unknown task, or its data cannot be had.
        """
        folder = self._folder
        if self._is_local:
            self._made = tempfile.TemporaryDirectory(prefix="heapr-")  # goes with this object
            folder = Path(self._made.name)
            zero_shot_local.write_task(folder)
        self._loaded = load_task(self.task, folder, "" if folder is None else _hash_folder(folder))

    def __call__(self, material: Material) -> Evaluation:
        assert self._loaded is not None, "prepare() comes first"
        return evaluate_task(
            self._loaded,
            material.model(),
            tokenizer=self._tokenizer,
            batch_size=self.batch_size,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
        )

    @property
    def _is_local(self) -> bool:
        return self.task == zero_shot_local.NAME


def average_accuracy(measurements: Sequence[str], metrics: Metrics) -> Metrics:
    """Plain means over the tasks and their standard errors: `accuracy/average` of `acc`, as the paper's main
    table takes it, and `accuracy_norm/average` of `acc_norm`, as its comparison of scopes does, with `acc` of
    tasks that have no other (winogrande).

    Args:
        measurements: names of all; those of tasks begin with "accuracy/".
        metrics: what they measured.

    Returns:
        nothing if there is no task, or one that has no accuracy; no `accuracy_norm/average` if no task has
        `acc_norm`.
    """
    tasks = [name.removeprefix(PREFIX) for name in measurements if name.startswith(PREFIX)]
    without = [task for task in tasks if f"accuracy/{task}" not in metrics]
    if not tasks or without:
        if without:
            logger.info("%-9s no average accuracy: %s has none", "evaluate", ", ".join(without))
        return {}
    average = _average(dict.fromkeys(tasks, "accuracy"), "accuracy", metrics)
    kinds = {task: "accuracy_norm" if f"accuracy_norm/{task}" in metrics else "accuracy" for task in tasks}
    return average | (_average(kinds, "accuracy_norm", metrics) if "accuracy_norm" in kinds.values() else {})


def _average(kinds: Mapping[str, str], name: str, metrics: Metrics) -> Metrics:
    """Mean over tasks of the kind of accuracy that each has; its standard error is that of independent
    tasks."""
    average = {f"{name}/average": sum(metrics[f"{kind}/{task}"] for task, kind in kinds.items()) / len(kinds)}
    error = math.hypot(
        *(metrics.get(f"{kind}_stderr/{task}", math.nan) for task, kind in kinds.items())
    ) / len(kinds)
    return average | ({f"{name}_stderr/average": error} if math.isfinite(error) else {})


def _hash_folder(folder: Path) -> str:
    """sha256 over names and contents of all files below the folder but Python's caches."""
    return hash_files(
        folder, (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    )
