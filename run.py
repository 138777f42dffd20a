"""Prune one Mixture-of-Experts model: calibrate -> score -> prune -> evaluate.

Run:  python run.py                              the built-in model, offline
      python run.py pruning.ratio=0.4            change any field of conf/
      python run.py -m pruning.ratio=0.2,0.4     a sweep
      python run.py --help                       groups and fields
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from heapr.main import one_line_errors, run_job
from heapr.overrides import options_first
from heapr.schema import register
from heapr.signals import end_with_parent


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    run_job(config)


if __name__ == "__main__":
    register()
    end_with_parent()
    with one_line_errors(Path(__file__).resolve().parent / "conf"):
        sys.argv[1:] = options_first(sys.argv[1:])
        main()
