"""lm-eval's own engine on a model in memory, quiet and without side effects.

In: the name of a task, few-shot and limit options, a model. Out: metrics under our names, and how they were
measured. lm-eval is imported where it is needed: it takes seconds. Its cache of results is never used: its
key leaves the model out.
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

# Where lm-eval keeps the paper's tasks. Reading the files of all 14 000 tasks takes a quarter of a minute.
PAPER_FOLDERS = ("openbookqa", "arc", "winogrande", "hellaswag", "piqa", "mathqa")
METRIC_NAMES = {
    "acc": "accuracy",
    "acc_norm": "accuracy_norm",
    "acc_stderr": "accuracy_stderr",
    "acc_norm_stderr": "accuracy_norm_stderr",
}
BOOTSTRAP_DRAWS = (
    1000  # for metrics whose standard error has no closed form; those of acc and acc_norm have one
)
BATCH_SIZE_ON_CPU = 32  # the largest that fits is not the fastest there
MAX_BATCH_SIZE = 64
SEED = 1234  # of the choice of few-shot examples, and of tasks that draw; lm-eval's own default


@dataclass(frozen=True)
class LoadedTask:
    """A task, group or tag of lm-eval with its data.

    Attributes:
        name: as asked for.
        manager: lm-eval's, which knows the task.
        tasks: the single tasks by name.
        roots: what is given to lm-eval: groups, and tasks that belong to none.
    """

    name: str
    manager: Any
    tasks: Mapping[str, Any]
    roots: list[Any]


def load_task(name: str, folder: Path | None, content: str) -> LoadedTask:
    """Find a task and load its data, from the local cache or the hub.

    Args:
        name: of a task, group or tag.
        folder: of further tasks, which come before lm-eval's own.
        content: hash of the folder.

    Raises:
        ConfigError: unknown task, or its data cannot be had.
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
                f"the data of zero-shot task '{name}' are not here: {first_line(error)}; "
                "run python -m heapr.prefetch with the same overrides where there is a network"
            ) from error
        except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"zero-shot task '{name}' cannot be loaded: {first_line(error)}; see lm-eval's page on the"
                " task"
            ) from error
    members = {member for names in loaded["group_map"].values() for member in names}
    roots = [item for key, item in {**loaded["tasks"], **loaded["groups"]}.items() if key not in members]
    return LoadedTask(name, manager, loaded["tasks"], roots)


def check_end_token(task: LoadedTask, tokenizer: PreTrainedTokenizerBase) -> None:
    """lm-eval puts the token for the beginning, or else that for the end, before a text without context, and
    ends generated text at the latter.

    Raises:
        ConfigError: the tokenizer has none that the task needs.
    """
    generates = any(single.OUTPUT_TYPE == "generate_until" for single in task.tasks.values())
    if tokenizer.eos_token_id is not None or (tokenizer.bos_token_id is not None and not generates):
        return
    missing = "token for the end of a text" if generates else "token for the beginning or the end of a text"
    raise ConfigError(
        f"zero-shot task '{task.name}' needs a {missing}, and the model's tokenizer names none; name it as"
        " `eos_token` in its tokenizer_config.json, or leave zero-shot out with evaluation.zero_shot=null"
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
    """Metrics of a task, and of the tasks in it if it is a group.

    Args:
        task: from `load_task`.
        model: dense or pruned.
        tokenizer: the model's own; not changed.
        batch_size: requests per pass, or "auto".
        num_fewshot: examples before each question; none leaves it to the task.
        limit: only the first questions of each task.
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
            "%-9s %s: %d inputs are longer than the model takes and lost their beginning",
            "evaluate",
            task.name,
            len(cut),
        )
    protocols = {name: _protocol(name, single, found, limit) for name, single in task.tasks.items()}
    return Evaluation(_metrics(found["results"]), details={"protocols": protocols})


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> Metrics:
    """lm-eval's numbers, `{task: {"<metric>,<filter>": value}}`, as `<metric>/<task>` or
    `<metric>.<filter>/<task>`."""
    metrics: Metrics = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, answer_filter = key.partition(",")
            if comma and isinstance(value, int | float) and math.isfinite(value):  # not "N/A"
                name = METRIC_NAMES.get(metric, metric)
                metrics[f"{name}/{task}" if answer_filter == "none" else f"{name}.{answer_filter}/{task}"] = (
                    float(value)
                )
    return metrics


def _protocol(name: str, task: Any, found: Mapping[str, Any], limit: int | None) -> ProtocolRecord:
    """What decides whether two results of a task may be compared; the hash is over every context and answer,
    few-shot examples too."""
    settings = found["configs"][name]
    digest = hashlib.sha256()
    for instance in task.instances:
        digest.update(json.dumps(instance.args, default=str).encode())
    return {
        "task": name,
        "version": found["versions"][name],
        "lm_eval": version("lm_eval"),
        "data": "/".join(str(settings[key]) for key in ("dataset_path", "dataset_name") if settings.get(key)),
        "split": settings.get("test_split") or settings.get("validation_split"),
        "num_fewshot": found["n-shot"][name],
        "limit": limit,
        "num_items": found["n-samples"][name]["effective"],
        "requests_sha256": digest.hexdigest(),
    }


@functools.lru_cache(maxsize=4)  # a pure function of the folder's content
def _task_manager(folder: Path | None, content: str, *, everything: bool) -> Any:
    import lm_eval.tasks

    lm_evals = Path(lm_eval.tasks.__file__).parent
    folders = [] if everything else [lm_evals / name for name in PAPER_FOLDERS if (lm_evals / name).is_dir()]
    return lm_eval.tasks.TaskManager(
        include_path=[*folders, *([folder] if folder else [])], include_defaults=everything
    )


@contextmanager
def _quiet(description: str) -> Iterator[list[str]]:
    """One bar of ours in place of lm-eval's bars and messages; yields what it says of requests that it cut.
    Restores."""
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
    says, hidden, listener = (
        logging.getLogger("lm_eval"),
        datasets.are_progress_bars_disabled(),
        _Truncations(),
    )
    for module, bar in bars.items():
        module.tqdm = bar
    datasets.disable_progress_bars()
    says.addHandler(listener)
    says.propagate = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield listener.messages
    finally:
        says.propagate = True
        says.removeHandler(listener)
        for module, bar in previous.items():
            module.tqdm = bar
        if not hidden:
            datasets.enable_progress_bars()


def _bar(**settings: Any) -> Callable[..., Any]:
    """tqdm with settings that its caller cannot change."""
    return lambda *args, **kwargs: tqdm(*args, **{**kwargs, **settings})


class _Truncations(logging.Handler):
    """Collects lm-eval's warnings of requests that are longer than the model takes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "Truncating" in (message := record.getMessage()):
            self.messages.append(message)


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global generators that tasks draw from; restores them."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
