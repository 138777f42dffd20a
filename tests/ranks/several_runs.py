"""Run several experiments with all ranks: python tests/ranks/several_runs.py FOLDER NAME=OPTIONS ..."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from heapr.main import one_line_errors
from heapr.run_experiment import run
from heapr.start_ranks import started_ranks
from tests.experiment import compose_experiment


def main(folder: Path, experiments: dict[str, list[str]]) -> None:
    with one_line_errors(), started_ranks() as ranks:
        for name, options in experiments.items():
            run_folder = folder / name / f"run-{ranks.rank}"
            run_folder.mkdir(parents=True)
            config = compose_experiment(
                "tracking=none", f"paths.outputs={folder / name / 'outputs'}", *options
            )
            summary = run(config, run_folder, ranks=ranks)
            (folder / name / f"rank-{ranks.rank}.json").write_text(json.dumps(asdict(summary)["metrics"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
