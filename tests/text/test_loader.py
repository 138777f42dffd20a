"""Batches of a data loader: padding counts nowhere, labels say what is predicted."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import heapr
from heapr.errors import ConfigError
from heapr.text.loader import read_batches
from heapr.types import NOT_PREDICTED
from tests import oracle
from tests.tiny import VOCABULARY_SIZE, tiny_ids, tiny_qwen3_moe

LENGTHS = [12, 5, 9, 12, 5, 7]
PADDING = 3  # a token that means something where it is no padding


def sequences() -> list[Tensor]:
    ids_NW = tiny_ids(num_sequences=len(LENGTHS), length=max(LENGTHS))
    return [row[:length] for row, length in zip(ids_NW, LENGTHS, strict=True)]


def padded(side: str, *, labels: bool = False) -> list[dict[str, Tensor]]:
    """Two batches of the sequences, padded to one length; the first half of each is not predicted."""
    batches = []
    for rows in (sequences()[:3], sequences()[3:]):
        longest = max(len(row) for row in rows)
        fields: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            missing = longest - len(row)
            pad = (missing, 0) if side == "left" else (0, missing)
            label = row.clone()
            label[: len(row) // 2] = NOT_PREDICTED
            fields["input_ids"].append(F.pad(row, pad, value=PADDING))
            fields["attention_mask"].append(F.pad(torch.ones_like(row), pad))
            fields["labels"].append(F.pad(label, pad, value=NOT_PREDICTED))
        batch = {name: torch.stack(rows) for name, rows in fields.items()}
        if not labels:
            del batch["labels"]
        batches.append(batch)
    return batches


def oracle_sums(labels: bool) -> dict[str, Tensor]:
    """Statistics of the first MoE layer, visit by visit, each sequence alone and without padding."""
    found: dict[str, Any] = {}
    for row in sequences():
        predicted_W = torch.ones(len(row))
        if labels:
            predicted_W[: len(row) // 2] = 0
        model = tiny_qwen3_moe()
        visits = oracle.visits_of(model, row.unsqueeze(0), predicted_W.unsqueeze(0))
        experts = model.model.layers[0].mlp.experts
        pairs = [(expert, visit) for expert, visited in visits[experts].items() for visit in visited]
        for expert, visit in pairs:
            h_F, g_F = visit.h_F.detach().double(), visit.h_F.grad.double()
            for name, value in {
                "count_E": torch.ones(()), "router_weight_sum_E": visit.router_weight.detach(), "h_sq_sum_EF": h_F**2,
                "g_sq_sum_EF": g_F**2, "gh_sq_sum_EF": (g_F * h_F) ** 2, "h_abs_sum_EF": h_F.abs(),
            }.items():  # fmt: skip
                zeros = torch.zeros(experts.num_experts, *value.shape, dtype=torch.float64)
                found.setdefault(name, zeros)[expert] += value
    return found


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_statistics_with_padding_are_those_of_the_sequences(side: str, labels: bool) -> None:
    statistics = heapr.calibrate(tiny_qwen3_moe(), None, padded(side, labels=labels))
    expected = oracle_sums(labels)
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(statistics.layers[0], name), tensor, rtol=1e-4, atol=1e-10)
    assert statistics.num_tokens == sum(LENGTHS)
    not_predicted = [length // 2 if labels else 1 for length in LENGTHS]
    assert statistics.num_predicted_tokens == sum(LENGTHS) - sum(not_predicted)


def test_the_loss_is_transformers_own() -> None:
    batches = padded("right", labels=True)
    statistics = heapr.calibrate(tiny_qwen3_moe(), None, batches)
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            model = tiny_qwen3_moe().eval()
            number = int((batch["labels"][:, 1:] != NOT_PREDICTED).sum())
            total += float(model(**batch, use_cache=False).loss) * number
    assert statistics.loss_sum == pytest.approx(total, rel=1e-5)
    perplexity = heapr.evaluate(tiny_qwen3_moe(), None, batches)["perplexity/batches"]
    assert perplexity == pytest.approx(math.exp(total / statistics.num_predicted_tokens), rel=1e-5)


def test_repair_does_not_see_padding() -> None:
    """With other padding tokens, in other places, the pruned model is the same bit for bit."""
    models = []
    for side, padding in (("right", PADDING), ("left", 200)):
        batches = copy.deepcopy(padded(side))
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = padding
        models.append(heapr.prune(tiny_qwen3_moe(), None, batches, recipe="best", ratio=0.5).model)
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_sequences_of_one_length_go_together_in_the_loaders_order() -> None:
    batches = read_batches(padded("right"), num_tokens=VOCABULARY_SIZE)
    assert [tuple(batch.ids_NW.shape) for batch in batches] == [(2, 5), (1, 7), (1, 9), (2, 12)]
    assert torch.equal(batches[0].ids_NW, torch.stack([sequences()[1], sequences()[4]]))
    equal = [tiny_ids(4, 6, seed) for seed in range(3)]
    read = read_batches(equal, num_tokens=VOCABULARY_SIZE)
    assert all(torch.equal(batch.ids_NW, ids_NW) for batch, ids_NW in zip(read, equal, strict=True))
    unlike = [tiny_ids(number, 6) for number in (2, 4, 1)]
    assert [len(batch.ids_NW) for batch in read_batches(unlike, num_tokens=VOCABULARY_SIZE)] == [4, 3]


def test_reading_stops_at_the_limit() -> None:
    def endless() -> Any:
        while True:
            yield tiny_ids(4, 6)

    batches = read_batches(endless(), num_tokens=VOCABULARY_SIZE, limit=6, batch_size=2)
    assert [len(batch.ids_NW) for batch in batches] == [2, 2, 2]


def test_sequences_that_predict_nothing_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    batch = {"input_ids": [[1, 2], [3, 4], [5, 6]], "attention_mask": [[1, 0], [1, 1], [0, 0]]}
    (read,) = read_batches([batch], num_tokens=VOCABULARY_SIZE)
    assert read.ids_NW.tolist() == [[3, 4]]
    assert "2 sequences of fewer than two tokens are left out" in caplog.text


IDS = [[1, 2, 3]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": IDS}, "batch 0 has ids and no input_ids"),
        ({"input_ids": IDS, "position_ids": IDS}, "batch 0 has position_ids, which heapr cannot take"),
        ({"input_ids": [[1, 2], [3]]}, "batch 0: input_ids is a list that is no matrix of whole numbers"),
        ({"input_ids": [1, 2]}, "has shape (2,) and dtype torch.int64"),
        ({"input_ids": [[0.5, 2]]}, "dtype torch.float32; give whole numbers"),
        ({"input_ids": IDS, "labels": [[1, 2]]}, "labels has shape (1, 2), and input_ids (1, 3)"),
        ({"input_ids": IDS, "attention_mask": [[1, 0, 1]]}, "leaves out tokens between others"),
        ({"input_ids": [[1, 2, 257]]}, "token ids from 1 to 257, and the model has embeddings 0 to 256"),
        ({"input_ids": IDS, "attention_mask": [[1, 0, 0]]}, "1 sequences, and none has two tokens"),
        ({"input_ids": IDS, "labels": [[1, -100, -100]]}, "labels predict no token"),
    ],
)
def test_other_batches_are_refused(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_batches([batch], num_tokens=VOCABULARY_SIZE)
    assert message in str(refused.value)


def test_padding_that_has_no_embedding_is_no_mistake() -> None:
    batch = {"input_ids": [[1, 2, -1]], "attention_mask": [[1, 1, 0]], "token_type_ids": [[0, 0, 0]]}
    (read,) = read_batches([batch], num_tokens=VOCABULARY_SIZE)
    assert read.ids_NW.tolist() == [[1, 2]]
