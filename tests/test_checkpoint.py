"""Checkpoints as a run writes them: their forms, their card, and what can be done with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

import heapr
from heapr.errors import ConfigError
from heapr.evaluation.zero_shot import ZeroShot
from heapr.model.checkpoint import save_checkpoint
from heapr.model.moe import MoEModel
from heapr.pruning.surgery import mask, remove
from heapr.pruning.uniform import make_uniform, uniform_settings
from heapr.run_experiment import Summary
from heapr.types import Plan
from tests.evaluation.material import Source, of_model
from tests.evaluation.test_zero_shot import write_task
from tests.experiment import cached_stages, run_in, write_model, write_texts
from tests.same import ROUNDING, assert_same_model, logits
from tests.tiny import byte_tokenizer, tiny_ids, tiny_model, write_description

IDS_NW = tiny_ids(2, 12)
NO_TIMING = ["evaluation.throughput=null", "evaluation.truth=null", "evaluation.fidelity=null"]


class Run:
    """One tiny experiment; call it with further overrides."""

    def __init__(self, folder: Path, model_folder: Path | None = None) -> None:
        self.folder = folder
        self.model_folder = model_folder or write_model(folder / "model")
        self.overrides = [
            "model=hf",
            f"model.path={self.model_folder}",
            "model.dtype=float32",
            *write_texts(folder),
            *NO_TIMING,
        ]

    def __call__(self, *overrides: str) -> Summary:
        return run_in(self.folder, *self.overrides, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """To be read only; with the pruning ratio 0.4 everything is found."""
    run = Run(tmp_path_factory.mktemp("finished"))
    run("pruning.ratio=0.4")
    return run


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy of the finished one, so that tests do not see each other's artifacts."""
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    return Run(tmp_path, tmp_path / "model")


def artifact(summary: Summary) -> Path:
    return next(Path(stage["path"]) for stage in summary.stages if stage["stage"] == "prune")


def test_the_ragged_checkpoint_is_the_dense_model_without_what_the_plan_removes(run: Run) -> None:
    summary = run("pruning.ratio=0.4")
    folder = artifact(summary) / "checkpoint"
    model = heapr.load_pruned(folder)
    assert_same_model(
        model, heapr.load_pruned(run.model_folder, plan=artifact(summary) / "plan.safetensors"), IDS_NW
    )
    assert not torch.equal(logits(model, IDS_NW), logits(heapr.load_pruned(run.model_folder), IDS_NW))
    copied, original = (
        load_file(place / "plan.safetensors") for place in (folder / "heapr", artifact(summary))
    )
    assert copied.keys() == original.keys() and all(map(torch.equal, copied.values(), original.values()))
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == byte_tokenizer()("abc").input_ids
    widths = json.loads((folder / "config.json").read_text())["expert_widths"]
    kept = load_file(folder / "heapr" / "plan.safetensors")
    assert list(widths.values()) == [kept[f"layers.{index}"].sum(dim=1).tolist() for index in (0, 1)]
    size = sum(entry.numel() for entry in load_file(folder / "model.safetensors").values())
    assert size == summary.metrics["pruned"]["parameters"]


def test_configuration_and_card_say_what_was_done_with_which_figures(run: Run) -> None:
    summary = run("pruning.ratio=0.5", "score=fisher", "pruning.width_multiple=8", "pruning=layer")
    folder = artifact(summary) / "checkpoint"
    about = json.loads((folder / "config.json").read_text())["heapr"]
    assert (about["ratio"], about["scope"], about["form"], about["width_multiple"]) == (
        0.5,
        "layer",
        "ragged",
        8,
    )
    assert about["criterion"]["_target_"].endswith("Fisher") and len(about["pruned_from"]["sha256"]) == 64
    card = (folder / "README.md").read_text()
    for text in (
        "`Fisher`",
        "50.0% of its routed atomic experts",
        f"{summary.metrics['pruned']['perplexity/text_files']:.6g}",
    ):
        assert text in card
    again = run("pruning.ratio=0.5", "score=fisher", "pruning.width_multiple=8", "pruning=layer")
    assert all(stage["cached"] for stage in again.stages), "the card must not count as damage"


