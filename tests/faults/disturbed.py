"""An experiment that is killed and started again, and what must be true of its store meanwhile and in the end."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from heapr.artifacts import ARTIFACTS
from heapr.origin import Origin
from heapr.store import Store
from heapr.store.inventory import entries
from heapr.store.verify import Hashes, verify
from tests.experiment import write_model, write_texts
from tests.faults.attempts import Ended, attempt
from tests.faults.points import killed_at
from tests.store.mutations import data_of

NOT_MEASURED = [f"evaluation.{name}=null" for name in ("throughput", "truth", "efficiency")]
KILLED = -9


def read_counts(file: Path) -> dict[str, int]:
    """How often each point was passed; see `killed_at`."""
    lines = [line.split(" ", 1) for line in file.read_text().splitlines()]
    return {name: int(number) for number, name in lines}


def leftovers(root: Path) -> list[Path]:
    """What is in a store besides artifacts and locks, once something else has been made in it.

    A holder's name that was being written goes after a day.
    """
    last = Origin("last", 1, {}, {})
    shutil.rmtree(root / "last", ignore_errors=True)
    Store(root, torch.device("cpu")).get(last, lambda: None, lambda folder, _: (folder / "x").touch())
    shutil.rmtree(root / "last")
    hidden = root.glob("[!.]*/.*")
    return [path for path in hidden if path.suffix != ".lock" and ".lock.holder.tmp-" not in path.name]


class Disturbed:
    """A small experiment of all steps, and its undisturbed results.

    Args:
        folder: receives model, texts and results.
        is_streamed: whether the model is read one layer at a time.
    """

    def __init__(self, folder: Path, *, is_streamed: bool) -> None:
        self._folder, self.is_streamed = folder, is_streamed
        model = write_model(folder / "model", num_hidden_layers=3)
        small = ["calibration.batch_size=1", "runtime.checkpoint_seconds=0"]
        texts = write_texts(folder)
        self._options = ["model=hf", f"model.path={model}", "model.dtype=float32", *texts, *small]
        self._options += [*NOT_MEASURED, "pruning/repair=stream", "pruning.ratio=0.4", "tracking=none"]
        self._options += [f"runtime.stream={str(is_streamed).lower()}"]
        counts = folder / "counts.txt"
        self.outputs = folder / "undisturbed"
        ended = self.start(counts=str(counts))
        assert ended.code == 0, ended.output
        self._expected = self._results()
        self.counts = read_counts(counts)
        self.begin()

    @cached_property
    def seconds(self) -> float:
        """What an undisturbed run takes."""
        self.begin()
        return self.start().seconds

    @property
    def root(self) -> Path:
        """Of the store."""
        return self.outputs / ARTIFACTS

    def begin(self) -> None:
        """Begin with an empty folder of results."""
        self.outputs = self._folder / "outputs"
        shutil.rmtree(self.outputs, ignore_errors=True)

    def start(self, *, point: str = "", time: int = 1, counts: str | None = None, **signal: Any) -> Ended:
        """Start run.py; see `killed_at` and `attempt`."""
        arguments = [*self._options, f"paths.outputs={self.outputs}"]
        return attempt(killed_at, point, time, counts, arguments, **signal)

    def check_visible(self) -> None:
        """Check that whatever a reader can see now is whole."""
        for entry in entries(self.root):
            assert entry.manifest is not None, entry
            for part in ["", *entry.parts]:
                verify(entry.path, part, Hashes(None))

    def finish(self) -> None:
        """Start again without disturbance; check that results are as without any, and that nothing is left."""
        ended = self.start()
        assert ended.code == 0, ended.output
        self.check_end()

    def check_end(self) -> None:
        self.check_visible()
        assert not leftovers(self.root)
        metrics, data = self._results()
        expected_metrics, expected_data = self._expected
        assert metrics == expected_metrics
        assert data.keys() == expected_data.keys()
        assert [name for name, content in data.items() if content != expected_data[name]] == []

    def _results(self) -> tuple[Any, dict[str, bytes]]:
        """Metrics of the last run, and the content of all artifacts' files."""
        last = max(self.outputs.glob("runs/**/summary.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(last.read_text())["metrics"], data_of(self.root)
