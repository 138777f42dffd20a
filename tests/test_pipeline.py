"""The pipeline: what it makes, what it makes again and what it does not, and what it refuses before any
work."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heapr.errors import ConfigError
from heapr.evaluation.build import build_measurements
from heapr.evaluation.perplexity import Perplexity
from heapr.model.find_model import find_model
from heapr.model.load import ModelSource
from heapr.prepare import prepare
from heapr.pruning.surgery import mask
from heapr.run_experiment import Summary
from heapr.types import Plan, Scores, Statistics
from heapr.words import option_name
from tests.evaluation.material import of_model
from tests.evaluation.test_zero_shot import ITEMS, write_task
from tests.experiment import cached_stages, compose_experiment, run_in, write_model, write_texts
from tests.tiny import tiny_qwen3_moe

WITHOUT_COMPARISONS = ["evaluation.fidelity=null", "evaluation.throughput=null", "evaluation.truth=null"]


class Experiment:
    """One tiny experiment; call it with further overrides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model_folder = write_model(folder / "model")
        self.overrides = [
            "model=hf",
            f"model.path={self.model_folder}",
            "model.dtype=float32",
            *write_texts(folder),
        ]

    def __call__(self, *overrides: str) -> Summary:
        return run_in(self.folder, *self.overrides, *overrides)


@pytest.fixture
def whole_experiment(tmp_path: Path) -> Experiment:
    return Experiment(tmp_path)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    experiment = Experiment(tmp_path)
    experiment.overrides += WITHOUT_COMPARISONS
    return experiment


def test_artifacts_follow_the_contract(experiment: Experiment) -> None:
    summary = experiment()
    paths = {stage["stage"]: Path(stage["path"]) for stage in summary.stages}
    statistics = Statistics.from_tensors(load_file(paths["calibrate"] / "statistics.safetensors"))
    assert load_file(paths["calibrate"] / "tokens.safetensors")["ids"].shape == (6, 32)
    assert statistics.num_tokens == 6 * 32 and statistics.num_predicted_tokens == 6 * 31
    assert all(layer.count_E.sum() == 6 * 32 * 2 for layer in statistics.layers.values())
    scores = load_file(paths["score"] / "scores.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in scores.items()} == {
        f"layers.{i}": ((4, 8), torch.float32) for i in (0, 1)
    }
    plan = Plan.from_tensors(load_file(paths["prune"] / "plan.safetensors"))
    assert plan.num_kept == 48
    assert (
        Scores.from_tensors(scores).layers[0][~plan.layers[0]].max()
        <= Scores.from_tensors(scores).layers[0][plan.layers[0]].max()
    )

    written = json.loads((experiment.folder / "run" / "summary.json").read_text())
    expected = {"metrics", "protocols", "coverage", "super_experts", "stages", "config", "environment"}
    assert written.keys() == expected
    assert written["coverage"]["num_tokens"] == 6 * 32
    assert written["metrics"] == summary.metrics
    assert all(
        isinstance(value, int | float) for values in written["metrics"].values() for value in values.values()
    )
    assert written["protocols"]["dense"] == written["protocols"]["pruned"]
    assert written["protocols"]["dense"]["text_files"]["window"] == 32
    assert all(
        {"stage", "key", "path", "cached", "seconds", "peak_memory_bytes"} <= stage.keys()
        for stage in written["stages"]
    )
    assert written["config"]["pruning"] == {
        "ratio": 0.25,
        "scope": "global",
        "rounds": 1,
        "repair": None,
        "width_multiple": 1,
        "form": "ragged",
        "save_checkpoint": True,
        "budget": "atomic_experts",
        "protected_layers": [],
        "protect_super_experts": False,
        "push_to": None,
        "push_public": False,
    }
    assert written["metrics"]["size"]["atomic_experts_removed_ratio"] == 0.25
    assert written["metrics"]["size"]["parameters_removed_ratio"] == pytest.approx(
        16 * 3 * 16 / written["metrics"]["dense"]["parameters"]
    )
    lines = (experiment.folder / "run" / "tracking.jsonl").read_text().splitlines()
    assert all(isinstance(value, int | float) for value in json.loads(lines[-1]).values())
    name = "perplexity/text_files"
    before, after = summary.metrics["dense"][name], summary.metrics["pruned"][name]
    assert json.loads(lines[-1])[f"pruned/{name}"] == after
    assert json.loads(lines[-1])[f"change/{name}"] == pytest.approx(after / before - 1)


