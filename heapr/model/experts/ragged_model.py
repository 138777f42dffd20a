"""What a family's classes need beyond their own to have ragged experts.

It is mixed into each of them, in heapr and in the modelling file beside a checkpoint.

Copied beside pruned checkpoints and loaded where heapr is not installed: it imports torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .layout import is_ragged, widths_of
from .ragged import make_ragged

EXPERTS = "experts"  # the last or last but one word of what a parallel plan says of them


class RaggedModel(nn.Module):
    """Comes before the family's class among the bases.

    The configuration's `expert_widths` says how wide every expert is, by the name of its layer's experts in
    the causal language model.
    """

    base_model_prefix: str
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        new = dict(self._widths_of_own(config.expert_widths))
        make_ragged(self, new)
        for name in new:
            self._init_weights(self.get_submodule(name))

    def _widths_of_own(
        self, expert_widths: Mapping[str, Sequence[int]]
    ) -> Iterator[tuple[str, Sequence[int]]]:
        """By the names in this model, those that are not as wide yet."""
        prefix = f"{self.base_model_prefix}."
        for name, widths in expert_widths.items():
            own = name if hasattr(self, self.base_model_prefix) else name.removeprefix(prefix)
            experts = self.get_submodule(own)
            if not (is_ragged(experts) and widths_of(experts) == list(widths)):
                yield own, widths

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As families do it: matrices normal, biases zero. transformers keeps torch.nn.init from weights that
        were loaded."""
        if not is_ragged(module):
            super()._init_weights(module)  # type: ignore[misc]  # the family's
            return
        deviation = getattr(self.config.get_text_config(), "initializer_range", 0.02)
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=deviation)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As in the family, whose file transformers looks into."""
        family = next(each for each in cls.__mro__ if not issubclass(each, RaggedModel))
        can_set: bool = family._can_set_experts_implementation()  # type: ignore[attr-defined]
        return can_set


def without_experts(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A family's plan for several devices without its routed experts: every device has ragged ones whole, and
    what they put out is not summed over devices."""
    if plan is None:
        return None
    return {name: how for name, how in plan.items() if EXPERTS not in name.split(".")[-2:]}
