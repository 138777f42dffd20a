"""lm-eval without its output and without side effects.

In: what is being done, for a progress bar. Out: context managers that restore what they change.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from heapr.progress import bar_settings

SEED = 1234  # of few-shot examples and of tasks that draw random numbers; lm-eval's default


@contextmanager
def quiet(description: str) -> Iterator[list[str]]:
    """Replace lm-eval's progress bars and messages with one progress bar, and restore them afterwards.

    Yields:
        lm-eval's messages about requests that it cut, a list that grows.
    """
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    silent = _bar(disable=True)
    bars = {
        lm_eval.api.model: silent,
        lm_eval.api.task: silent,
        lm_eval.models.huggingface: _bar(desc=description, **bar_settings()),
    }
    previous = {module: module.tqdm for module in bars}
    lm_eval_logger = logging.getLogger("lm_eval")
    was_hidden = datasets.are_progress_bars_disabled()
    listener = _Truncations()
    for module, bar in bars.items():
        module.tqdm = bar
    datasets.disable_progress_bars()
    lm_eval_logger.addHandler(listener)
    lm_eval_logger.propagate = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield listener.messages
    finally:
        lm_eval_logger.propagate = True
        lm_eval_logger.removeHandler(listener)
        for module, bar in previous.items():
            module.tqdm = bar
        if not was_hidden:
            datasets.enable_progress_bars()


def _bar(**settings: Any) -> Callable[..., Any]:
    """tqdm with settings that override those of its caller."""
    return lambda *args, **kwargs: tqdm(*args, **{**kwargs, **settings})


class _Truncations(logging.Handler):
    """Collects lm-eval's warnings about requests that are longer than the model accepts."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "Truncating" in (message := record.getMessage()):
            self.messages.append(message)


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the global random generators that tasks use, and restore them afterwards."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