def test_widths_are_multiples_and_rounding_is_reported(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    summary = run("pruning.ratio=0.5", "pruning.width_multiple=8")
    kept = load_file(artifact(summary) / "plan.safetensors")
    assert all(width in {0, 8} for kept_EF in kept.values() for width in kept_EF.sum(dim=1).tolist())
    assert "rounding to multiples of 8" in caplog.text and "sum of kept scores" in caplog.text
    report = json.loads((artifact(summary) / "allocation.json").read_text())
    assert report["kept_score"] < report["kept_score_without_rounding"]


def test_the_uniform_checkpoint_is_a_stock_model(run: Run) -> None:
    summary = run("pruning=expert", "pruning.form=uniform", "pruning.ratio=0.5", "pruning.width_multiple=1")
    folder = artifact(summary) / "checkpoint"
    assert not list(folder.glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model) is Qwen3MoeForCausalLM and model.config.moe_intermediate_size == 4
    expected = logits(
        heapr.load_pruned(run.model_folder, plan=artifact(summary) / "plan.safetensors"), IDS_NW
    )
    torch.testing.assert_close(logits(model, IDS_NW), expected, rtol=1e-5, atol=1e-5)
    names = load_file(folder / "model.safetensors")
    # The names that other tools read.
    assert names["model.layers.0.mlp.experts.3.down_proj.weight"].shape == (
        16,
        4,
    )
    assert summary.metrics["size"]["atomic_experts_removed_ratio"] == 0.5
    assert summary.metrics["pruned"]["parameters"] == sum(tensor.numel() for tensor in names.values())


def test_a_uniform_width_that_the_shared_experts_forbid_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heapr.pipeline.collect", lambda *_: pytest.fail("calibration began"))
    tiny_model("deepseek_v2").save_pretrained(tmp_path / "deepseek")
    byte_tokenizer().save_pretrained(tmp_path / "deepseek")
    run = Run(tmp_path, tmp_path / "deepseek")
    message = (
        r"a width of 6: shared experts of width 8 have the same field.* choose pruning.ratio=0.5 \(width 4\),"
        r" or pruning.form"
    )
    with pytest.raises(ConfigError, match=message):
        run("pruning=expert", "pruning.form=uniform", "pruning.ratio=0.25", "pruning.width_multiple=1")


def test_the_masked_checkpoint_has_the_old_shape(run: Run) -> None:
    summary = run("pruning.form=masked", "pruning.ratio=0.5")
    folder = artifact(summary) / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = logits(
        heapr.load_pruned(run.model_folder, plan=artifact(summary) / "plan.safetensors"), IDS_NW
    )
    torch.testing.assert_close(logits(model, IDS_NW), expected, rtol=1e-5, atol=1e-5)
    dense, masked = load_file(run.model_folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in masked.items()} == {
        name: tensor.shape for name, tensor in dense.items()
    }
    assert summary.metrics["pruned"]["atomic_experts"] == 32


@pytest.mark.parametrize(
    "overrides",
    [[], ["pruning=expert", "pruning.form=uniform", "pruning.width_multiple=1"], ["pruning.form=masked"]],
    ids=["ragged", "uniform", "masked"],
)
def test_summary_and_card_tell_what_the_checkpoint_holds(run: Run, overrides: list[str]) -> None:
    summary = run(*overrides, "pruning.ratio=0.5")
    folder, metrics = artifact(summary) / "checkpoint", summary.metrics
    tensors = load_file(folder / "model.safetensors")
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    assert metrics["pruned"]["parameters"] == num_parameters
    assert (
        metrics["pruned"]["bytes"] == sum(tensor.nbytes for tensor in tensors.values()) == 4 * num_parameters
    )
    assert metrics["size"]["parameters_removed_ratio"] == 1 - num_parameters / metrics["dense"]["parameters"]
    of_experts = [tensor for name, tensor in tensors.items() if ".experts" in name]
    assert metrics["pruned"]["parameters_zero"] == sum(int((tensor == 0).sum()) for tensor in of_experts)
    assert metrics["pruned"]["parameters_zero"] == (32 * 3 * 16 if "pruning.form=masked" in overrides else 0)
    assert metrics["dense"]["parameters_zero"] == 0 and metrics["size"]["atomic_experts_removed_ratio"] == 0.5
    card = (folder / "README.md").read_text()
    assert f"| parameters | {metrics['dense']['parameters']:,} | {num_parameters:,} |" in card
    assert ("parameters_zero |" in card) == ("pruning.form=masked" in overrides)


def test_all_forms_of_one_plan_have_the_same_perplexity(run: Run) -> None:
    ragged, masked = (
        run("pruning.ratio=0.5", f"pruning.form={form}").metrics["pruned"] for form in ("ragged", "masked")
    )
    assert ragged["perplexity/text_files"] == pytest.approx(masked["perplexity/text_files"], rel=1e-6)


def test_without_a_checkpoint_only_the_plan_is_kept_and_it_can_be_added_later(run: Run) -> None:
    first = run("pruning.save_checkpoint=false")
    assert not (artifact(first) / "checkpoint").exists()
    plan = (artifact(first) / "plan.safetensors").read_bytes()
    second = run("pruning.save_checkpoint=true")
    assert artifact(second) == artifact(first) and (artifact(second) / "checkpoint").is_dir()
    assert (artifact(second) / "plan.safetensors").read_bytes() == plan
    made = [(entry["stage"], entry["part"]) for entry in second.stages if not entry["cached"]]
    assert made == [("prune", "checkpoint")]
    assert cached_stages(run("pruning.save_checkpoint=false"))["prune"], "more than is needed is fine"


@pytest.mark.parametrize("scope", ["global", "layer", "expert"])
def test_a_pruned_checkpoint_is_pruned_again(run: Run, scope: str) -> None:
    first = run("pruning.ratio=0.3", f"pruning={scope}")
    second = (
        Run(run.folder / "again", artifact(first) / "checkpoint")
        if (run.folder / "again").mkdir() is None
        else None
    )
    summary = second("pruning.ratio=0.3", f"pruning={scope}")
    before, after = (load_file(artifact(s) / "plan.safetensors") for s in (first, summary))
    kept = sum(int(kept_EF.sum()) for kept_EF in before.values())
    assert sum(int(kept_EF.sum()) for kept_EF in after.values()) == kept - int(0.3 * kept + 0.5)
    assert summary.metrics["dense"]["perplexity/text_files"] == pytest.approx(
        first.metrics["pruned"]["perplexity/text_files"], rel=1e-6
    )
    assert summary.metrics["pruned"]["atomic_experts"] == kept - int(0.3 * kept + 0.5)
    assert logits(heapr.load_pruned(artifact(summary) / "checkpoint"), IDS_NW).isfinite().all()


def spoiled(plan: Path, **changes: object) -> Path:
    """A copy of a plan with other tensors or metadata."""
    with safe_open(plan, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a mapping
    copy = plan.with_name(f"spoiled_{len(list(plan.parent.iterdir()))}.safetensors")
    save_file({**tensors, **changes.get("tensors", {})}, copy, changes.get("metadata", metadata))
    return copy


def test_plans_that_do_not_fit_are_refused_in_one_line(run: Run, tmp_path: Path) -> None:
    plan = artifact(run("pruning.ratio=0.4")) / "plan.safetensors"
    other_weights = write_model(tmp_path / "other", seed=1)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(plan.read_bytes()[:-10])
    wide = tmp_path / "wide"
    tiny_model("qwen3_moe", moe_intermediate_size=16).save_pretrained(wide)
    byte_tokenizer().save_pretrained(wide)
    ragged = artifact(run("pruning.ratio=0.4")) / "checkpoint"
    widths = json.loads((ragged / "config.json").read_text())["expert_widths"]
    widest = {index: max(width_E) for index, width_E in enumerate(widths.values())}
    everything = {
        f"layers.{index}": torch.ones(4, width, dtype=torch.bool) for index, width in widest.items()
    }
    cases = [
        (run.model_folder, tmp_path / "no.safetensors", "cannot be read"),
        (run.model_folder, truncated, "cannot be read"),
        (
            run.model_folder,
            spoiled(plan, tensors={"layers.7": torch.ones(4, 8, dtype=torch.bool)}),
            "it has 3 layers",
        ),
        (run.model_folder, spoiled(plan, tensors={"layers.1": torch.ones(4, 8)}), "float32"),
        (wide, plan, r"it has 2 layers of \(4, 8\) bool, the model 2 layers of \(4, 16\) bool"),
        (other_weights, plan, "was made for other weights"),
        (run.model_folder, spoiled(plan, metadata={"format": "pt"}), "was made for other weights"),
        (ragged, spoiled(plan, tensors=everything), "(was made for other weights|does not fit)"),
    ]
    for model_folder, path, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            heapr.load_pruned(model_folder, plan=path)
        assert "\n" not in str(caught.value)


def test_checkpoints_that_are_damaged_are_refused_in_one_line(run: Run) -> None:
    folder = artifact(run("pruning.ratio=0.4")) / "checkpoint"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="model.safetensors is damaged or not complete; get it again"):
        heapr.load_pruned(folder)
    weights.unlink()
    with pytest.raises(ConfigError, match="weights in .* cannot be loaded"):
        heapr.load_pruned(folder)
    with pytest.raises(ConfigError, match="no such folder"):
        heapr.load_pruned(folder.parent / "nothing")


def test_the_card_keeps_figures_that_are_not_measured_again(run: Run) -> None:
    card = artifact(run("pruning.ratio=0.4")) / "checkpoint" / "README.md"
    before = card.read_text()
    assert "| perplexity/text_files |" in before and "| parameters |" in before
    run("pruning.ratio=0.4", "evaluation.perplexity=null")
    assert card.read_text() == before
    run("pruning.ratio=0.4", "evaluation.perplexity.window=16")
    assert card.read_text() != before and card.read_text().count("| perplexity/text_files |") == 1


def test_load_pruned_keeps_the_dtype_of_the_weights(run: Run) -> None:
    folder = artifact(run("pruning.ratio=0.4", "model.dtype=bfloat16")) / "checkpoint"
    assert next(heapr.load_pruned(folder).parameters()).dtype == torch.bfloat16
    assert next(heapr.load_pruned(folder, dtype="float32").parameters()).dtype == torch.float32


WITHOUT_HEAPR = """
import functools, io, json, os, sys
sys.modules["heapr"] = None  # importing it fails
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

def citizenship(model, folder, ids_NW):
    # What transformers' own models can do, each as a difference that should be none.
    copy = io.BytesIO()
    torch.save(model, copy)
    copy.seek(0)
    model.save_pretrained(folder + "/saved")
    others = {
        "pickled": torch.load(copy, weights_only=False),
        "saved": AutoModelForCausalLM.from_pretrained(folder + "/saved", trust_remote_code=True).eval(),
    }
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    bodies = {}
    if "AutoModelForSequenceClassification" in config.auto_map:  # first: asking for AutoModel makes its class known
        classifier = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        )
        bodies["classifier's body"] = classifier.eval().model
    bodies["body"] = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    deviations = [p.std().item() for name, p in fresh.named_parameters() if ".experts." in name]
    with torch.no_grad():
        run = functools.partial(torch.nn.Module.__call__, input_ids=ids_NW, use_cache=False)
        found = {name: (run(other).logits - run(model).logits).abs().max().item() for name, other in others.items()}
        for name, other in bodies.items():
            found[name] = (run(other).last_hidden_state - run(model.model).last_hidden_state).abs().max().item()
    found["new"] = max(abs(deviation / config.initializer_range - 1) for deviation in deviations)
    return found

for folder in os.environ["STOCK_FOLDERS"].split(os.pathsep):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.load(folder + "/ids.pt"), use_cache=False).logits
    torch.save(logits, folder + "/found.pt")
    if os.path.exists(folder + "/modeling_heapr.py"):
        found = citizenship(model, folder, torch.load(folder + "/ids.pt"))
        json.dump(found, open(folder + "/found.json", "w"))

from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager
from torch.utils import collect_env
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)  # reading thousands of them takes long
collect_env.get_pretty_env_info = str  # so does describing the machine
cli_evaluate()
"""


def write_stock_forms(folder: Path) -> list[Path]:
    """DeepSeekMoE is not in transformers: its file goes with it, in the ragged form too. Qwen3 is, and has
    classes with other heads."""
    folders = []
    families = {
        "uniform": "deepseek",
        "masked": "deepseek",
        "ragged": "deepseek",
        "ragged_qwen3": "qwen3_moe",
    }
    for form, family in families.items():
        model = MoEModel(tiny_model(family))
        original = write_description(folder / f"original_{form}", model.model)
        plan = Plan(layers={layer.index: torch.arange(8).expand(4, 8) < 4 for layer in model.layers})
        if form == "uniform":
            settings = uniform_settings(model.model.config, 4)
            remove(model, plan)
            make_uniform(model, settings)
        elif form.startswith("ragged"):
            remove(model, plan)
        else:
            mask(model, plan)
        save_checkpoint(model, original, folder / form, about={})
        torch.save(IDS_NW, folder / form / "ids.pt")
        torch.save(logits(model.model, IDS_NW), folder / form / "expected.pt")
        folders.append(folder / form)
    return folders


@pytest.fixture(scope="module")
def elsewhere(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process that cannot import heapr makes of our checkpoints: stock forms of our own family, and a
    ragged one in lm-eval."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_task(folder / "tasks")
    ragged = artifact(finished("pruning.ratio=0.4")) / "checkpoint"
    arguments = [
        "--model", "hf", "--model_args", f"pretrained={ragged},trust_remote_code=True,dtype=float32", "--tasks", "sums",
        "--include_path", str(folder / "tasks"), "--device", "cpu", "--output_path", str(folder / "out"),
    ]  # fmt: skip
    stock = os.pathsep.join(map(str, write_stock_forms(folder)))
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "STOCK_FOLDERS": stock}
    command = [sys.executable, "-c", WITHOUT_HEAPR, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder


def test_stock_forms_of_our_own_family_have_tied_weights_twice_for_tools_that_do_not_tie(
    tmp_path: Path,
) -> None:
    model = MoEModel(tiny_model("deepseek", tie_word_embeddings=True))
    original = write_description(tmp_path / "original", model.model)
    save_checkpoint(model, original, tmp_path / "masked", about={})
    tensors = load_file(tmp_path / "masked" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    again = heapr.load_pruned(tmp_path / "masked")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_tied_head_is_written_once_for_tools_that_tie(tmp_path: Path) -> None:
    model = MoEModel(tiny_model("qwen3_moe", tie_word_embeddings=True))
    original = write_description(tmp_path / "original", model.model)
    save_checkpoint(model, original, tmp_path / "masked", about={})
    assert "lm_head.weight" not in load_file(tmp_path / "masked" / "model.safetensors")


def test_only_the_index_of_a_checkpoint_says_what_its_weights_are(finished: Run) -> None:
    """vLLM reads every file of tensors in a folder as weights where there is no index."""
    folder = artifact(finished("pruning.ratio=0.4")) / "checkpoint"
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == dict.fromkeys(sorted(load_file(folder / "model.safetensors")), "model.safetensors")
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert list(config["auto_map"])[:3] == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "bodies"), [("ragged", 1), ("ragged_qwen3", 2)])
def test_a_ragged_model_is_a_citizen_of_transformers_without_heapr(
    elsewhere: Path, form: str, bodies: int
) -> None:
    found = json.loads((elsewhere / form / "found.json").read_text())
    assert found.pop("new") < 0.3  # the spread of new weights, beside the configuration's
    assert found.keys() == {"pickled", "saved", *["body", "classifier's body"][:bodies]}
    assert max(found.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["uniform", "masked", "ragged"])
def test_our_own_family_loads_without_heapr(elsewhere: Path, form: str) -> None:
    if form != "ragged":
        names = load_file(elsewhere / form / "model.safetensors")
        assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
    found, expected = (torch.load(elsewhere / form / name) for name in ("found.pt", "expected.pt"))
    torch.testing.assert_close(found, expected, **ROUNDING)


@pytest.mark.slow
def test_lm_eval_runs_a_ragged_checkpoint_without_heapr(elsewhere: Path, finished: Run) -> None:
    found = json.loads(next((elsewhere / "out").rglob("results_*.json")).read_text())["results"]["sums"][
        "acc,none"
    ]
    evaluator = ZeroShot("sums", include_path=str(elsewhere / "tasks"))
    evaluator.prepare(Source(byte_tokenizer()))
    model = MoEModel(heapr.load_pruned(artifact(finished("pruning.ratio=0.4")) / "checkpoint"))
    assert evaluator(of_model(model)).metrics["accuracy/sums"] == pytest.approx(found)
