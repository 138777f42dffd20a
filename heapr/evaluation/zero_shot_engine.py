"""Run lm-eval on a model in memory, without its output and without side effects.

In: the name of a task, few-shot and limit options, a model. Out: metrics under heapr's names, and the
protocol. lm-eval is imported inside functions because its import takes seconds. Its cache of results is never
used, because the cache key does not contain the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from heapr.errors import ConfigError
from heapr.evaluation.zero_shot_local import NAME as LOCAL_TASK
from heapr.hub import hub_is_reachable, no_network
from heapr.model.moe import MoEModel
from heapr.progress import bar_settings
from heapr.types import Evaluation, Metrics, ProtocolRecord
from heapr.words import did_you_mean, first_line

logger = logging.getLogger(__name__)

# lm-eval's folders of the paper's tasks. To read the files of all 14,000 tasks takes about 15 seconds.
PAPER_FOLDERS = ("openbookqa", "arc", "winogrande", "hellaswag", "piqa", "mathqa")
METRIC_NAMES = {
    "acc": "accuracy",
    "acc_norm": "accuracy_norm",
    "acc_stderr": "accuracy_stderr",
    "acc_norm_stderr": "accuracy_norm_stderr",
}
# For metrics whose standard error has no closed form. acc and acc_norm have one.
BOOTSTRAP_DRAWS = 1000
BATCH_SIZE_ON_CPU = 32  # on a CPU, the largest batch that fits is not the fastest
MAX_BATCH_SIZE = 64
SEED = 1234  # of few-shot examples and of tasks that draw random numbers; lm-eval's default


@dataclass(frozen=True)
class LoadedTask:
    """A task, group or tag of lm-eval with its data.

    Attributes:
        name: as requested.
        manager: lm-eval's task manager, which knows the task.
        tasks: single tasks by name.
        roots: what lm-eval is given: groups, and tasks that belong to no group.
    """

    name: str
    manager: Any
    tasks: Mapping[str, Any]
    roots: list[Any]


def load_task(name: str, folder: Path | None, content: str) -> LoadedTask:
    """Find a task and load its data from the local cache or the hub.

    Args:
        name: of a task, group or tag.
        folder: with further tasks, which take precedence over lm-eval's own.
        content: hash of the folder.

    Raises:
        ConfigError: the task is unknown, or its data cannot be loaded.
    """
    network = contextlib.nullcontext() if hub_is_reachable() else no_network()
    with _quiet(name), _seeded(), network:
        manager = _task_manager(folder, content, everything=False)
        if name not in manager.all_tasks:
            manager = _task_manager(folder, content, everything=True)
        if name not in manager.all_tasks:
            suggestion = did_you_mean(name, [*manager.all_tasks, LOCAL_TASK], most=3)
            raise ConfigError(
                f"zero-shot task '{name}' is unknown; {suggestion}lm-eval ls tasks lists all, include_path"
                " adds your own"
            )
        try:
            loaded = manager.load([name])
        except OSError as error:
            raise ConfigError(
                f"the data of zero-shot task '{name}' are not on this machine: {first_line(error)}; "
                "run python -m heapr.prefetch with the same overrides where there is a network"
            ) from error
        except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"zero-shot task '{name}' cannot be loaded: {first_line(error)}; see lm-eval's page on the"
                " task"
            ) from error
    members = {member for names in loaded["group_map"].values() for member in names}
    everything = {**loaded["tasks"], **loaded["groups"]}
    roots = [item for key, item in everything.items() if key not in members]
    return LoadedTask(name, manager, loaded["tasks"], roots)


def generates_text(task: LoadedTask) -> bool:
    """Whether the model has to generate text for it, token after token."""
    return any(single.OUTPUT_TYPE == "generate_until" for single in task.tasks.values())


def check_end_token(task: LoadedTask, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer has the special token that a task needs.

    Before a text without context, lm-eval puts the tokenizer's beginning-of-text token, or its end-of-text
    token if there is no other. Generated text ends at the end-of-text token.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    generates = generates_text(task)
    has_beginning = tokenizer.bos_token_id is not None
    if tokenizer.eos_token_id is not None or (has_beginning and not generates):
        return
    missing = "token for the end of a text" if generates else "token for the beginning or the end of a text"
    raise ConfigError(
        f"zero-shot task '{task.name}' needs a {missing}, which the model's tokenizer does not define; set"
        " `eos_token` in its tokenizer_config.json, or skip zero-shot with evaluation.zero_shot=null"
    )


def evaluate_task(
    task: LoadedTask,
    model: MoEModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | str,
    num_fewshot: int | None,
    limit: int | None,
) -> Evaluation:
    """Evaluate a task, or all tasks of a group.

    Args:
        task: from `load_task`.
        model: dense or pruned.
        tokenizer: the model's; not changed.
        batch_size: requests per pass, or "auto".
        num_fewshot: examples before each question. None uses the task's default.
        limit: number of questions of each task, from the first on. None asks all.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if batch_size == "auto" and model.device.type == "cpu":
        batch_size = BATCH_SIZE_ON_CPU
    with _quiet(task.name) as cut, _seeded(), no_network():
        engine = HFLM(
            pretrained=model.model, backend="causal", tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size, max_batch_size=MAX_BATCH_SIZE,
        )  # fmt: skip
        found = simple_evaluate(
            model=engine, tasks=task.roots, task_manager=task.manager, num_fewshot=num_fewshot, limit=limit,
            bootstrap_iters=BOOTSTRAP_DRAWS, log_samples=False, fewshot_random_seed=SEED,
        )  # fmt: skip
    if cut:
        logger.warning(
            "%-9s %s: %d inputs are longer than the model accepts and lost their beginning",
            "evaluate",
            task.name,
            len(cut),
        )
    protocols = {name: _protocol(name, single, found, limit) for name, single in task.tasks.items()}
    return Evaluation(_metrics(found["results"]), details={"protocols": protocols})


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> Metrics:
    """Rename lm-eval's metrics from `{task: {"<metric>,<filter>": value}}` to `{"<metric>/<task>": value}`.

    Where answers are filtered, the name is `<metric>.<filter>/<task>`. Values that are not finite numbers are
    dropped; lm-eval writes "N/A" for an unknown standard error.
    """
    metrics: Metrics = {}
    for task, values in results.items():
        for key, value in values.items():
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if "," in key and is_number:
                name = _metric_name(key)
                metrics[f"{name}/{task}"] = float(value)
    return metrics


