"""The files of every artifact and run: their names, and how to write and read them.

No other module names one. In and out: typed results (heapr/types.py) and folders. torch is imported only
where tensors are read or written, so that reports and sweeps, which need only names and JSON, start at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heapr.errors import ConfigError
from heapr.files import hash_file, write_json, write_text
from heapr.words import first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from heapr.types import (
        Evaluation,
        Plan,
        Pruning,
        RepairedWeights,
        Scores,
        Statistics,
        TensorDict,
        TokenWindows,
    )

ARTIFACTS, RUNS, SWEEPS = "artifacts", "runs", "sweeps"  # folders in the folder of outputs

# Every artifact: what it is, and size and hash of each file.
MANIFEST = "manifest.json"

# calibrate
TOKENS, STATISTICS = "tokens.safetensors", "statistics.safetensors"
# score
SCORES = "scores.safetensors"
# prune
PLAN, ALLOCATION = "plan.safetensors", "allocation.json"
SUPER_EXPERTS = "super_experts"  # in the report of an allocation
# prune, part "repair"
REPAIRED, REPAIR = "repaired.safetensors", "repair.json"
# prune, part "checkpoint": a folder, and the file in it that is written last
CHECKPOINT, CARD = "checkpoint", "README.md"
# and a folder in it for the plan: vLLM would read it as weights among them
PLANS = "heapr"
# evaluate
METRICS, DETAILS = "metrics.json", "details.json"

# A run; a job of a sweep that failed has an error.txt.
SUMMARY, ERROR, LOG = "summary.json", "error.txt", "run.log"

REPAIR_PART, CHECKPOINT_PART = "repair", "checkpoint"  # parts of a prune artifact (heapr/store.py)

Report = dict[str, Any]  # JSON types only; "summary" and "not_reached" are lines to read


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an artifact, as it is; None if the folder holds no artifact, or a damaged one."""
    try:
        manifest = _read_json(folder / MANIFEST)
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def write_calibration(folder: Path, made: tuple[TokenWindows, Statistics]) -> None:
    tokens, statistics = made
    _save(folder / TOKENS, tokens.to_tensors())
    _save(folder / STATISTICS, statistics.to_tensors())


def read_tokens(folder: Path) -> TokenWindows:
    from heapr.types import TokenWindows

    return TokenWindows.from_tensors(_load(folder / TOKENS))


def read_statistics(folder: Path) -> Statistics:
    from heapr.types import Statistics

    return Statistics.from_tensors(_load(folder / STATISTICS))


def write_scores(folder: Path, scores: Scores) -> None:
    _save(folder / SCORES, scores.to_tensors())


def read_scores(folder: Path) -> Scores:
    from heapr.types import Scores

    return Scores.from_tensors(_load(folder / SCORES))


def write_plan(
    folder: Path, made: tuple[Plan, Report], *, model: Mapping[str, str], is_repaired: bool
) -> None:
    """Write the plan and the report of the allocation.

    The plan's metadata say which model it belongs to, so that `heapr.load_pruned` can check it.

    Args:
        folder: receives the files.
        made: the plan for the dense model, and the report.
        model: identity of the dense model.
        is_repaired: whether the pruned model also needs the repaired weights, a later part of the artifact.
    """
    plan, report = made
    belongs_to = {"model": json.dumps(dict(model))}
    if is_repaired:
        belongs_to["repaired"] = REPAIRED
    write_json(folder / ALLOCATION, report)
    _save(folder / PLAN, plan.to_tensors(), belongs_to)


