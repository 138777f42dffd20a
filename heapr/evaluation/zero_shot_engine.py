"""Run lm-eval on a model in memory.

In: a loaded task, few-shot and limit options, a model. Out: metrics under heapr's names, and the protocol.
lm-eval is imported inside functions because its import takes seconds. Its cache of results is never used,
because the cache key does not contain the model.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedTokenizerBase

from heapr.evaluation.zero_shot_quiet import SEED, quiet, seeded
from heapr.evaluation.zero_shot_tasks import LoadedTask
from heapr.hub import no_network
from heapr.model.moe import MoEModel
from heapr.ranks import Ranks
from heapr.types import Evaluation, Metrics, ProtocolRecord

logger = logging.getLogger(__name__)

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
CUT = "%-9s %s: %d inputs are longer than the model accepts and lost their beginning"


def evaluate_task(  # noqa: PLR0913 - the options of lm-eval, and the ranks
    task: LoadedTask,
    model: MoEModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | str,
    num_fewshot: int | None,
    limit: int | None,
    ranks: Ranks,
) -> Evaluation:
    """Evaluate a task, or all tasks of a group. Several processes share its requests.

    Args:
        task: from `load_task`.
        model: dense or pruned.
        tokenizer: the model's; not changed.
        batch_size: requests per pass, or "auto".
        num_fewshot: examples before each question. None uses the task's default.
        limit: number of questions of each task, from the first on. None asks all.
        ranks: the processes, of which rank 0 returns the metrics.
    """
    from lm_eval import simple_evaluate

    with quiet(task.name) as cut, seeded(), no_network():
        engine = _engine(model, tokenizer, batch_size)
        _share_requests(engine, ranks)
        found = simple_evaluate(
            model=engine, tasks=task.roots, task_manager=task.manager, num_fewshot=num_fewshot, limit=limit,
            bootstrap_iters=BOOTSTRAP_DRAWS, log_samples=False, fewshot_random_seed=SEED,
        )  # fmt: skip
    if found is None:  # lm-eval gives results to the first process of a machine alone
        assert not ranks.is_first
        return Evaluation({})
    if cut:
        logger.warning(CUT, "evaluate", task.name, len(cut))
    protocols = {name: _protocol(name, single, found, limit) for name, single in task.tasks.items()}
    metrics = _metrics(found["results"])
    return Evaluation(metrics, details={"protocols": protocols})


def _engine(model: MoEModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str) -> Any:
    """lm-eval's view of a model in memory; "auto" is a fixed batch size on a CPU."""
    from lm_eval.models.huggingface import HFLM

    if batch_size == "auto" and model.device.type == "cpu":
        batch_size = BATCH_SIZE_ON_CPU
    return HFLM(
        pretrained=model.model, backend="causal", tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size, max_batch_size=MAX_BATCH_SIZE,
    )  # fmt: skip


def _share_requests(engine: Any, ranks: Ranks) -> None:
    """Let each rank answer its share of the requests, and give all answers to all of them.

    lm-eval's own ranks need a model that lm-eval loads.

    Args:
        engine: lm-eval's model; its methods are replaced.
        ranks: the processes.
    """
    if ranks.size == 1:
        return
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        answer = getattr(engine, name)
        setattr(engine, name, functools.partial(_answer_share, answer, ranks))


def _answer_share(
    answer: Callable[..., list[Any]], ranks: Ranks, requests: list[Any], **options: Any
) -> list[Any]:
    shared = ranks.share(requests)
    answers = ranks.in_order(answer(shared, **options) if shared else [])
    # A log-likelihood and whether the answer is the most likely one; JSON has no tuples.
    return [tuple(found) if isinstance(found, list) else found for found in answers]


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
