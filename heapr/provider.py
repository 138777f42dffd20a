"""Gives the models of an experiment: the dense one, what pruning made of it, or both. Loaded when first asked
for, cut in place.

In: how the dense model is had, and what is done to it. Out: `MoEModel`s. Whoever asks keeps no model beyond
its own step: the next one may cut it further, or need its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from heapr.errors import TooLargeError
from heapr.model.check_walk import check_walk
from heapr.model.experts.layout import layout_of
from heapr.model.moe import MoEModel
from heapr.model.stream import check_stream
from heapr.pruning.layer_repair import LayerRepair, Repair
from heapr.pruning.surgery import mask, remove, remove_and_repair
from heapr.pruning.uniform import Settings, make_uniform
from heapr.types import Plan, Pruning


@dataclass(frozen=True)
class _Held:
    """A pruned model, and the plan that led to it from the dense one."""

    model: MoEModel
    plan: Plan


class ModelProvider:
    """Gives dense and pruned models with as few loads as it takes.

    Args:
        load: gives the dense model anew.
        repair: how the rest makes up for what is removed; None leaves it as it is.
        form: of the final model: ragged, uniform or masked.
        uniform_settings: what the uniform form changes in the model's configuration.
    """

    def __init__(
        self, load: Callable[[], MoEModel], *, repair: Repair | None, form: str, uniform_settings: Settings
    ) -> None:
        self._load, self._repair, self._form, self._uniform_settings = load, repair, form, uniform_settings
        self._dense: MoEModel | None = None
        self._pruned: _Held | None = None
        self._masked: MoEModel | None = None

    def dense(self) -> MoEModel:
        """The model as it was; loaded once more if it has been cut since.

        Raises:
            ConfigError: it cannot be loaded, or not repaired as asked.
        """
        if self._dense is None:
            self._dense = self._load()
            if self._repair:
                check_walk(self._dense, needed_by="pruning.repair", instead="pruning/repair=none")
                if self._repair.follows_stream:
                    check_stream(self._dense)
        return self._dense

    def pruned(self, pruning: Pruning) -> MoEModel:
        """The model cut to what is kept: further, if a model of an earlier round is there."""
        if self._pruned is None or not _same(self._pruned.plan, pruning.plan):
            model, plan = self._next(pruning.plan)
            remove(model, plan, pruning.repaired)
            self._pruned = _Held(model, pruning.plan)
        return self._pruned.model

    def repaired(
        self, plan: Plan, earlier: Pruning | None, batches: Callable[[], Sequence[Tensor]]
    ) -> tuple[Pruning, dict[int, LayerRepair]]:
        """Cut and repair the model of the round before; what became of it, and what was found for each layer.

        Args:
            plan: for the dense model.
            earlier: what the round before made, now or in a run whose results are in the store; None for the
                first.
            batches: gives those of the calibration.
        """
        assert self._repair is not None
        if earlier is not None:
            self.pruned(earlier)
        model, relative = self._next(plan)
        found = remove_and_repair(model, relative, self._repair, batches())
        self._pruned = _Held(model, plan)
        names = [layout_of(model.layers[0].experts).input_name] if self._repair.refits_inputs else []
        tensors = {
            layer.index: {name: layer.experts.get_parameter(name).detach() for name in [*names, "down_proj"]}
            for layer in model.layers
        }
        return Pruning(plan, tensors), found

    def final(self, pruning: Pruning) -> MoEModel:
        """The pruned model after the last round, as its checkpoint holds it: ragged, in the family's own
        class, or with zeros. What is measured is what is written."""
        if self._form == "masked":
            return self._masked_by(pruning)
        model = self.pruned(pruning)
        if self._uniform_settings and model.is_ragged:
            make_uniform(model, self._uniform_settings)
        return model

    def both(self, pruning: Pruning) -> tuple[MoEModel, MoEModel]:
        """The dense and the final model at once.

        Raises:
            TooLargeError: they do not fit on the device.
        """
        pruned = self.final(pruning)  # first: it takes the dense model, if there is one
        try:
            return self.dense(), pruned
        except TooLargeError as error:
            raise TooLargeError(
                f"the dense and the pruned model do not fit on '{pruned.model.device}' together; leave out"
                " what compares them: evaluation.fidelity=null evaluation.throughput=null (all other results"
                " are in the store)"
            ) from error

    def _masked_by(self, pruning: Pruning) -> MoEModel:
        """The dense model with zeros for what the last round removed; the ragged one is given up for it."""
        if self._masked is None:
            self._masked, self._dense, self._pruned = self.dense(), None, None
            mask(self._masked, pruning.plan, pruning.repaired)
        return self._masked

    def _next(self, plan: Plan) -> tuple[MoEModel, Plan]:
        """The model to cut next, and the plan for it. It is given away: whoever needs a dense model
        afterwards loads it anew."""
        if self._pruned is not None:
            held, self._pruned = self._pruned, None
            return held.model, plan.after(held.plan)
        model, self._dense = self.dense(), None
        return model, plan


def _same(one: Plan, other: Plan) -> bool:
    return all(bool((kept_EF == other.layers[index]).all()) for index, kept_EF in one.layers.items())
