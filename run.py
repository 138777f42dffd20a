"""Prune one Mixture-of-Experts model: calibrate -> score -> prune -> evaluate.

Run:  python run.py                              the built-in model, offline
      python run.py pruning.ratio=0.4            change any field of conf/
      python run.py -m pruning.ratio=0.2,0.4     a sweep
      python run.py --help                       groups and fields
      torchrun --nproc-per-node=2 run.py         several processes share the batches
"""



import sys
from pathlib import Path

from heapr.signals import end_at_once, end_with_parent

if __name__ == "__main__":
    end_at_once()

import hydra
from omegaconf import DictConfig

from heapr.main import explained, one_line_errors, options_of_rank, run_job
from heapr.overrides import options_first
from heapr.ranks import Ranks
from heapr.saved_run import with_saved_run
from heapr.schema import register
from heapr.start_ranks import started_ranks


def main(ranks: Ranks) -> None:
    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def job(config: DictConfig) -> float | None:
        return run_job(config, ranks)

    job()


if __name__ == "__main__":
    register()
    end_with_parent()
    conf = Path(__file__).resolve().parent / "conf"
    with one_line_errors(conf), started_ranks() as ranks, explained(conf):
        arguments = with_saved_run(options_first(sys.argv[1:]), conf)
        sys.argv[1:] = arguments + options_of_rank(ranks, sys.argv[1:])
        main(ranks)
