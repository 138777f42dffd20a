"""Heads that predict further tokens: whether a pruned checkpoint has them, or says that it has none.

In: their tensors in the original's files, and the checkpoint's form. Out: what is copied, and a line on it.
transformers computes with no such head; engines do, for speculation.
"""

from __future__ import annotations

from collections.abc import Collection

from heapr.model.left_out import summary

KEPT, LEFT_OUT = (
    "prediction_heads_kept",
    "prediction_heads_left_out",
)  # in what a checkpoint says about itself
OLD_SHAPES = "masked"  # the form in which experts have their old shapes
OWN_CLASS = ("uniform", "fewer_experts")  # forms that engines load with the family's own class


def why_left_out(heads: Collection[str], form: str, *, is_quantised: bool) -> str | None:
    """Why heads cannot be in a checkpoint; None if they can, which is unchanged."""
    if is_quantised:
        return "they are quantised, and the checkpoint is not"
    has_experts = any("expert" in name for name in heads)
    if form == OLD_SHAPES or (form in OWN_CLASS and not has_experts):
        return None
    if form in OWN_CLASS:
        return "their experts have the old shape, and config.json gives the new one for all"
    return f"no engine computes with them in pruning.form={form}"


def describe_heads(heads: Collection[str], why: str | None) -> str:
    """The line about them, for the log and the dry run."""
    what = f"heads that predict further tokens ({summary(heads)})"
    if why is None:
        return f"{what} are copied into the checkpoint unchanged"
    return f"{what} are left out of the checkpoint, whose config.json gives their number as 0: {why}"
