"""Properties that hold for every input, tried on many made by hypothesis: allocation, statistics, keys, parsers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from heapr.artifacts import read_manifest, read_summary
from heapr.errors import ConfigError
from heapr.files import is_name
from heapr.model.model_files import INDEX, read_header, shards_of
from heapr.origin import Origin, canonical_json
from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget
from heapr.report.sweep.check_summary import problem_of
from heapr.sweep.collect import RECORD, Record
from heapr.targets import check_targets
from heapr.types import LayerStatistics, Plan, Scores

tried = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
FINITE = st.floats(-(2.0**99), 2.0**99, width=32)


@st.composite
def scored(draw: st.DrawFn) -> tuple[Scores, dict[int, list[int]]]:
    """Scores with ties, and experts of different widths, from a single atomic expert on."""
    layers, widths = {}, {}
    values = draw(st.sampled_from([FINITE, st.sampled_from([0.0, 1.0]), st.just(0.5)]))  # the last: all equal
    for index in range(draw(st.integers(1, 3))):
        width_E = draw(st.lists(st.integers(1, draw(st.sampled_from([1, 3, 17]))), min_size=2, max_size=4))
        size = len(width_E) * max(width_E)
        flat = draw(st.lists(values, min_size=size, max_size=size))
        layers[2 * index] = torch.tensor(flat, dtype=torch.float32).view(len(width_E), max(width_E))
        widths[2 * index] = width_E
    return Scores(layers=layers), widths


def plan_of(scores: Scores, widths: dict[int, list[int]], ratio: float, scope: str) -> Plan | None:
    budget = Budget(ratio=ratio, scope=scope, experts_per_token=1)
    try:
        budget.check(widths)
    except ConfigError:
        return None
    return allocate(scores, widths, budget)


SCOPES = st.sampled_from(["global", "layer", "expert"])
RATIOS = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.6000000000000001, 0.75, 0.9, 0.999])


@tried
@given(scored(), RATIOS, SCOPES)
def test_exactly_the_share_is_removed_and_nothing_beyond_a_width_is_kept(given_scores, ratio, scope) -> None:
    scores, widths = given_scores
    plan = plan_of(scores, widths, ratio, scope)
    assume(plan is not None)
    total = sum(map(sum, widths.values()))
    assert plan.num_kept == total - math.floor(ratio * total + 0.5)
    for index, width_E in widths.items():
        assert plan.layers[index].any()
        for kept_F, width in zip(plan.layers[index], width_E, strict=True):
            assert not kept_F[width:].any()


@tried
@given(scored(), RATIOS, RATIOS, SCOPES)
def test_what_a_ratio_removes_every_higher_ratio_removes_too(given_scores, one, other, scope) -> None:
    scores, widths = given_scores
    lower, higher = (plan_of(scores, widths, ratio, scope) for ratio in sorted([one, other]))
    assume(lower is not None and higher is not None)
    for index, kept_EF in higher.layers.items():
        assert not (kept_EF & ~lower.layers[index]).any()


@tried
@given(st.integers(0, 2**32), RATIOS, SCOPES)
def test_a_permutation_of_experts_and_atomic_experts_permutes_the_plan(seed, ratio, scope) -> None:
    """Scores without ties, which are broken by place."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(2 * 4 * 6, generator=generator).float()
    layers = {index: part.view(4, 6) for index, part in enumerate(flat.split(24))}
    widths = {0: [6] * 4, 1: [6] * 4}
    experts, places = torch.randperm(4, generator=generator), torch.randperm(6, generator=generator)
    moved = {index: scores_EF[experts][:, places] for index, scores_EF in layers.items()}
    plan, moved_plan = (plan_of(Scores(one), widths, ratio, scope) for one in (layers, moved))
    assume(plan is not None)
    if scope != "expert":  # there, experts of a layer share leftovers by place
        for index, kept_EF in plan.layers.items():
            assert torch.equal(kept_EF[experts][:, places], moved_plan.layers[index])
    assert plan.num_kept == moved_plan.num_kept


@tried
@given(scored(), st.sampled_from([math.nan, math.inf, -math.inf]), st.randoms(use_true_random=False))
def test_a_score_that_is_no_number_is_named(given_scores, bad, choose) -> None:
    scores, _ = given_scores
    index = choose.choice(sorted(scores.layers))
    num_experts, width = scores.layers[index].shape
    expert, place = choose.randrange(num_experts), choose.randrange(width)
    layers = {key: scores_EF.clone() for key, scores_EF in scores.layers.items()}
    layers[index][expert, place] = bad
    with pytest.raises(
        FloatingPointError, match=f"atomic expert {place} of expert {expert} of layer {index} is"
    ):
        Scores(layers=layers)


