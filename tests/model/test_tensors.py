"""Tensors that a model does not take: refused where they show that the weights are quantised, else said
before the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from heapr.errors import ConfigError
from heapr.model.find_model import find_model
from heapr.model.heads import why_left_out
from heapr.model.model_files import WEIGHTS
from tests.experiment import run_in, write_texts
from tests.tiny import byte_tokenizer, tiny_model

NOT_MEASURED = [
    f"evaluation.{name}=null" for name in ("perplexity", "throughput", "truth", "fidelity", "efficiency")
]
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"


def changed(
    folder: Path, family: str = "qwen3_moe", *, left_out: tuple[str, ...] = (), **tensors: Tensor
) -> Path:
    """A model's folder with further or other tensors."""
    tiny_model(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    weights = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if name not in left_out}
    save_file({**weights, **tensors}, folder / WEIGHTS, {"format": "pt"})
    return folder


def eight_bit_experts() -> dict[str, Tensor]:
    """Every expert's matrices in 8 bits with their scales, as published, though config.json does not say
    so."""
    tensors = {}
    for name, weight in tiny_model("qwen3_moe").state_dict().items():
        if name.endswith("experts.down_proj"):
            for expert, down_DF in enumerate(weight):
                scale = down_DF.abs().max() / 448
                place = f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"
                tensors |= {
                    place: (down_DF / scale).to(torch.float8_e4m3fn),
                    f"{place}_scale_inv": scale.reshape(1, 1),
                }
    return tensors


