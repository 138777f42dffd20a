"""What the stages pass to each other: frozen, shape-checked containers of tensors, and their form on disk.

Shape letters: L MoE layers, T tokens, D model width, E routed experts of a layer, F atomic experts of one
expert, N sequences, W window length. Layers are keyed by decoder layer index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor

TensorDict = dict[str, Tensor]

MAXIMA = frozenset({"ph_abs_max_EF"})  # merged by maximum; every other statistic is a sum


@dataclass(frozen=True)
class TokenWindows:
    """Token ids cut into sequences of equal length.

    Attributes:
        ids_NW: token ids (N, W), int64; int32 for a whole corpus, which is only stored.
    """

    ids_NW: Tensor

    def __post_init__(self) -> None:
        assert self.ids_NW.dim() == 2 and self.ids_NW.dtype in (torch.int64, torch.int32)

    @property
    def num_predicted_tokens(self) -> int:
        """N (W - 1): every token but the first of each window is predicted."""
        num_windows, length = self.ids_NW.shape
        return num_windows * (length - 1)

    @property
    def sha256(self) -> str:
        """Fingerprint of the shape and of every token id."""
        shape = tuple(self.ids_NW.shape)
        digest = hashlib.sha256(f"{shape}\0".encode())
        for rows_NW in self.ids_NW.split(1024):
            content = rows_NW.cpu().contiguous().numpy().astype("<i8")
            digest.update(content.tobytes())
        return digest.hexdigest()

    def to_tensors(self) -> TensorDict:
        return {"ids": self.ids_NW.long()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TokenWindows:
        return cls(ids_NW=tensors["ids"])


NOT_PREDICTED = -100  # label of a token that does not count in the loss, as transformers has it


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, without padding, and which of their tokens are predicted.

    Attributes:
        ids_NW: token ids (N, W), int64.
        labels_NW: what is predicted at each place from the tokens before it, int64: the token itself, or
            `NOT_PREDICTED`. The first of a sequence is never predicted.
    """

    ids_NW: Tensor
    labels_NW: Tensor

    def __post_init__(self) -> None:
        assert self.ids_NW.dim() == 2 and self.ids_NW.dtype == torch.int64
        assert self.labels_NW.shape == self.ids_NW.shape and self.labels_NW.dtype == torch.int64

    @classmethod
    def of(cls, tokens: Tokens) -> Batch:
        """The batch itself; of token ids, the batch in which every token is predicted."""
        return tokens if isinstance(tokens, Batch) else cls(tokens, tokens)

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        ids_NW = self.ids_NW.to(device)
        are_all_predicted = self.labels_NW is self.ids_NW
        return Batch(ids_NW, ids_NW if are_all_predicted else self.labels_NW.to(device))

    @property
    def num_predicted(self) -> Tensor:
        """How many tokens of each sequence are predicted, int64 (N,)."""
        is_predicted_NW = self.labels_NW[:, 1:] != NOT_PREDICTED
        return is_predicted_NW.sum(dim=1)


Tokens = Tensor | Batch  # token ids int64 (N, W) stand for the batch in which every token is predicted