def test_pruned_perplexity_is_that_of_the_masked_model(experiment: Experiment) -> None:
    summary = experiment("pruning.ratio=0.5")
    path = next(Path(stage["path"]) for stage in summary.stages if stage["stage"] == "prune")
    config = compose_experiment(*experiment.overrides)
    source = find_model(str(experiment.model_folder), dtype="float32")
    perplexity = next(one for one in build_measurements(config.evaluation) if isinstance(one, Perplexity))
    perplexity.prepare(source)
    model = source.load(torch.device("cpu"))
    assert perplexity(of_model(model)).metrics["perplexity/text_files"] == pytest.approx(
        summary.metrics["dense"]["perplexity/text_files"], rel=1e-6
    )
    mask(model, Plan.from_tensors(load_file(path / "plan.safetensors")))
    assert perplexity(of_model(model)).metrics["perplexity/text_files"] == pytest.approx(
        summary.metrics["pruned"]["perplexity/text_files"], rel=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ratio_zero_gives_the_dense_metrics(whole_experiment: Experiment, dtype: str) -> None:
    """To the last bit: both run the same forward of the experts (heapr.evaluation.measurement.measure)."""
    summary = whole_experiment("pruning.ratio=0", f"model.dtype={dtype}")
    assert summary.metrics["pruned"] == summary.metrics["dense"]
    assert summary.metrics["size"]["flops_removed_ratio"] == 0
    assert summary.metrics["comparison"]["kl_to_dense/text_files"] == 0
    assert summary.metrics["comparison"]["top1_agreement/text_files"] == 1


def test_same_configuration_twice_does_no_work(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = experiment()
    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("the model was loaded again"))
    second = experiment()
    assert [s["key"] for s in second.stages] == [s["key"] for s in first.stages]
    assert all(stage["cached"] for stage in second.stages)
    assert second.metrics == first.metrics


MADE_AGAIN = [
    (["pruning.ratio=0.4"], {"prune", "evaluate"}),
    (["pruning=layer"], {"prune", "evaluate"}),
    (["score=fisher"], {"score", "prune", "evaluate"}),
    (["score=random"], {"score", "prune", "evaluate"}),
    (["calibration.seed=1"], {"calibrate", "score", "prune", "evaluate"}),
    (["calibration.num_samples=5"], {"calibrate", "score", "prune", "evaluate"}),
    (["calibration.sequence_length=16"], {"calibrate", "score", "prune", "evaluate"}),
    (["calibration.corpus.paths=[{folder}/documents.jsonl]"], {"calibrate", "score", "prune", "evaluate"}),
    (["model.path={folder}/other_model"], {"calibrate", "score", "prune", "evaluate"}),
    (["model.dtype=bfloat16"], {"calibrate", "score", "prune", "evaluate"}),
    (["evaluation.perplexity.window=16"], {"evaluate"}),
    (["evaluation.fidelity.window=16"], {"evaluate"}),
    (["evaluation.truth.seed=1"], {"evaluate"}),
    (["tracking=wandb_offline"], set()),
    (["runtime.device=cpu", "runtime.num_threads=1"], set()),
    (["calibration.batch_size=2", "evaluation.perplexity.batch_size=3"], set()),
    (["evaluation.fidelity.batch_size=3", "evaluation.truth.batch_size=3"], set()),
    (["model.name=another_name"], set()),
    (["model.path={folder}/moved_model"], set()),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "made_again"), MADE_AGAIN, ids=[change[0][0] for change in MADE_AGAIN])
