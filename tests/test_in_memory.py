"""When the model of an experiment is loaded, what cannot be done with it is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from heapr.errors import ConfigError
from heapr.in_memory import ModelInMemory
from heapr.model.moe import MoEModel
from heapr.pruning.repair import ExpertRepair, JointRepair, Repair
from tests.tiny import SHARED_INSIDE, deep_model


def in_memory(repair: Repair | None, **changes: object) -> ModelInMemory:
    source = SimpleNamespace(load=lambda *_: MoEModel(deep_model("gemma4", **changes)))
    return ModelInMemory(SimpleNamespace(source=source, device=torch.device("cpu"), device_map=None, repair=repair))


def test_layers_that_cannot_be_run_one_by_one_are_refused_for_repair_alone() -> None:
    with pytest.raises(ConfigError, match="pruning.repair: Gemma4ForCausalLM cannot be run layer by layer: .*; give pruning/repair=none"):
        in_memory(ExpertRepair(), **SHARED_INSIDE["gemma4"]).dense()
    in_memory(None, **SHARED_INSIDE["gemma4"]).dense()
    in_memory(ExpertRepair()).dense()


def test_a_stream_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ConfigError, match="pruning.repair.target=residual_stream: layer 0 of Gemma4ForCausalLM does not just add"):
        in_memory(JointRepair(target="residual_stream")).dense()