@dataclass(frozen=True)
class LayerStatistics:
    """Running statistics of one MoE layer over calibration tokens (docs/method.md), float64.

    h is the intermediate activation of an atomic expert, g = dloss/dh with the loss *summed* over predicted
    tokens, p the router weight, y = E(x) the expert's output before it is multiplied by p. Each is a sum over
    the tokens routed to the expert, except for the one maximum.

    Attributes:
        count_E: number of routed tokens.
        router_weight_sum_E: sum p.
        output_norm_sum_E: sum p * ||y||.
        h_sq_sum_EF, g_sq_sum_EF, gh_sq_sum_EF: sum h^2, sum g^2, sum (g h)^2.
        gh_sum_EF, h_abs_sum_EF: sum g h, sum |h|.
        ph_sq_sum_EF, ph_abs_max_EF: sum (p h)^2, max |p h|.
    """

    count_E: Tensor
    router_weight_sum_E: Tensor
    output_norm_sum_E: Tensor
    h_sq_sum_EF: Tensor
    g_sq_sum_EF: Tensor
    gh_sq_sum_EF: Tensor
    gh_sum_EF: Tensor
    h_abs_sum_EF: Tensor
    ph_sq_sum_EF: Tensor
    ph_abs_max_EF: Tensor

    def __post_init__(self) -> None:
        for name, tensor in self.items():
            expected = self.shape if name.endswith("_EF") else self.shape[:1]
            assert tensor.shape == expected, (name, tensor.shape)
            assert tensor.dtype == torch.float64, (name, tensor.dtype)

    @property
    def shape(self) -> torch.Size:
        """(E, F)."""
        return self.h_sq_sum_EF.shape

    @classmethod
    def zeros(cls, num_experts: int, width: int, device: torch.device) -> LayerStatistics:
        """Statistics of no tokens, to which others are added."""
        tensors = {}
        for name in cls.names():
            shape = (num_experts, width) if name.endswith("_EF") else (num_experts,)
            tensors[name] = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(**tensors)

    @classmethod
    def names(cls) -> list[str]:
        """The names of all statistics."""
        return [field.name for field in fields(cls)]

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and tensors."""
        return [(name, getattr(self, name)) for name in self.names()]

    @property
    def num_bytes(self) -> int:
        return sum(int(tensor.nbytes) for tensor in vars(self).values())

    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """Statistics of the union of two disjoint token sets."""
        assert self.shape == other.shape
        merged = {}
        for name, mine in self.items():
            theirs = getattr(other, name)
            merged[name] = torch.maximum(mine, theirs) if name in MAXIMA else mine + theirs
        return LayerStatistics(**merged)


@dataclass(frozen=True)
class Statistics:
    """Calibration statistics of a model.

    Attributes:
        layers: statistics by decoder layer index.
        num_tokens: tokens that went through the model.
        num_predicted_tokens: how many of them were predicted; the N of docs/method.md.
        loss_sum: cross-entropy in nats, summed over the predicted tokens.
    """

    layers: Mapping[int, LayerStatistics]
    num_tokens: int
    num_predicted_tokens: int
    loss_sum: float

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of the union of two disjoint sets of sequences."""
        assert self.layers.keys() == other.layers.keys()
        layers = {index: layer.merge(other.layers[index]) for index, layer in self.layers.items()}
        return Statistics(
            layers=layers,
            num_tokens=self.num_tokens + other.num_tokens,
            num_predicted_tokens=self.num_predicted_tokens + other.num_predicted_tokens,
            loss_sum=self.loss_sum + other.loss_sum,
        )

    def to_tensors(self) -> TensorDict:
        tensors = {
            "num_tokens": torch.tensor(self.num_tokens, dtype=torch.int64),
            "num_predicted_tokens": torch.tensor(self.num_predicted_tokens, dtype=torch.int64),
            "loss_sum": torch.tensor(self.loss_sum, dtype=torch.float64),
        }
        for index, layer in self.layers.items():
            for name, tensor in layer.items():
                tensors[_key_on_disk(index, name)] = tensor.cpu()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        layers = {}
        for index in _layer_indices(tensors):
            of_layer = {name: tensors[_key_on_disk(index, name)] for name in LayerStatistics.names()}
            layers[index] = LayerStatistics(**of_layer)
        return cls(
            layers=layers,
            num_tokens=int(tensors["num_tokens"]),
            num_predicted_tokens=int(tensors["num_predicted_tokens"]),
            loss_sum=float(tensors["loss_sum"]),
        )


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of one layer's routed experts, filled up with zeros where an expert is narrower than F.

    Attributes:
        gate_EFD, up_EFD: rows k produce h_k (docs/method.md, 1); gate is None in families without one.
        down_EDF: column k is w_k.
    """

    gate_EFD: Tensor | None
    up_EFD: Tensor
    down_EDF: Tensor

    def __post_init__(self) -> None:
        num_experts, width, model_width = self.up_EFD.shape
        assert self.gate_EFD is None or self.gate_EFD.shape == self.up_EFD.shape
        assert self.down_EDF.shape == (num_experts, model_width, width)


@dataclass(frozen=True)
class Scores:
    """Importance of every atomic expert, bigger is more important: float32 (E, F) by decoder layer index.

    Raises:
        FloatingPointError: one is NaN or infinite; the message names it.
    """

    layers: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        for index, scores_EF in self.layers.items():
            assert scores_EF.dim() == 2, (index, scores_EF.shape)
            assert scores_EF.dtype == torch.float32, (index, scores_EF.dtype)
            bad_N2 = (~scores_EF.isfinite()).nonzero()
            if len(bad_N2) > 0:
                expert, place = bad_N2[0].tolist()
                raise FloatingPointError(
                    f"score: atomic expert {place} of expert {expert} of layer {index} is"
                    f" {scores_EF[expert, place]}, not a finite number; look at the criterion, or use a wider"
                    " model.dtype"
                )

    def to_tensors(self) -> TensorDict:
        return {f"layers.{index}": scores_EF for index, scores_EF in self.layers.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Scores:
        return cls(layers=_by_layer(tensors))


class Granularity(Enum):
    """What is removed as one piece. The criterion determines it, and allocation follows."""

    ATOMIC_EXPERT = "atomic expert"
    EXPERT = "expert"


@dataclass(frozen=True)
class Plan:
    """Which atomic experts are kept: bool (E, F) by decoder layer index, true = kept.

    Places beyond the width of an expert that is narrower than F are false.
    """

    layers: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        for index, kept_EF in self.layers.items():
            assert kept_EF.dim() == 2, (index, kept_EF.shape)
            assert kept_EF.dtype == torch.bool, (index, kept_EF.dtype)
            assert kept_EF.any(), f"layer {index} would lose all its experts"

    @property
    def num_kept(self) -> int:
        return sum(int(kept_EF.sum()) for kept_EF in self.layers.values())

    @property
    def widths(self) -> dict[int, list[int]]:
        """Number of kept atomic experts of every expert, by decoder layer index."""
        return {index: kept_EF.sum(dim=1).tolist() for index, kept_EF in self.layers.items()}

    def then(self, later: Plan) -> Plan:
        """Combine this plan with a later one, which is for the model that this one leaves."""
        layers = {}
        for index, earlier_EF in self.layers.items():
            kept_EF = earlier_EF.clone()
            for kept_F, later_F in zip(kept_EF, later.layers[index], strict=True):
                atomic_S = kept_F.nonzero().flatten()
                kept_F[atomic_S] = later_F[: len(atomic_S)]
            layers[index] = kept_EF
        return Plan(layers=layers)

    def after(self, earlier: Plan) -> Plan:
        """Restrict this plan to the model that an earlier one leaves: the inverse of `then`.

        `earlier.then(plan.after(earlier))` is `plan`, which must keep only what the earlier one kept.
        """
        layers = {}
        for index, kept_EF in self.layers.items():
            earlier_EF = earlier.layers[index]
            is_back = (kept_EF & ~earlier_EF).any()
            assert not is_back, f"layer {index} would get back atomic experts that it lost"
            rows = [kept_F[earlier_F] for kept_F, earlier_F in zip(kept_EF, earlier_EF, strict=True)]
            layers[index] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Plan(layers=layers)

    def to_tensors(self) -> TensorDict:
        return {f"layers.{index}": kept_EF for index, kept_EF in self.layers.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Plan:
        return cls(layers=_by_layer(tensors))


# By decoder layer index and parameter name, in the form in which ragged experts hold them.
RepairedWeights = Mapping[int, TensorDict]


@dataclass(frozen=True)
class Pruning:
    """What pruning makes of a model.

    Attributes:
        plan: which of the dense model's atomic experts are kept.
        repaired: the weights that repair changed; None if there was no repair.
    """

    plan: Plan
    repaired: RepairedWeights | None = None

    def __post_init__(self) -> None:
        for index, tensors in (self.repaired or {}).items():
            assert len(tensors["down_proj"]) == int(self.plan.layers[index].sum()), index

    @staticmethod
    def repaired_from_tensors(tensors: Mapping[str, Tensor]) -> RepairedWeights:
        layers: dict[int, TensorDict] = {index: {} for index in _layer_indices(tensors)}
        for key, tensor in tensors.items():
            _, index, name = key.split(".", maxsplit=2)
            layers[int(index)][name] = tensor
        return layers


Metrics = dict[str, float]  # by contract name, for example "perplexity/pydocs"
ProtocolRecord = dict[str, Any]  # how a result was measured, JSON types only


@dataclass(frozen=True)
class Evaluation:
    """What a measurement found.

    Attributes:
        metrics: numbers by contract name, for metrics.json, tables and trackers.
        details: whatever else is worth keeping, such as lists, matrices, and "protocols", a `ProtocolRecord`
            for each corpus or task. JSON types only; written to details.json unless empty.
    """

    metrics: Metrics
    details: dict[str, Any] = field(default_factory=dict)


def _key_on_disk(index: int, statistic: str) -> str:
    """Name of a layer's statistic in a file, without the letters of its shape."""
    name, _, _ = statistic.rpartition("_")
    return f"layers.{index}.{name}"


def _layer_indices(tensors: Mapping[str, Tensor]) -> list[int]:
    parts = [name.split(".") for name in tensors]
    indices = {int(part[1]) for part in parts if part[0] == "layers"}
    return sorted(indices)


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Tensors named "layers.{i}", by decoder layer index."""
    return {index: tensors[f"layers.{index}"] for index in _layer_indices(tensors)}
