"""Provides the models of an experiment: the dense one, the pruned one, or both.

In: how to load the dense model, and what is done to it. Out: `MoEModel`s. A model is loaded when it is first
asked for, and cut in place. A caller keeps no model beyond its own step: the next step may cut it further, or
need its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from heapr.errors import TooLargeError
from heapr.model.check_walk import check_walk
from heapr.model.moe import MoEModel
from heapr.model.shelf import Files
from heapr.model.stream import check_stream
from heapr.pruning.fewer_experts import make_fewer_experts
from heapr.pruning.layer_repair import LayerRepair, Repair
from heapr.pruning.repaired import RepairedLayers
from heapr.pruning.surgery import mask, remove, remove_and_repair
from heapr.pruning.uniform import Settings, make_uniform
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.types import Plan, Pruning


@dataclass(frozen=True)
class _Held:
    """A pruned model, and the plan that made it from the dense one."""

    model: MoEModel
    plan: Plan


class ModelProvider:
    """Provides dense and pruned models with as few loads as possible.

    Args:
        load: loads the dense model anew.
        repair: refits the kept weights; None leaves them unchanged.
        form: the final model's form (`pruning.form`).
        stock_settings: what a form in the family's own class changes in the configuration; else empty.
        ranks: the processes that repair together.
    """

    def __init__(
        self,
        load: Callable[[], MoEModel],
        *,
        repair: Repair | None,
        form: str,
        stock_settings: Settings,
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        self._ranks = ranks
        self._load, self._repair, self._form, self._stock_settings = load, repair, form, stock_settings
        self._dense: MoEModel | None = None
        self._pruned: _Held | None = None
        self._masked: MoEModel | None = None

    def dense(self) -> MoEModel:
        """The dense model; loaded again if it has been cut since.

        Raises:
            ConfigError: it cannot be loaded, or its family does not support the repair.
        """
        if self._dense is None:
            self._dense = self._load()
            if self._repair:
                if not self._dense.is_streamed:  # otherwise it has been checked
                    check_walk(self._dense, needed_by="pruning.repair", instead="pruning/repair=none")
                if self._repair.follows_stream:
                    check_stream(self._dense)
        return self._dense

    def pruned(self, pruning: Pruning) -> MoEModel:
        """The pruned model, cut from the model of an earlier round if that is in memory."""
        if self._pruned is None or not _same(self._pruned.plan, pruning.plan):
            model, plan = self._next(pruning.plan)
            remove(model, plan, pruning.repaired)
            self._pruned = _Held(model, pruning.plan)
        return self._pruned.model

    def repaired(
        self,
        plan: Plan,
        earlier: Pruning | None,
        batches: Callable[[], Sequence[Tensor]],
        files: Files | None = None,
    ) -> tuple[Pruning, dict[int, LayerRepair]]:
        """Cut and repair the model that the round before left.

        Args:
            plan: for the dense model.
            earlier: the result of the round before, made now or read from the store; None in the first round.
            batches: returns the calibration batches, int64 (N, W) each.
            files: for the repaired weights, with those that an earlier process finished.

        Returns:
            the plan with the repaired weights, and what repair found, by decoder layer index.
        """
        assert self._repair is not None
        if earlier is not None:
            self.pruned(earlier)
        model, relative = self._next(plan)
        repaired = RepairedLayers(files)
        found = remove_and_repair(
            model, relative, self._repair, batches(), repaired=repaired, ranks=self._ranks
        )
        if not model.is_streamed:  # else it would go on reading files that are removed now
            self._pruned = _Held(model, plan)
        return Pruning(plan, repaired), found

    def final(self, pruning: Pruning) -> MoEModel:
        """The pruned model after the last round, in the form in which it is measured and saved.

        That is ragged, uniform (in the family's own class) or masked (zeros in the old shape).
        """
        if self._form == "masked":
            return self._masked_by(pruning)
        model = self.pruned(pruning)
        if self._stock_settings and model.is_ragged:
            make_stock = make_uniform if self._form == "uniform" else make_fewer_experts
            make_stock(model, self._stock_settings)
        return model

    def both(self, pruning: Pruning) -> tuple[MoEModel, MoEModel]:
        """The dense and the final model at the same time.

        Raises:
            TooLargeError: they do not fit on the device together.
        """
        pruned = self.final(pruning)  # first, because it cuts the dense model if that is in memory
        try:
            return self.dense(), pruned
        except TooLargeError as error:
            raise TooLargeError(
                f"the dense and the pruned model do not fit on '{pruned.model.device}' together; leave out"
                " what compares them: evaluation.fidelity=null evaluation.throughput=null (all other results"
                " are in the store)"
            ) from error

    def _masked_by(self, pruning: Pruning) -> MoEModel:
        """The dense model with zeros for what the last round removed; replaces the ragged one in memory."""
        if self._masked is None:
            self._masked = self.dense()
            self._dense = self._pruned = None
            mask(self._masked, pruning.plan, pruning.repaired)
        return self._masked

    def _next(self, plan: Plan) -> tuple[MoEModel, Plan]:
        """Hand over the model to cut next, and the plan relative to it."""
        if self._pruned is not None:
            held, self._pruned = self._pruned, None
            return held.model, plan.after(held.plan)
        model = self.dense()
        self._dense = None
        return model, plan


def _same(one: Plan, other: Plan) -> bool:
    return all(bool((kept_EF == other.layers[index]).all()) for index, kept_EF in one.layers.items())
