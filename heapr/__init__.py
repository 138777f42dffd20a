"""heapr prunes Mixture-of-Experts language models one atomic expert at a time.

For library users: `heapr.load_pruned`. It is imported on first use, because torch and transformers take
seconds to import.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_pruned":
        from heapr.pruning.load_pruned import load_pruned

        return load_pruned
    raise AttributeError(f"module 'heapr' has no attribute '{name}'")
