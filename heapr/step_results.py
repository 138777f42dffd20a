"""Gives a step the results of earlier steps.

In: a step. Out: typed results, read from the files of the steps that it needs. They stay in memory only as
long as a later step needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from heapr import artifacts
from heapr.steps import Step, Steps
from heapr.store import Store
from heapr.types import Plan, Pruning, Scores, Statistics, TokenWindows

READERS: Mapping[str, Callable[[Path], Any]] = {  # by kind of step
    "calibrate": artifacts.read_statistics,
    "score": artifacts.read_scores,
    "prune": artifacts.read_plan,
    artifacts.REPAIR_PART: artifacts.read_repaired,
}


class StepResults:
    """Reads what a step needs.

    Args:
        store: where the files are.
        steps: of the experiment.
        tokens: the calibration tokens; None if the calibration is in the store.
    """

    def __init__(self, store: Store, steps: Steps, tokens: TokenWindows | None) -> None:
        self._store, self._steps, self._drawn_tokens = store, steps, tokens
        self._read: dict[str, Any] = {}  # by id of the step that made it

    def folder(self, step: Step) -> Path:
        """Folder of the artifact that a step makes or adds a part to."""
        return self._store.path(step.origin)

    def of(self, step: Step) -> Any:
        """What a step made: statistics, scores, the plan or repaired weights."""
        if step.id not in self._read:
            self._read[step.id] = self._store.read(step.origin, READERS[step.kind], step.part)
        return self._read[step.id]

    def statistics(self, step: Step) -> Statistics:
        found: Statistics = self.of(step.needs["statistics"])
        return found

    def scores(self, step: Step) -> Scores:
        found: Scores = self.of(step.needs["scores"])
        return found

    def plan(self, step: Step) -> Plan:
        found: Plan = self.of(step.needs["plan"])
        return found

    def pruning(self, step: Step) -> Pruning | None:
        """What was done to the model that a step works on; None if that is the dense model."""
        finished = step.needs.get("pruning")
        if finished is None:
            return None
        if finished.kind == artifacts.REPAIR_PART:
            return Pruning(self.plan(finished), self.of(finished))
        return Pruning(self.of(finished))

    def tokens(self, step: Step) -> TokenWindows:
        """Tokens of the first calibration, which all later steps use too."""
        if "tokens" in step.needs:
            return self._store.read(step.needs["tokens"].origin, artifacts.read_tokens)
        assert self._drawn_tokens is not None, "the calibration was in the store and is not any more"
        return self._drawn_tokens

    def forget(self, step: Step) -> None:
        """Free the results that no later step needs."""
        later_steps = self._steps.after(step)
        needed = {earlier.id for later in later_steps for earlier in later.needs.values()}
        self._read = {name: result for name, result in self._read.items() if name in needed}
