"""How long steps will take, by how long earlier ones like them took.

In: the store's manifests. Out: expected seconds; none where nothing like a step was made before.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from heapr.artifacts import REPAIR_PART
from heapr.origin import canonical_json
from heapr.store import WHOLE
from heapr.store.inventory import STAGES, intact_manifests


class Kind(Protocol):
    """What tells how long a step takes: its stage, its part of the artifact, and the stage's settings."""

    @property
    def stage(self) -> str: ...

    @property
    def part(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...


class PastSeconds:
    """How long artifacts took to make, from the manifests of a store.

    An artifact is compared with those of the same stage and model: a calibration by its time per token, an
    evaluation with those of the same settings.

    Args:
        artifacts: folder of the store's artifacts.
    """

    def __init__(self, artifacts: Path) -> None:
        manifests = intact_manifests(artifacts)
        self._models: dict[str, Any] = {}  # of each artifact, by key
        for stage in STAGES:
            for manifest in manifests:
                if manifest["stage"] == stage:
                    self._models[manifest["key"]] = self._model(manifest)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for manifest in manifests:
            model = self._models.get(manifest["key"])
            if not _is_comparable(manifest["stage"], manifest["config"]):
                continue
            for part, made in [(WHOLE, manifest), *manifest["parts"].items()]:
                kind, amount = _kind(manifest["stage"], part, manifest["config"], model)
                self._seconds[kind].append(made["seconds"] / amount)

    def _model(self, manifest: Mapping[str, Any]) -> Any:
        """Return an artifact's model: its own, or the one of the artifact that it was made from."""
        model = manifest["config"].get("model")
        if model:
            return model
        for key in manifest["upstream"].values():
            return self._models.get(key)
        return None

    def expected(self, step: Kind, *, model: Any) -> float | None:
        """Return the median time of artifacts like this one; None if there are none.

        Args:
            step: what is to be made.
            model: identity of the dense model.
        """
        kind, amount = _kind(step.stage, step.part, step.config, model)
        if kind not in self._seconds:
            return None
        return statistics.median(self._seconds[kind]) * amount


def _is_comparable(stage: str, config: Mapping[str, Any]) -> bool:
    """Whether the amount of work is known; other versions may have described it otherwise."""
    if stage != "calibrate":
        return True
    counts = (config.get("num_samples"), config.get("sequence_length"))
    return all(isinstance(count, int) and count > 0 for count in counts)


def _kind(stage: str, part: str, config: Mapping[str, Any], model: Any) -> tuple[str, float]:
    """Return a key of artifacts that take equally long per unit of work, and the units of this artifact."""
    amount = config["num_samples"] * config["sequence_length"] if stage == "calibrate" else 1
    settings = config.get("repair") if part == REPAIR_PART else config.get("evaluator")
    return canonical_json([stage, part, model, settings]), amount