@st.composite
def statistics(draw: st.DrawFn) -> LayerStatistics:
    tensors = {}
    for name in LayerStatistics.names():
        size = 6 if name.endswith("_EF") else 2
        values = draw(st.lists(st.integers(0, 2**20), min_size=size, max_size=size))
        shape = (2, 3) if size == 6 else (2,)
        tensors[name] = torch.tensor(values, dtype=torch.float64).view(shape)
    return LayerStatistics(**tensors)


@tried
@given(statistics(), statistics(), statistics())
def test_merging_is_associative_commutative_and_has_a_zero(a, b, c) -> None:
    """Bit by bit, because the sums of these whole numbers are exact."""
    zero = LayerStatistics.zeros(2, 3, torch.device("cpu"))
    for left, right in (
        (a.merge(b), b.merge(a)),
        (a.merge(b).merge(c), a.merge(b.merge(c))),
        (a.merge(zero), a),
    ):
        for name, tensor in left.items():
            assert torch.equal(tensor, getattr(right, name)), name


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=4)


def reordered(value: Any, choose: random.Random) -> Any:
    """The same value with keys in another order, tuples for lists, and whole numbers as floats."""
    if isinstance(value, dict):
        items = list(value.items())
        choose.shuffle(items)
        return {key: reordered(item, choose) for key, item in items}
    if isinstance(value, list):
        return tuple(reordered(item, choose) for item in value)
    if type(value) is int and abs(value) < 2**39:
        return float(value)
    return value


def key_of(config: dict[str, Any]) -> str:
    return Origin(stage="score", version=1, config=config, upstream={"calibrate": "0"}).key


@tried
@given(OBJECTS, st.randoms(use_true_random=False))
def test_the_same_configuration_has_one_key_in_any_order_and_number_format(config, choose) -> None:
    assert key_of(config) == key_of(reordered(config, choose))
    assert key_of(json.loads(json.dumps(config))) == key_of(config)


@tried
@given(OBJECTS, OBJECTS)
def test_different_configurations_have_different_keys(one, other) -> None:
    """Numbers count as equal if they agree in 12 significant digits."""
    assert (key_of(one) == key_of(other)) == (canonical_json(one) == canonical_json(other))
    if not same(one, other):
        assert key_of(one) != key_of(other)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool) or type(one) is not type(other):
        is_number = all(type(value) in {int, float} for value in (one, other))
        return (is_number and math.isclose(one, other, rel_tol=1e-11)) or (
            type(one) is type(other) and one == other
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return math.isclose(one, other, rel_tol=1e-11) if isinstance(one, float) else one == other


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (0, False),
        (0, None),
        ("1", 1),
        ([], {}),
        ([1], 1),
        ("", None),
        ([[1], 2], [1, [2]]),
        ({"a": {"b": 1}}, {"a.b": 1}),
    ],
)
def test_values_that_look_alike_are_different(one: Any, other: Any) -> None:
    assert key_of({"x": one}) != key_of({"x": other})


def test_numbers_that_are_equal_are_the_same() -> None:
    for one, other in ((1, 1.0), (0, -0.0), (0.6, 0.6000000000000001), (1e3, 1000)):
        assert key_of({"x": one}) == key_of({"x": other})


@tried
@given(content=st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode())))
def test_parsers_give_a_value_or_our_own_error(content, tmp_path: Path) -> None:
    for name, read in {
        "summary.json": read_summary, "manifest.json": read_manifest, RECORD: Record.read,
        INDEX: lambda folder: shards_of(folder / INDEX), "a.safetensors": lambda folder: read_header(folder / "a.safetensors"),
    }.items():  # fmt: skip
        header = len(content).to_bytes(8, "little") if name.endswith(".safetensors") else b""
        (tmp_path / name).write_bytes(header + content)
        said = said_by(lambda read=read: read(tmp_path))
        assert said == "" or (str(tmp_path) in said and "\n" not in said)


def said_by(read: Callable[[], object]) -> str:
    """What our own error says; empty if there is none."""
    try:
        read()
    except ConfigError as error:
        return str(error)
    return ""


@tried
@given(JSON)
def test_a_summary_is_whole_or_its_problem_is_told(value) -> None:
    assert problem_of(value) is not None
    whole = {"metrics": {}, "protocols": {}, "stages": [], "config": {}}
    for name in whole:
        assert problem_of(whole | {name: value}) is not None


@tried
@given(st.text(max_size=120))
def test_names_stay_in_their_folder(name) -> None:
    if is_name(name):
        assert (Path("/a") / name).parent == Path("/a") and name not in {".", ".."}


@tried
@given(JSON)
def test_targets_that_nobody_knows_are_refused(value) -> None:
    with pytest.raises(ConfigError):
        check_targets({"x": [{"_target_": value}]})