def _metric_name(key: str) -> str:
    """Our name of lm-eval's `<metric>,<filter>`."""
    metric, _, answer_filter = key.partition(",")
    name = METRIC_NAMES.get(metric, metric)
    return name if answer_filter == "none" else f"{name}.{answer_filter}"


def _protocol(name: str, task: Any, found: Mapping[str, Any], limit: int | None) -> ProtocolRecord:
    """What must be equal for two results of a task to be comparable.

    The hash is over every context and answer, including few-shot examples.
    """
    settings = found["configs"][name]
    digest = hashlib.sha256()
    for instance in task.instances:
        digest.update(json.dumps(instance.args, default=str).encode())
    data = [str(settings[key]) for key in ("dataset_path", "dataset_name") if settings.get(key)]
    return {
        "task": name,
        "version": found["versions"][name],
        "lm_eval": version("lm_eval"),
        "data": "/".join(data),
        "split": settings.get("test_split") or settings.get("validation_split"),
        "num_fewshot": found["n-shot"][name],
        "limit": limit,
        "num_items": found["n-samples"][name]["effective"],
        "requests_sha256": digest.hexdigest(),
    }


# Cached, because the result depends only on the arguments: `content` is the hash of the folder.
@functools.lru_cache(maxsize=4)
def _task_manager(folder: Path | None, content: str, *, everything: bool) -> Any:
    """lm-eval's task manager for the paper's tasks, or for all its tasks, with the tasks of a folder."""
    import lm_eval.tasks

    folders: list[Path] = []
    if not everything:
        lm_evals = Path(lm_eval.tasks.__file__).parent
        folders += [lm_evals / name for name in PAPER_FOLDERS if (lm_evals / name).is_dir()]
    if folder is not None:
        folders.append(folder)
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=everything)


@contextmanager
def _quiet(description: str) -> Iterator[list[str]]:
    """Replace lm-eval's progress bars and messages with one progress bar, and restore them afterwards.

    Yields:
        lm-eval's messages about requests that it cut, a list that grows.
    """
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    silent = _bar(disable=True)
    bars = {
        lm_eval.api.model: silent,
        lm_eval.api.task: silent,
        lm_eval.models.huggingface: _bar(desc=description, **bar_settings()),
    }
    previous = {module: module.tqdm for module in bars}
    lm_eval_logger = logging.getLogger("lm_eval")
    was_hidden = datasets.are_progress_bars_disabled()
    listener = _Truncations()
    for module, bar in bars.items():
        module.tqdm = bar
    datasets.disable_progress_bars()
    lm_eval_logger.addHandler(listener)
    lm_eval_logger.propagate = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield listener.messages
    finally:
        lm_eval_logger.propagate = True
        lm_eval_logger.removeHandler(listener)
        for module, bar in previous.items():
            module.tqdm = bar
        if not was_hidden:
            datasets.enable_progress_bars()


def _bar(**settings: Any) -> Callable[..., Any]:
    """tqdm with settings that override those of its caller."""
    return lambda *args, **kwargs: tqdm(*args, **{**kwargs, **settings})


class _Truncations(logging.Handler):
    """Collects lm-eval's warnings about requests that are longer than the model accepts."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "Truncating" in (message := record.getMessage()):
            self.messages.append(message)


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global random generators that tasks use, and restore them afterwards."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
