"""heapr as a library: the same results as a run, a model left in order, and mistakes told in one line."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import heapr
from heapr import artifacts
from heapr.errors import ConfigError
from heapr.library.given import take_tokens, view_of
from heapr.library.options import SamplingOptions, read_options
from heapr.pruning.repair import JointRepair
from heapr.run_experiment import Summary
from heapr.score.gradient import Fisher
from heapr.text.corpora import TextFiles
from heapr.types import Plan
from tests.experiment import run_in, write_model, write_texts
from tests.same import logits
from tests.tiny import byte_tokenizer, tiny_ids, tiny_qwen3_moe

NOT_MEASURED = [f"evaluation.{name}=null" for name in ("routing", "truth", "fidelity", "throughput")]
ALL_TEXT = ["calibration.corpus.split=all", "evaluation.corpora.text_files.split=all"]
SAMPLING = {"num_samples": 6, "sequence_length": 32, "batch_size": 4}
WIDE = {"moe_intermediate_size": 32}  # so that a width can be a multiple of 8
TOKENIZER = byte_tokenizer()
TEXTS = [f"Line {number}: the sum of {number * 7 % 31} things.\n" for number in range(40)]


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def read_plan(summary: Summary, outputs: Path) -> Plan:
    keys = [stage["key"] for stage in summary.stages if stage["stage"] == "prune"]
    return artifacts.read_plan(outputs / "artifacts" / "prune" / keys[-1])


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (["recipe=stock", "pruning.ratio=0.25"], {}),
        (
            ["recipe=heapr", "score=reap", "pruning=layer", "pruning.rounds=2", "pruning/repair=joint", "pruning.ratio=0.5"],
            {"recipe": None, "score": "reap", "scope": "layer", "rounds": 2, "repair": "joint", "ratio": 0.5},
        ),
        (["recipe=best", "pruning.form=masked", "pruning.ratio=0.3"], {"recipe": "best", "form": "masked", "ratio": 0.3}),
    ],
)  # fmt: skip
def test_the_result_is_that_of_a_run(tmp_path: Path, overrides: list[str], options: dict[str, Any]) -> None:
    """Plan, metrics, and every file of the checkpoint but the words about its origin."""
    folder = write_model(tmp_path / "model", **WIDE)
    summary = run_in(
        tmp_path, *write_texts(tmp_path), *ALL_TEXT, "model=hf", f"model.path={folder}", "model.dtype=float32", *overrides,
        *NOT_MEASURED,
        "evaluation.perplexity.window=32", "evaluation.efficiency.window=32",
        "evaluation.perplexity.batch_size=4",
    )  # fmt: skip
    train, test = (TextFiles([str(tmp_path / name)], "all") for name in ("train.txt", "test.txt"))
    pruned = heapr.prune(loaded(folder), TOKENIZER, train, evaluate_on=test, **SAMPLING, **options)
    plan = read_plan(summary, tmp_path / "outputs")
    assert plan.layers.keys() == pruned.plan.layers.keys()
    assert all(torch.equal(plan.layers[index], pruned.plan.layers[index]) for index in plan.layers)
    assert pruned.metrics == summary.metrics
    (written,) = (tmp_path / "outputs").glob("artifacts/prune/*/checkpoint")
    pruned.save_pretrained(tmp_path / "saved")
    names = {path.relative_to(written) for path in written.rglob("*") if path.is_file()}
    assert names == {
        path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*") if path.is_file()
    }
    done = [
        json.loads((place / "config.json").read_text())["heapr"] for place in (written, tmp_path / "saved")
    ]
    assert done[0].keys() - done[1].keys() == {"keys", "pruned_from"}  # of a run's artifacts and folder
    assert done[1].keys() < done[0].keys() and done[0].get("width") == done[1].get("width")
    theirs, ours = (load_file(place / "model.safetensors") for place in (written, tmp_path / "saved"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_steps_one_by_one_give_the_plan_of_all(tmp_path: Path) -> None:
    model = tiny_qwen3_moe()
    before = copy.deepcopy(model.state_dict())
    statistics = heapr.calibrate(model, TOKENIZER, TEXTS, **SAMPLING)
    scores = heapr.score(model, statistics, "fisher")
    by_plug_in = heapr.score(model, statistics, Fisher())
    metrics = heapr.evaluate(model, TOKENIZER, TEXTS, window=32)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    pruned = heapr.prune(
        model, TOKENIZER, TEXTS, recipe=None, score="fisher", ratio=0.5, evaluate_on=TEXTS, **SAMPLING
    )
    for index, scores_EF in scores.layers.items():
        assert torch.equal(scores_EF, by_plug_in.layers[index])
        kept_EF = pruned.plan.layers[index]
        assert not (~kept_EF).any() or scores_EF[~kept_EF].max() <= scores_EF[kept_EF].max()
    assert pruned.metrics["dense"]["perplexity/texts"] == metrics["perplexity/texts"]
    assert pruned.metrics["size"]["atomic_experts_removed_ratio"] == 0.5
    pruned.save_pretrained(tmp_path / "saved")
    assert type(pruned.model) is type(heapr.load_pruned(tmp_path / "saved"))


def test_a_loaders_batches_are_texts_that_were_cut_already() -> None:
    ids_NW = tiny_ids(num_sequences=8, length=12)
    loader = DataLoader([{"input_ids": row, "labels": row} for row in ids_NW], batch_size=4)
    of_ids = heapr.calibrate(tiny_qwen3_moe(), None, list(ids_NW.split(4)))
    of_loader = heapr.calibrate(tiny_qwen3_moe(), None, loader)
    for index, layer in of_ids.layers.items():
        for name, tensor in layer.items():
            assert torch.equal(tensor, getattr(of_loader.layers[index], name)), name
    assert heapr.calibrate(tiny_qwen3_moe(), None, loader, num_samples=3).num_tokens == 3 * 12


def test_batches_keep_their_size_unless_another_one_is_given() -> None:
    view = view_of(tiny_qwen3_moe())
    loader = [tiny_ids(num_sequences=12, length=6), tiny_ids(num_sequences=3, length=6, seed=1)]
    for options, sizes in (({}, [12, 3]), ({"batch_size": 8}, [8, 7]), ({"num_samples": 13}, [12, 1])):
        given = take_tokens(view, None, loader, read_options(options, SamplingOptions))
        assert [len(batch.ids_NW) for batch in given.batches] == sizes


def test_an_error_of_the_increase_needs_windows_of_one_length() -> None:
    """Of sequences with unlike lengths, perplexity is the mean over tokens, and no mean over windows."""
    equal, unlike = [tiny_ids(4, 12)], [tiny_ids(2, 12), tiny_ids(2, 5)]
    for held_out, has_error in ((equal, True), (unlike, False)):
        pruned = heapr.prune(tiny_qwen3_moe(), None, equal, recipe="heapr", evaluate_on=held_out)
        assert ("perplexity_increase_standard_error/batches" in pruned.metrics["comparison"]) == has_error
        assert pruned.metrics["dense"]["num_tokens/batches"] == sum(ids_NW.numel() for ids_NW in held_out)
        calibration = pruned.about["calibration"]
        assert (calibration["num_samples"], calibration["sequence_length"]) == (4, 12)


def test_rounds_with_zeros_are_those_with_exact_widths() -> None:
    """From the second round on, statistics are of the model that was cut; the one given keeps its shapes."""
    ids_NW = tiny_ids(8, 12)
    models = {}
    for form in ("masked", "ragged"):
        options = {"recipe": "heapr", "form": form, "rounds": 2, "ratio": 0.5}
        models[form] = heapr.prune(tiny_qwen3_moe(), None, [ids_NW], **options)
    plans = [models[form].plan.layers for form in models]
    assert all(torch.equal(kept_EF, plans[1][index]) for index, kept_EF in plans[0].items())
    shapes = {name: tensor.shape for name, tensor in tiny_qwen3_moe().state_dict().items()}
    zeroed = models["masked"].model
    assert {name: tensor.shape for name, tensor in zeroed.state_dict().items()} == shapes
    assert_close(logits(zeroed, ids_NW), logits(models["ragged"].model, ids_NW))


def test_plug_ins_of_ones_own_are_named_in_what_was_done() -> None:
    settings = read_options({"recipe": "heapr", "score": Fisher(), "repair": JointRepair()})
    assert settings.score == {"_target_": "heapr.score.gradient.Fisher"}
    assert settings.pruning.repair == {"_target_": "heapr.pruning.repair.JointRepair"}
    assert read_options({"recipe": "best"}).repair is not None
    without = read_options({"recipe": "best", "repair": None})
    assert without.repair is None and without.pruning.repair is None


def test_the_model_keeps_its_mode_and_what_trains(tmp_path: Path) -> None:
    model = tiny_qwen3_moe().train()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.eval()
    with torch.no_grad():
        heapr.calibrate(model, TOKENIZER, TEXTS, **SAMPLING)
    assert model.training and not model.lm_head.training
    frozen = tiny_qwen3_moe().train().requires_grad_(False)
    pruned = heapr.prune(frozen, TOKENIZER, TEXTS, recipe="heapr", **SAMPLING)
    pruned.save_pretrained(tmp_path / "saved")
    assert all(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    pruned = heapr.prune(tiny_qwen3_moe(), None, [tiny_ids(8, 12)], recipe="heapr")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        pruned.save_pretrained(tmp_path)
    (tmp_path / "new").mkdir()
    pruned.save_pretrained(tmp_path / "new")
    assert not list((tmp_path / "new").glob("tokenizer*"))


def dense_model() -> PreTrainedModel:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip


def quantised_model() -> PreTrainedModel:
    model = tiny_qwen3_moe()
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 1.5}, "ratio=1.5 is not in [0, 1)"),
    ({"ratio": "25%"}, "ratio=25% has the wrong type; give a number"),
    ({"ratio": torch.tensor(0.5)}, "is a Tensor; give a number"),
    ({"score": print}, "is no criterion: it does not say its granularity"),
    ({"recipe": "stok"}, "recipe='stok' is unknown; did you mean stock? known: best, heapr, stock"),
    ({"score": "fischer"}, "score='fischer' is unknown; did you mean fisher?"),
    ({"score": Fisher}, "give the name of an option"),
    ({"rounds": "2"}, "rounds=2 has the wrong type; give a whole number"),
    ({"form": "uniform"}, "pruning.form=uniform gives every expert one width"),
    ({"score": "reap", "scope": "expert"}, "score Reap removes whole experts; use pruning=global or pruning=layer"),
    ({"foo": 1}, "unknown key 'foo'; known here: batch_size, "),
    ({"sequence_length": 65}, "sequence_length 65 is above the model's 64 tokens; give at most 64"),
    ({"num_samples": 1000}, "bytes, which cannot give 32000 tokens; ask for fewer or shorter sequences, or give more text"),
    ({"model": "tiny"}, "load it first: AutoModelForCausalLM.from_pretrained"),
    ({"model": TOKENIZER, "tokenizer": tiny_qwen3_moe}, "the order is model, tokenizer, texts"),
    ({"model": lambda: tiny_qwen3_moe().model}, "Qwen3MoeModel has no output head"),
    ({"model": lambda: tiny_qwen3_moe().to("meta")}, "weights on the meta device or offloaded"),
    ({"model": dense_model}, "has no MoE layer"),
    ({"model": lambda: tiny_qwen3_moe().double()}, "has experts of dtype float64; load it as one of float32, bfloat16, float16"),
    ({"model": lambda: tiny_qwen3_moe(vocab_size=50)}, "and the model has embeddings 0 to 49; use the model's own tokenizer"),
    ({"texts": [tiny_ids(2, 65)]}, "a sequence of 65 is above the model's 64 tokens"),
    ({"model": quantised_model}, "Qwen3MoeForCausalLM is quantised, and gradients need whole weights"),
    ({"model": lambda: torch.nn.DataParallel(tiny_qwen3_moe())}, "of a parallel one .module"),
    ({"tokenizer": None}, "tokenizer is a NoneType"),
    ({"texts": "one string"}, "texts is one string; give a list of documents, for example [text]"),
    ({"texts": []}, "texts are empty"),
    ({"texts": [" "]}, "texts are empty (1 documents without a word)"),
    ({"texts": ["a", 2]}, "texts[1] is a int, not a string"),
    ({"texts": ["a"]}, "corpus 'texts' (split all) has 1 bytes, which cannot give 192 tokens"),
    ({"texts": 3}, "texts is a int; give a list of strings, or a loader's batches"),
    ({"texts": [{"text": "a"}]}, "give its column, for example dataset['text']"),
    ({"texts": tiny_ids(2, 8)}, "texts is one Tensor; give a list of batches, for example [batch]"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_told_in_one_line(wrong: dict[str, Any], message: str) -> None:
    options = {"recipe": None, **SAMPLING, **wrong}
    model = _made(options.pop("model", tiny_qwen3_moe))
    tokenizer = _made(options.pop("tokenizer", TOKENIZER))
    texts = options.pop("texts", TEXTS)
    with pytest.raises(ConfigError) as refused:
        heapr.prune(model, tokenizer, texts, **options)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_steps_refuse_what_does_not_suit_them() -> None:
    model = tiny_qwen3_moe()
    with pytest.raises(ConfigError, match=r"statistics is a dict; give what heapr\.calibrate returned"):
        heapr.score(model, {})
    statistics = heapr.calibrate(model, TOKENIZER, TEXTS, **SAMPLING)
    for changes in ({"num_hidden_layers": 3}, {"moe_intermediate_size": 4}):
        with pytest.raises(ConfigError, match="the statistics are of another model"):
            heapr.score(tiny_qwen3_moe(0, **changes), statistics, "fisher")
    for options in ({"window": 1}, {"window": 32, "batch_size": 0}):
        with pytest.raises(ConfigError, match="sequence_length=1 is|batch_size=0 is"):
            heapr.evaluate(model, TOKENIZER, TEXTS, **options)


def _made(value: Any) -> Any:
    """The value, or what it returns if it is one of the functions of `MISTAKES`; a tokenizer is callable too."""
    return value() if inspect.isfunction(value) else value


def test_the_package_names_its_functions_and_imports_at_once() -> None:
    code = (
        "import sys, heapr, heapr.score.criterion; assert callable(heapr.score), heapr.score;"
        "import heapr as again; sys.exit('transformers' in sys.modules or ' '.join(dir(heapr)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(heapr.__file__).parents[1], capture_output=True, text=True, check=False
    )  # fmt: skip
    names = ["ConfigError", "Pruned", "__version__", "calibrate", "evaluate", "load_pruned", "prune", "score"]
    assert result.stderr.split() == names
    assert sorted(heapr.__all__) == names and all(getattr(heapr, name) for name in names)
