"""The artifact store. `python -m heapr.store` says what is in it (heapr/store/commands.py)."""

from heapr.store.artifact import Artifact
from heapr.store.store import WHOLE, Store

__all__ = ["WHOLE", "Artifact", "Store"]
