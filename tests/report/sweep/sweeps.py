"""Jobs made by hand: what a sweep of a published model could have left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from heapr.report.sweep.results import JobResult

PROTOCOL = {"task": "x", "window": 2048, "joiner": "\n\n", "num_tokens": 1000, "tokens_sha256": "ab"}
MODEL = {"name": "hf", "path": "Some/Mix-1.5-A2B", "dtype": "bfloat16"}


def config(
    ratio: float = 0.25, criterion: str = "Heapr", scope: str = "global", **calibration: Any
) -> dict[str, Any]:
    corpus = {"_target_": "heapr.text.published_corpora.WikiText2", "split": "train"}
    return {
        "model": MODEL,
        "calibration": {
            "corpus": corpus,
            "num_samples": 128,
            "sequence_length": 2048,
            "seed": 0,
            **calibration,
        },
        "score": {"_target_": f"heapr.score.gradient.{criterion}"},
        "pruning": {"ratio": ratio, "scope": scope, "width_multiple": 1, "form": "ragged"},
        "paths": {"outputs": "outputs"},
    }


def job(
    number: int, pruned: dict[str, float], settings: dict[str, Any] | None = None, **summary: Any
) -> JobResult:
    """A finished job with the pruned model's metrics; the unpruned model is the same in all of them."""
    settings = settings or config()
    ratio = settings["pruning"]["ratio"]
    metrics = {
        "dense": {"perplexity/wikitext2": 7.5, "accuracy/piqa": 0.75, "accuracy_stderr/piqa": 0.01},
        "pruned": pruned,
        "size": {
            "atomic_experts_removed_ratio": ratio,
            "flops_removed_ratio": ratio / 2,
            "flops_routed_removed_ratio": 0.8 * ratio,
            "parameters_removed_ratio": 0.9 * ratio,
        },
        "comparison": {},
    }
    protocols = {variant: {"wikitext2": dict(PROTOCOL)} for variant in ("dense", "pruned")}
    content = {"metrics": metrics, "protocols": protocols, "stages": [], "config": settings} | summary
    overrides = (f"pruning.ratio={ratio}",)
    return JobResult(number, overrides, folder=None, summary=content, error=None)


def failed(number: int, *overrides: str, error: str = "FloatingPointError: NaN in layer 3") -> JobResult:
    return JobResult(number, overrides, folder=None, summary=None, error=error)


def write_published(folder: Path, *lines: str) -> Path:
    """results.csv with `model,ratio,method,metric,value,source` lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").write_text("\n".join(["model,ratio,method,metric,value,source", *lines]) + "\n")
    return folder


def write_details(folder: Path, name: str, details: dict[str, Any]) -> dict[str, Any]:
    """The artifact of an evaluation; returns its entry among a summary's stages."""
    folder.mkdir(parents=True)
    (folder / "details.json").write_text(json.dumps(details))
    return {
        "stage": "evaluate",
        "what": name,
        "key": folder.name,
        "path": str(folder),
        "cached": True,
        "seconds": 0.0,
        "peak_memory_bytes": 0,
    }
