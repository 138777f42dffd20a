"""Ranks of which one fails, with everybody else at work meanwhile."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from heapr import process_group
from heapr.one_line_errors import one_line_errors
from heapr.origin import Origin
from heapr.ranks import Ranks
from heapr.shared_folder import check_is_shared
from heapr.start_ranks import started_ranks
from heapr.store import Store

FAILED = "failed-now"  # a file, made when a rank fails


def compute(ranks: Ranks, how: str, folder: Path) -> str:
    if how != "nobody" and ranks.rank == 1:
        time.sleep(0.5)
        (folder / FAILED).touch()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this rank has had enough")
    if how != "nobody" and ranks.rank == 2:
        time.sleep(120)  # computes, and looks at nothing
    total = ranks.total(ranks.rank)  # rank 0 waits in a collective
    return f"{total} {ranks.gather([ranks.rank, 0.1])} {ranks.in_order(ranks.share('abcde'))}"


def main(folder: Path, how: str) -> None:
    with one_line_errors(), started_ranks() as ranks:
        ranks.check_same(
            "configuration", {"pruning.ratio": 0.25 if how != "other" or ranks.rank < 2 else 0.5}
        )
        root = folder / str(ranks.rank) if how == "blind" else folder
        store = Store(root, torch.device("cpu"), ranks=ranks)
        check_is_shared(root, ranks)
        origin = Origin(stage="made", version=1, config={}, upstream={})
        artifact = store.get(
            origin,
            lambda: compute(ranks, how, root),
            lambda path, text: (path / "found.txt").write_text(text),
        )
        assert (artifact.path / "found.txt").is_file()
        ranks.barrier()


def main_of_other_code(folder: Path, other: Path) -> None:
    """Rank 1 runs the code of another folder."""
    if os.environ["RANK"] == "1":
        process_group.__file__ = str(other / "process_group.py")
    main(folder, "nobody")