def copy_plan(folder: Path, copy: Path, *, code: Path) -> None:
    """Copy a plan, and add the hashes of the Python files that a checkpoint is read with.

    Args:
        folder: holds the plan.
        copy: the folder that receives it.
        code: the checkpoint's folder.
    """
    from safetensors import safe_open

    with safe_open(folder / PLAN, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    _save(copy / PLAN, _load(folder / PLAN), metadata | _hashes_of_code(code))


def write_card_and_plan(checkpoint: Path, card: str, plan: Plan) -> None:
    """Write into a checkpoint what `PLANS` and `CARD` say, without the identity of the dense model."""
    write_text(checkpoint / CARD, card)
    (checkpoint / PLANS).mkdir()
    _save(checkpoint / PLANS / PLAN, plan.to_tensors(), _hashes_of_code(checkpoint))


def _hashes_of_code(checkpoint: Path) -> dict[str, str]:
    """What a plan says about the Python files that a checkpoint is read with."""
    hashes = {path.name: hash_file(path) for path in sorted(checkpoint.glob("*.py"))}
    return {"code_sha256": json.dumps(hashes)} if hashes else {}


def read_plan(folder: Path) -> Plan:
    from heapr.types import Plan

    return Plan.from_tensors(_load(folder / PLAN))


def read_kept(folder: Path) -> dict[int, NDArray[Any]] | None:
    """The plan as numpy arrays (E, F) by decoder layer index, for reports; None if there is no plan.

    Raises:
        ConfigError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return {int(name.removeprefix("layers.")): kept_EF for name, kept_EF in tensors.items()}


def read_allocation(folder: Path) -> Report:
    return _must_read_json(folder / ALLOCATION)


def read_super_experts(folder: Path) -> list[dict[str, Any]]:
    """The fields of each `SuperExpert` in the report of an allocation; empty where there is none."""
    report = _read_json(folder / ALLOCATION) or {}
    return list(report.get(SUPER_EXPERTS, ()))


def write_repair(folder: Path, made: tuple[Pruning, Report], *, plan_folder: Path) -> None:
    """Write the weights that repair changed, and its report.

    The metadata of the weights say which plan they belong to, so that `heapr.load_pruned` can check it.

    Args:
        folder: receives the files.
        made: the plan with the repaired weights, and the report.
        plan_folder: holds the plan's file.
    """
    from heapr.tensors_file import save_layers

    pruning, report = made
    assert pruning.repaired is not None
    belongs_to = {"plan": hash_file(plan_folder / PLAN)}
    save_layers(folder / REPAIRED, pruning.repaired, belongs_to)
    write_json(folder / REPAIR, report)


def read_repaired(folder: Path) -> RepairedWeights:
    """The repaired weights, each layer's read when it is asked for."""
    from heapr.tensors_file import LayersFile

    return LayersFile(folder / REPAIRED)


def read_repair(folder: Path) -> Report:
    return _must_read_json(folder / REPAIR)


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write the metrics, and the details if there are any."""
    write_json(folder / METRICS, evaluation.metrics)
    if evaluation.details:
        write_json(folder / DETAILS, evaluation.details)


def read_evaluation(folder: Path) -> Evaluation:
    from heapr.types import Evaluation

    metrics, details = _must_read_json(folder / METRICS), read_details(folder)
    return Evaluation(metrics, details or {})


def read_details(folder: Path) -> dict[str, Any] | None:
    """The details of an evaluation; None if it has none."""
    return _read_json(folder / DETAILS)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    write_json(folder / SUMMARY, summary)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run; None if it did not finish."""
    return _read_json(folder / SUMMARY)


def write_error(folder: Path, line: str) -> None:
    write_text(folder / ERROR, line + "\n")


def clear_error(folder: Path) -> None:
    (folder / ERROR).unlink(missing_ok=True)


def read_error(folder: Path) -> str | None:
    """Why a run failed, in one line; None if there is no error.txt."""
    path = folder / ERROR
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any] | None:
    return _must_read_json(path) if path.is_file() else None


def _must_read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, TypeError(f"it holds a {type(content).__name__}, not an object"))
    return content


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"'{path}' is damaged ({first_line(error)}); remove it, and run the same command again"
    )


def _save(path: Path, tensors: TensorDict, metadata: Mapping[str, str] | None = None) -> None:
    from heapr.tensors_file import save_tensors

    save_tensors(path, tensors, metadata)


def _load(path: Path) -> TensorDict:
    from safetensors.torch import load_file

    tensors: TensorDict = load_file(path)
    return tensors