def test_only_what_changed_is_made_again(
    tiny_run: Experiment, overrides: list[str], made_again: set[str]
) -> None:
    found = cached_stages(tiny_run(*(override.format(folder=tiny_run.folder) for override in overrides)))
    assert {stage for stage, cached in found.items() if not cached} == made_again


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    experiment = Experiment(tmp_path_factory.mktemp("experiment"))
    write_model(experiment.folder / "other_model", seed=1)
    (experiment.folder / "documents.jsonl").write_text(
        "".join(json.dumps({"text": f"document {n} " * 9}) + "\n" for n in range(50))
    )
    shutil.copytree(experiment.model_folder, experiment.folder / "moved_model")
    experiment()
    return experiment


@pytest.fixture
def tiny_run(finished_run: Experiment, tmp_path: Path) -> Experiment:
    """A copy of one finished experiment, so that tests do not see each other's artifacts."""
    mine = copy.copy(finished_run)
    mine.overrides = [*finished_run.overrides, f"paths.outputs={tmp_path / 'outputs'}"]
    shutil.copytree(finished_run.folder / "outputs", tmp_path / "outputs")
    return mine


def test_the_number_of_threads_is_torchs(tiny_run: Experiment) -> None:
    before = torch.get_num_threads()
    try:
        tiny_run(f"runtime.num_threads={before + 1}")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_the_dense_model_is_evaluated_once(experiment: Experiment) -> None:
    def dense_stage(*overrides: str) -> dict[str, object]:
        stages = experiment("evaluation.efficiency=null", *overrides).stages
        return next(stage for stage in stages if stage["what"] == "perplexity/text_files dense")

    dense_key = dense_stage()["key"]
    for overrides in (["pruning.ratio=0.5"], ["score=magnitude"], ["calibration.seed=3"]):
        stage = dense_stage(*overrides)
        assert stage["key"] == dense_key and stage["cached"]


def test_comparisons_leave_metrics_and_details(whole_experiment: Experiment) -> None:
    summary = whole_experiment("pruning.ratio=0.5")
    comparison = summary.metrics["comparison"]
    assert {
        "kl_to_dense/text_files",
        "top1_agreement/text_files",
        "truth/spearman",
        "routing/spearman",
        "decode_speedup",
    } <= set(comparison)
    assert comparison["kl_to_dense/text_files"] > 0
    assert all(isinstance(value, int | float) for value in comparison.values())
    folders = {stage["what"]: Path(stage["path"]) for stage in summary.stages}
    details = json.loads((folders["routing"] / "details.json").read_text())
    plan = Plan.from_tensors(load_file(folders[""] / "plan.safetensors"))
    assert {layer["layer"]: layer["widths"] for layer in details["layers"]} == {
        i: kept.sum(1).tolist() for i, kept in plan.layers.items()
    }
    assert not (folders["efficiency dense"] / "details.json").exists()


