"""What the artifact of each stage, and each part, is made of: names of files, and what tensors are in them.

In: a folder of files. Out: nothing, or what is wrong with it. Only headers of files of tensors are read, and
what ties a part to the plan that it was made from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from heapr import artifacts
from heapr.artifacts import CHECKPOINT, CHECKPOINT_PART, REPAIR_PART
from heapr.files import hash_file
from heapr.sealed import DamagedError

Check = Callable[[Path], None]

LAYER = r"layers\.\d+"
# For each pattern of names, the dtype as safetensors calls it (None: any), and the number of dimensions.
Tensors = Mapping[str, tuple[str | None, Collection[int]]]
TOKENS: Tensors = {"ids": ("I64", {2})}
STATISTICS: Tensors = {
    "num_tokens": ("I64", {0}),
    "num_predicted_tokens": ("I64", {0}),
    "loss_sum": ("F64", {0}),
    rf"{LAYER}\.\w+": ("F64", {1, 2}),
}
SCORES: Tensors = {LAYER: ("F32", {2})}
PLAN: Tensors = {LAYER: ("BOOL", {2})}
REPAIRED: Tensors = {rf"{LAYER}\..+": (None, {1, 2, 3})}


@dataclass(frozen=True)
class Contents:
    """The files of an artifact, or of a part.

    Attributes:
        required: how each file that must be there is checked.
        optional: the same for files that may be there.
        folder: name of a folder in which any other files may be; empty if there is none.
    """

    required: Mapping[str, Check]
    optional: Mapping[str, Check] = field(default_factory=dict)
    folder: str = ""

    def has_place_for(self, name: str) -> bool:
        """Whether a file of this name may be there."""
        is_in_folder = bool(self.folder) and f"{name}/".startswith(f"{self.folder}/")
        return name in self.required or name in self.optional or is_in_folder

    def check(self, path: Path, names: Collection[str]) -> None:
        """Check that all files are there, that there is a place for each, and what is in them.

        Args:
            path: folder of the files.
            names: of the files, relative to it.

        Raises:
            DamagedError: they are not what they must be.
        """
        for name in self.required:
            if name not in names:
                raise DamagedError(f"{name} is missing in the manifest")
        for name in names:
            if not self.has_place_for(name):
                raise DamagedError(f"{name} is not a file of such an artifact")
        for name, check in {**self.required, **self.optional}.items():
            if name in names:
                check(path / name)


def contents_of(stage: str, part: str) -> Contents | None:
    """The contents of a part, or of a stage's artifact itself; None for an unknown stage.

    Args:
        stage: of the artifact.
        part: its name; empty for the artifact itself.
    """
    return CONTENTS[stage].get(part) if stage in CONTENTS else None


def _check_tensors(path: Path, tensors: Tensors) -> None:
    """Check names, dtypes and numbers of dimensions of all tensors of a file."""
    headers = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(name)
                headers[name] = (tensor.get_dtype(), tensor.get_shape())
    except SafetensorError as error:
        raise DamagedError(f"{path.name} is not a file of tensors") from error
    for name, (dtype, shape) in headers.items():
        problem = _problem_of_tensor(name, dtype, shape, tensors=tensors)
        if problem is not None:
            raise DamagedError(f"{name} in {path.name} {problem}")
    for pattern in tensors:
        if not any(re.fullmatch(pattern, name) for name in headers):
            raise DamagedError(f"{path.name} has no {pattern}")


def _problem_of_tensor(name: str, dtype: str, shape: list[int], *, tensors: Tensors) -> str | None:
    """What is wrong with a tensor; None if nothing is."""
    for pattern, (expected, dimensions) in tensors.items():
        if re.fullmatch(pattern, name):
            is_fitting = expected in {None, dtype} and len(shape) in dimensions
            return None if is_fitting else f"is {dtype} {shape}"
    return "does not belong there"


def _check_repaired(path: Path) -> None:
    """Check repaired weights, and that they were made for the plan beside them."""
    _check_tensors(path, REPAIRED)
    with safe_open(path, framework="np") as file:
        belongs_to = (file.metadata() or {}).get("plan")
    plan = path.with_name(artifacts.PLAN)
    if not plan.is_file() or belongs_to != hash_file(plan):
        raise DamagedError(f"{path.name} belongs to another plan")


def _check_copied_plan(path: Path) -> None:
    """Check the plan in a checkpoint, and that it is the artifact's."""
    _check_tensors(path, PLAN)
    plan = path.parents[2] / artifacts.PLAN
    try:
        is_same = plan.is_file() and _same_tensors(path, plan)
    except SafetensorError as error:
        raise DamagedError(f"{plan.name} is not a file of tensors") from error
    if not is_same:
        raise DamagedError(f"{CHECKPOINT} belongs to another plan")


def _same_tensors(path: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, whatever their metadata say."""
    import numpy as np

    with safe_open(path, framework="np") as file, safe_open(other, framework="np") as other_file:
        names = set(file.keys())
        if names != set(other_file.keys()):
            return False
        pairs = [(file.get_tensor(name), other_file.get_tensor(name)) for name in names]
        return all(np.array_equal(tensor, other_tensor) for tensor, other_tensor in pairs)


def _check_json(path: Path) -> None:
    """Check that a file holds a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path.name} is not JSON") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path.name} is not a JSON object")


def _anything(path: Path) -> None:
    """What such a file holds is for its readers to say."""


def _tensors(tensors: Tensors) -> Check:
    return partial(_check_tensors, tensors=tensors)


# By stage and part.
CONTENTS: Mapping[str, Mapping[str, Contents]] = {
    "calibrate": {
        "": Contents({artifacts.TOKENS: _tensors(TOKENS), artifacts.STATISTICS: _tensors(STATISTICS)})
    },
    "score": {"": Contents({artifacts.SCORES: _tensors(SCORES)})},
    "prune": {
        "": Contents({artifacts.PLAN: _tensors(PLAN), artifacts.ALLOCATION: _check_json}),
        REPAIR_PART: Contents({artifacts.REPAIRED: _check_repaired, artifacts.REPAIR: _check_json}),
        CHECKPOINT_PART: Contents(
            {
                f"{CHECKPOINT}/config.json": _check_json,
                f"{CHECKPOINT}/{artifacts.CARD}": _anything,
                f"{CHECKPOINT}/{artifacts.PLANS}/{artifacts.PLAN}": _check_copied_plan,
            },
            folder=CHECKPOINT,
        ),
    },
    "evaluate": {"": Contents({artifacts.METRICS: _check_json}, {artifacts.DETAILS: _check_json})},
}
