"""heapr prunes Mixture-of-Experts language models one atomic expert at a time.

As a library, on a transformers model in memory:

    pruned = heapr.prune(model, tokenizer, texts, ratio=0.25, recipe="stock")
    pruned.save_pretrained(folder)

`heapr.calibrate`, `heapr.score` and `heapr.evaluate` are its steps, and `heapr.load_pruned` loads a pruned
checkpoint. Each is imported on first use, because torch and transformers take seconds to import.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heapr.errors import ConfigError
    from heapr.library.functions import calibrate, evaluate, prune, score
    from heapr.library.pruned import Pruned
    from heapr.pruning.load_pruned import load_pruned

__version__ = "0.1.0"

__all__ = ["ConfigError", "Pruned", "__version__", "calibrate", "evaluate", "load_pruned", "prune", "score"]

_MODULES = {
    "ConfigError": "heapr.errors",
    "Pruned": "heapr.library.pruned",
    "calibrate": "heapr.library.functions",
    "evaluate": "heapr.library.functions",
    "load_pruned": "heapr.pruning.load_pruned",
    "prune": "heapr.library.functions",
    "score": "heapr.library.functions",
}


class _ScorePackage(ModuleType):
    """heapr/score, the folder of criteria, has the name of a function; called, it is that function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `heapr.library.functions.score`."""
        return import_module(_MODULES["score"]).score(*args, **kwargs)


# Now, because importing a criterion later would put the package in the place of the function.
import_module("heapr.score")
sys.modules["heapr.score"].__class__ = _ScorePackage


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'heapr' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