def test_models_are_loaded_only_as_often_as_needed(
    whole_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for what needs one model at a time, once more for what needs both, never for what needs none."""
    loads: list[int] = []
    load = ModelSource.load
    monkeypatch.setattr(ModelSource, "load", lambda self, *where: loads.append(1) or load(self, *where))

    def loads_of(*overrides: str) -> int:
        loads.clear()
        whole_experiment(*overrides)
        return len(loads)

    def only(*names: str) -> list[str]:
        everything = ("perplexity", "efficiency", "routing", "fidelity", "throughput", "truth")
        return [f"evaluation.{name}=null" for name in everything if name not in names]

    assert loads_of(*only("perplexity", "truth")) == 1
    assert loads_of(*only("routing")) == 0
    assert loads_of(*only("fidelity")) == 2
    assert loads_of(*only("truth"), "evaluation.truth.seed=2") == 1


def test_two_models_that_do_not_fit_are_answered_in_one_line(
    whole_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = AutoModelForCausalLM.from_pretrained, []

    def load_one(*arguments: object, **settings: object) -> object:
        if loaded:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loaded.append(1)
        return load(*arguments, **settings)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load_one)
    with pytest.raises(
        ConfigError, match="do not fit on 'cpu' together; leave out .* evaluation.fidelity=null"
    ) as caught:
        whole_experiment()
    assert "\n" not in str(caught.value)
    assert (
        whole_experiment("evaluation.fidelity=null", "evaluation.throughput=null").metrics["pruned"][
            "perplexity/text_files"
        ]
        > 1
    )


def test_truth_does_not_depend_on_what_is_pruned(whole_experiment: Experiment) -> None:
    whole_experiment()
    made = {stage["what"]: not stage["cached"] for stage in whole_experiment("pruning.ratio=0.5").stages}
    assert made["fidelity/text_files"] and made["routing"] and made["throughput"] and not made["truth"]


def test_timings_of_another_machine_are_made_again(
    whole_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_experiment()
    elsewhere = {"device": "cpu", "name": "another processor", "threads": 2}
    for module in ("prepare", "evaluation.throughput"):
        monkeypatch.setattr(f"heapr.{module}.machine", lambda device: elsewhere)
    stages = {stage["what"]: stage for stage in whole_experiment().stages}
    assert {what for what, stage in stages.items() if not stage["cached"]} == {"throughput"}
    assert (
        json.loads((Path(stages["throughput"]["path"]) / "details.json").read_text())["machine"] == elsewhere
    )


def test_a_damaged_artifact_is_made_again_with_the_same_result(experiment: Experiment) -> None:
    first = experiment()
    scores = Path(next(s["path"] for s in first.stages if s["stage"] == "score")) / "scores.safetensors"
    scores.write_bytes(scores.read_bytes()[:-4])
    second = experiment()
    assert cached_stages(second) == {"calibrate": True, "score": False, "prune": True, "evaluate": True}
    assert second.metrics == first.metrics


def test_without_evaluation_the_plan_is_still_made(experiment: Experiment) -> None:
    experiment.overrides = [text for text in experiment.overrides if not text.startswith("evaluation")]
    summary = experiment("evaluation=none")
    assert summary.metrics == {
        "dense": {},
        "pruned": {},
        "size": {"atomic_experts_removed_ratio": 0.25},
        "comparison": {},
    }


def test_a_mistake_leaves_no_tracked_run(experiment: Experiment) -> None:
    with pytest.raises(ConfigError):
        experiment("calibration.num_samples=1000", "tracking=wandb_offline")
    assert not (experiment.folder / "outputs" / "wandb").exists()
    assert not (experiment.folder / "run" / "tracking.jsonl").exists()


@pytest.mark.parametrize(
    ("split", "warned"), [("all", True), ("heldout", True), ("train", False), ("test", True)]
)
def test_evaluating_on_calibration_text_is_warned_of(
    experiment: Experiment, caplog: pytest.LogCaptureFixture, split: str, warned: bool
) -> None:
    (experiment.folder / "documents.jsonl").write_text(
        "".join(json.dumps({"text": f"document {n} " * 9}) + "\n" for n in range(90))
    )
    caplog.set_level(logging.WARNING)
    same = f"[{experiment.folder}/documents.jsonl]"
    experiment(
        f"calibration.corpus.paths={same}", f"calibration.corpus.split={split}", "calibration.num_samples=2",
        f"evaluation.corpora.text_files.paths={same}", "evaluation.corpora.text_files.split=heldout",
    )  # fmt: skip
    assert ("is measured on text that is calibrated on" in caplog.text) == warned


def test_two_user_texts_are_measured_under_their_names(experiment: Experiment) -> None:
    (experiment.folder / "second.txt").write_text("another text, quite another text. " * 20)
    second = f"{{_target_:heapr.text.corpora.TextFiles,paths:[{experiment.folder}/second.txt],split:all,name:second}}"
    metrics = experiment(f"+evaluation.corpora.second={second}").metrics["dense"]
    assert metrics["perplexity/second"] != metrics["perplexity/text_files"]


def test_another_task_or_corpus_recomputes_nothing(experiment: Experiment) -> None:
    tasks = write_task(experiment.folder / "tasks")
    write_task(tasks, name="more", items=ITEMS[:5])
    (experiment.folder / "ptb.txt").write_text(" a sentence of the treebank \n" * 20)
    zero_shot = (
        f"evaluation.zero_shot={{_target_:heapr.evaluation.zero_shot.ZeroShot,include_path:{tasks},tasks:["
    )
    first = experiment(zero_shot + "sums]}")
    ptb = (
        f"{{_target_:heapr.text.published_corpora.PennTreebank,split:test,path:{experiment.folder}/ptb.txt}}"
    )
    second = experiment(zero_shot + "sums,more]}", f"+evaluation.corpora.ptb={ptb}")
    made = [stage["what"] for stage in second.stages if not stage["cached"]]
    new = [
        f"{name} {variant}" for variant in ("dense", "pruned") for name in ("perplexity/ptb", "accuracy/more")
    ]
    assert made == new
    accuracy = second.metrics["dense"]
    assert first.metrics["dense"]["accuracy/average"] == accuracy["accuracy/sums"]
    assert accuracy["accuracy/average"] == pytest.approx(
        (accuracy["accuracy/sums"] + accuracy["accuracy/more"]) / 2
    )


ZERO_SHOT, PUBLISHED = "_target_:heapr.evaluation.zero_shot.ZeroShot", "_target_:heapr.text.published_corpora"
BAD_INPUT = [
    (["pruning.ratio=1"], r"pruning.ratio=1.0 is not in \[0, 1\)"),
    (["pruning.ratio=-0.1"], r"not in \[0, 1\)"),
    (["pruning.ratio=nan"], r"not in \[0, 1\)"),
    (["pruning.scope=block"], "pruning.scope='block' is unknown; choose one of global, layer, expert"),
    (["model.dtype=int8"], "model.dtype='int8' is unknown"),
    (["model.path={folder}/nowhere"], "no such folder"),
    (["model.path=builtin:nothing"], "no such built-in model; known: builtin:deepseek_moe_tiny, builtin:qwen3_moe_tiny"),
    (["model.path={folder}/empty"], "has no config.json"),
    (["model.path={folder}/llama"], "has no MoE layer"),
    (["model.path={folder}/quantised"], r"are quantised \(gptq\)"),
    (["model.path={folder}/pickled"], "are pickled"),
    (["model.path={folder}/shard_missing"], "model-00002-of-00003.safetensors is missing"),
    (["model.path={folder}/unfinished"], "weights in .* cannot be loaded"),
    (["pruning.form=squeezed"], "pruning.form='squeezed' is unknown; choose one of ragged, per_layer, uniform, fewer_experts, masked"),
    (["pruning.form=uniform"], "gives every expert one width, which scope 'global' does not; use pruning=expert"),
    (["pruning.width_multiple=7"], "pruning.width_multiple=7 suits no kernel; give 1 or a multiple of 8"),
    (["pruning.width_multiple=16"], "experts of this model have 8 atomic experts"),
    (["runtime.device_map=everywhere"], "runtime.device_map='everywhere' is unknown"),
    (["model.path=someone/some-model"], "neither a local folder nor in the local hub cache, and the hub cannot be reached"),
    (["calibration.num_samples=1000"], "corpus 'text_files' .* has [0-9]+ bytes, which cannot give 32000 tokens; ask for fewer"),
    (["calibration.num_samples=0"], "num_samples=0 is below 1"),
    (["calibration.sequence_length=65"], "sequence_length=65 is above the 64 tokens of model 'hf'"),
    (["evaluation.perplexity.window=65"], "evaluation.perplexity.window=65 is above the 64 tokens"),
    (["evaluation.perplexity.window=1"], "window=1 is below 2"),
    (["evaluation.corpora.text_files.paths=[{folder}/short.txt]"], "has 3 tokens, less than one window of 32"),
    (["calibration.corpus.paths=[{folder}/none.txt]"], "none.txt' does not exist"),
    (["calibration.corpus.paths=[{folder}/empty.txt]"], "is empty"),
    (["calibration.corpus.paths=[{folder}/latin.txt]"], "is not UTF-8"),
    (["+score.sede=3", "score=random"], "unknown key 'score.sede'; did you mean score.seed"),
    (["+calibration.corpus.path=x"], "unknown key 'calibration.corpus.path'; did you mean calibration.corpus.paths"),
    (["+evaluation.perplexity.windows=3"], "unknown key 'evaluation.perplexity.windows'; did you mean evaluation.perplexity.window"),
    (["score._target_=heapr.score.gradient.Haepr"], "score._target_='heapr.score.gradient.Haepr' is not a criterion of heapr.score"),
    (["evaluation.perplexity.window=abc"], "evaluation.perplexity.window=abc has the wrong type"),
    (["evaluation.perplexity.batch_size=0"], "evaluation.perplexity.batch_size=0 is below 1"),
    (["score=random", "score.seed=abc"], "score.seed=abc has the wrong type"),
    (["score=random", "score.seed=-1"], "score.seed=-1 is below 0"),
    (["evaluation.fidelity.window=65"], "evaluation.fidelity.window=65 is above the 64 tokens"),
    (["evaluation.fidelity.window=1"], "evaluation.fidelity.window=1 is below 2"),
    (["evaluation.fidelity.max_windows=0"], "evaluation.fidelity.max_windows=0 is below 1"),
    (["evaluation.perplexity=null", "evaluation.corpora.text_files.paths=[{folder}/short.txt]"], "has 3 tokens, less than one window"),
    (["evaluation.throughput.new_tokens=0"], "evaluation.throughput.new_tokens=0 is below 1"),
    (["evaluation.throughput.prompt_length=63"], r"prompt_length \+ new_tokens = 65 is above the model's limit of 64 tokens"),
    (["evaluation.efficiency.window=1"], "evaluation.efficiency.window=1 is below 2"),
    (["evaluation.truth.num_groups=1"], "evaluation.truth.num_groups=1 is below 2"),
    (["evaluation.truth.num_groups=33"], "num_groups=33 with sample_size=4 does not fit the model's 64 atomic experts: each group would hold 1"),
    (["evaluation.truth.max_sequences=0"], "evaluation.truth.max_sequences=0 is below 1"),
    (["+evaluation.truth.num_group=3"], "unknown key 'evaluation.truth.num_group'; did you mean evaluation.truth.num_groups"),
    (["evaluation.perplexity=3"], "evaluation.perplexity has no _target_"),
    (["+evaluation.perplexty.window=16"], "evaluation.perplexty has no _target_.* misspelled"),
    (["calibration.corpus.paths={folder}/train.txt"], "calibration.corpus.paths=.* has the wrong type"),
    (["+evaluation.x={{_target_:heapr.text.corpora.PyDocs,split:all}}"], "is not a measurement"),
    (["+evaluation.x={{_target_:heapr.evaluation.perplexity.Perplexity,window:16,batch_size:4}}"], "measures 'perplexity/text_files' 2"),
    ([f"evaluation.zero_shot={{{{{ZERO_SHOT},tasks:[piqa]}}}}"], "data of zero-shot task 'piqa' are not on this machine"),
    ([f"evaluation.zero_shot={{{{{ZERO_SHOT},tasks:[]}}}}"], "evaluation.zero_shot.tasks=.* is not a list of"),
    ([f"evaluation.zero_shot={{{{{ZERO_SHOT},tasks:[a],limits:1}}}}"], "did you mean evaluation.zero_shot.limit"),
    ([f"+evaluation.corpora.w={{{{{PUBLISHED}.WikiText2,split:test}}}}"], "'wikitext2': .* the hub cannot be"),
    ([f"+evaluation.corpora.w={{{{{PUBLISHED}.C4,split:tset}}}}"], "c4 has no split 'tset'; choose one of"),
    ([f"+evaluation.corpora.w={{{{{PUBLISHED}.PennTreebank,split:test}}}}"], "'ptb': .* the hub cannot be"),
    ([f"+evaluation.corpora.w={{{{{PUBLISHED}.C4,split:train,path:{{folder}}/empty.txt}}}}"], "holds no text"),
    ([f"+evaluation.corpora.w={{{{{PUBLISHED}.C4,split:train,path:{{folder}}/short.txt}}}}"], "has 3 tokens, less"),
    (["pruning.ratio=0.99"], "fewer experts than the 2 that every token is routed to"),
    (["model.path={folder}/no_tokenizer"], "has no tokenizer"),
    (["model.path={folder}/truncated"], "model.safetensors is damaged or not complete"),
    (["model.path={folder}/incomplete"], "do not fit its config.json: missing keys model.layers.0.mlp.gate.weight"),
    (["model.path=my models/x y"], "cannot be downloaded"),
    (["runtime.device=tpu9"], "runtime.device='tpu9' is unknown"),
    (["runtime.device=cuda:7"], "torch sees [0-9] GPUs"),
    (["tracking.mode=maybe"], "tracking.mode='maybe' is unknown"),
    (["tracking.project=a/b"], "tracking.project='a/b' is not the name of a wandb project"),
    (["tracking.upload=true"], "tracking=none sends nothing"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    from transformers import LlamaConfig

    experiment = Experiment(tmp_path_factory.mktemp("bad"))
    (experiment.folder / "empty").mkdir()
    (experiment.folder / "empty.txt").touch()
    (experiment.folder / "latin.txt").write_bytes(b"caf\xe9")
    (experiment.folder / "short.txt").write_text("abc")
    small = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    LlamaConfig(**small).save_pretrained(experiment.folder / "llama")
    config = write_model(experiment.folder / "quantised") / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}})
    )
    (write_model(experiment.folder / "pickled") / "model.safetensors").rename(
        experiment.folder / "pickled" / "pytorch_model.bin"
    )
    shutil.copytree(experiment.model_folder, experiment.folder / "shard_missing")
    tiny_qwen3_moe().save_pretrained(experiment.folder / "shard_missing", max_shard_size="30KB")
    (experiment.folder / "shard_missing" / "model.safetensors").unlink()
    next(experiment.folder.glob("shard_missing/model-00002-of-*.safetensors")).unlink()
    write_model(experiment.folder / "unfinished")
    (experiment.folder / "unfinished" / "model.safetensors").unlink()
    shutil.copytree(
        experiment.model_folder,
        experiment.folder / "no_tokenizer",
        ignore=shutil.ignore_patterns("tokenizer*"),
    )
    weights = write_model(experiment.folder / "truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    weights = write_model(experiment.folder / "incomplete") / "model.safetensors"
    save_file(
        {name: t for name, t in load_file(weights).items() if name != "model.layers.0.mlp.gate.weight"},
        weights,
        {"format": "pt"},
    )
    return experiment


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT, ids=[" ".join(case[0]) for case in BAD_INPUT])
def test_bad_input_is_refused_in_one_line_before_calibration(
    bad_place: Experiment, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr("heapr.pipeline.collect", lambda *_: pytest.fail("calibration began"))
    with pytest.raises(ConfigError, match=message) as caught:
        bad_place(*(override.format(folder=bad_place.folder) for override in overrides))
    assert "\n" not in str(caught.value)


def test_a_run_is_named_by_options_and_percent(experiment: Experiment) -> None:
    config = compose_experiment(
        *experiment.overrides, f"paths.outputs={experiment.folder}", "score=heapr_sum", "pruning.ratio=0.125"
    )
    assert prepare(config).name.endswith(" heapr_sum global 12.5%")
    for option in ("heapr", "heapr_sum", "fisher", "magnitude", "random"):
        assert option_name(compose_experiment(f"score={option}").score["_target_"]) == option