QUANTISED = {
    "8 bits": (eight_bit_experts(), r"F8_E4M3"),
    "scales alone": ({f"{DOWN}_scale_inv": torch.ones(1, 1)}, r"scale_inv belongs to a quantised weight"),
    "8-bit integers": (
        {DOWN: torch.ones(16, 8, dtype=torch.int8)},
        r"model.layers.1.mlp.experts.2.down_proj.weight is I8",
    ),
    "4 bits packed": (
        {DOWN.replace("weight", "qweight"): torch.ones(2, 8, dtype=torch.int32)},
        r"qweight belongs to a quantised weight",
    ),
    "blocks": (
        {"model.layers.1.mlp.experts.down_proj_blocks": torch.ones(2, dtype=torch.uint8)},
        r"_blocks belongs to a quantised weight",
    ),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_weights_are_refused_whatever_the_configuration_says(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, message = QUANTISED[case]
    folder = changed(tmp_path / "model", **tensors)
    monkeypatch.setattr("heapr.pipeline.collect", lambda *_: pytest.fail("calibration began"))
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("it was loaded")
    )
    with pytest.raises(
        ConfigError,
        match=rf"are quantised \(.*{message}.*\), config.json has no quantization_config that says how, and gradients need them whole; give a bfloat16",
    ) as caught:
        find_model(str(folder), dtype="float32").load(torch.device("cpu"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="are quantised"):
        run_in(tmp_path, "model=hf", f"model.path={folder}", "model.dtype=float32", *write_texts(tmp_path))


def test_what_transformers_makes_of_8_bit_weights_without_a_word(tmp_path: Path) -> None:
    """Why they are refused."""
    loaded = AutoModelForCausalLM.from_pretrained(
        changed(tmp_path / "model", **eight_bit_experts()), dtype=torch.float32
    )
    wrong, right = (
        model.model.layers[0].mlp.experts.down_proj.abs().mean()
        for model in (loaded, tiny_model("qwen3_moe"))
    )
    assert wrong > 100 * right


def test_unknown_tensors_are_warned_of_once_with_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{DOWN}.lora_{letter}" for letter in "AB"] + ["model.layers.0.mlp.something", "classifier.bias"]
    source = find_model(
        str(changed(tmp_path / "model", **{name: torch.ones(2) for name in names})), dtype="float32"
    )
    source.load(torch.device("cpu"))
    _ = source.remarks
    (warning,) = [
        record.message
        for record in caplog.records
        if record.levelname == "WARNING" and record.name.startswith("heapr")
    ]
    assert (
        warning
        == "4 tensors in the files are unknown to Qwen3MoeForCausalLM and not used: 2 below model.layers.1, 1"
        " below classifier, 1 below model.layers.0"
    )


def test_weights_that_do_not_fit_are_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("it was loaded")
    )
    missing = changed(tmp_path / "missing", left_out=("model.norm.weight",))
    other = changed(tmp_path / "other", **{"model.norm.weight": torch.ones(17)})
    expert = changed(tmp_path / "expert", **{DOWN: torch.ones(16, 9)})
    cases = {
        missing: "missing keys model.norm.weight and 0 more",
        other: r"mismatched keys model.norm.weight of shape \(17,\), not \(16,\) and 0 more",
        expert: "mismatched keys model.layers.1.mlp.experts.down_proj and 0 more",
    }
    for folder, message in cases.items():
        with pytest.raises(ConfigError, match=f"do not fit its config.json: {message}"):
            find_model(str(folder), dtype="float32").load(torch.device("cpu"))


HEADS = {
    "qwen3_next": ("mtp.layers.0.mlp.experts.0.down_proj.weight", "mtp_num_hidden_layers"),
    "deepseek_v3": ("model.layers.61.eh_proj.weight", "num_nextn_predict_layers"),
    "glm4_moe": ("model.layers.92.mlp.experts.0.down_proj.weight", "num_nextn_predict_layers"),
    "mellum": ("mtp.norm.weight", "num_nextn_predict_layers"),
    "nemotron_h": ("mtp.norm.weight", "num_nextn_predict_layers"),
}


CASES = [(family, "masked", None) for family in HEADS] + [
    ("mellum", "uniform", None),  # without experts
    ("qwen3_next", "uniform", "their experts have the old shape"),
    ("qwen3_next", "ragged", "no engine computes with them in pruning.form=ragged"),
]


@pytest.mark.parametrize(("family", "form", "why_left_out"), CASES)
def test_prediction_heads_are_copied_where_engines_can_use_them_and_else_not_promised(
    family: str, form: str, why_left_out: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tensor, field = HEADS[family]
    folder = changed(tmp_path / "model", family, **{tensor: torch.tensor([3.0, 7.0], dtype=torch.float16)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: 1}))
    overrides = [
        "model=hf",
        f"model.path={folder}",
        "model.dtype=float32",
        *write_texts(tmp_path),
        *NOT_MEASURED,
    ]
    scope = (
        ["pruning.ratio=0.5", "pruning.scope=expert", "pruning.width_multiple=1"] if form == "uniform" else []
    )
    summary = run_in(tmp_path, *overrides, f"pruning.form={form}", *scope)
    place = ".".join(tensor.split(".")[:3]) if "layers" in tensor else "mtp"
    assert f"leaves out what it has no part for: 1 below {place}" in caplog.text
    what = why_left_out or "are copied into the checkpoint unchanged"
    said = next(record.created for record in caplog.records if what in record.message)
    assert said < next(record.created for record in caplog.records if record.message.startswith("calibrate"))
    checkpoint = (
        next(Path(stage["path"]) for stage in summary.stages if stage["stage"] == "prune") / "checkpoint"
    )
    number = json.loads((checkpoint / "config.json").read_text())[field]
    found = load_file(checkpoint / WEIGHTS)
    card = (checkpoint / "README.md").read_text()
    if why_left_out:
        assert (
            number == 0 and tensor not in found and "Heads that predict further tokens are not in it." in card
        )
    else:
        assert number == 1 and "Heads that predict further tokens are the original's, unchanged." in card
        assert found[tensor].dtype == torch.float16 and found[tensor].tolist() == [3.0, 7.0]
    source = find_model(str(checkpoint), dtype="float32")
    source.load(torch.device("cpu"))
    assert source.heads == (() if why_left_out else (tensor,))


def test_quantised_heads_are_left_out_whatever_the_form() -> None:
    heads = ["mtp.layers.0.mlp.down_proj.weight"]
    for form in ("masked", "uniform", "ragged", "per_layer", "fewer_experts"):
        why = why_left_out(heads, form, is_quantised=True)
        assert why == "they are quantised, and the checkpoint is not"
    assert why_left_out(heads, "masked", is_quantised=False) is None
