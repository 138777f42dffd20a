"""What describes a checkpoint: the original's own files, changed where pruning changed the model, for other
versions and other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeConfig

from heapr.model.find_model import find_model
from heapr.model.model_files import INDEX, WEIGHTS
from heapr.run_experiment import Summary
from tests.deepseek import write_original_folder
from tests.experiment import run_in, write_model, write_texts
from tests.tiny import byte_tokenizer, tiny_model

NOT_MEASURED = [
    f"evaluation.{name}=null" for name in ("perplexity", "throughput", "truth", "fidelity", "efficiency")
]
FORMS = {"ragged": [], "uniform": ["pruning=expert", "pruning.width_multiple=1"], "masked": []}
WRITTEN_BY_4 = {  # as transformers 4 and the hub have it
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1,
    "eos_token_id": 0, "head_dim": 8, "hidden_act": "silu", "hidden_size": 16, "initializer_range": 0.3, "intermediate_size": 24,
    "max_position_embeddings": 64, "max_window_layers": 2, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 8,
    "norm_topk_prob": True, "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    "num_key_value_heads": 1, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 257,
}  # fmt: skip
TOKENIZER = {
    "add_bos_token": False,
    "eos_token": "<|endoftext|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": "{{ x }}",
}


def pruned(folder: Path, model_folder: Path, form: str) -> tuple[Path, Summary]:
    settings = [
        "model=hf",
        f"model.path={model_folder}",
        "model.dtype=float32",
        *write_texts(folder),
        *NOT_MEASURED,
    ]
    summary = run_in(folder, *settings, f"pruning.form={form}", "pruning.ratio=0.5", *FORMS[form])
    return (
        next(Path(stage["path"]) for stage in summary.stages if stage["stage"] == "prune") / "checkpoint",
        summary,
    )


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_as_4(folder: Path, **changes: object) -> Path:
    write_model(folder)
    (folder / "config.json").write_text(json.dumps(WRITTEN_BY_4 | changes))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [0, 5], "temperature": 0.6, "do_sample": true}'
    )
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_only_what_pruning_changed_is_changed_in_the_configuration(form: str, tmp_path: Path) -> None:
    original = write_as_4(tmp_path / "model")
    checkpoint, _ = pruned(tmp_path, original, form)
    config = read(checkpoint / "config.json")
    expected = WRITTEN_BY_4 | {"heapr": config["heapr"]}
    if form == "uniform":
        expected |= {"moe_intermediate_size": 4}
    if form == "ragged":
        expected |= {
            name: config[name] for name in ("model_type", "architectures", "auto_map", "expert_widths")
        }
        assert config["model_type"] == "heapr_qwen3_moe" and config["architectures"] == [
            "HeaprQwen3MoeForCausalLM"
        ]
    assert config == expected
    assert AutoConfig.from_pretrained(checkpoint).rope_parameters == {
        "rope_theta": 1e6,
        "rope_type": "default",
    }


@pytest.mark.parametrize("form", FORMS)
def test_tokenizer_and_generation_settings_are_the_originals_files(form: str, tmp_path: Path) -> None:
    original = write_as_4(tmp_path / "model")
    checkpoint, _ = pruned(tmp_path, original, form)
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
    for name in names:
        assert (checkpoint / name).read_bytes() == (original / name).read_bytes(), name
    assert {path.name for path in checkpoint.glob("*token*")} <= names
    assert AutoTokenizer.from_pretrained(checkpoint)("naïve").input_ids == byte_tokenizer()("naïve").input_ids


@pytest.mark.parametrize("form", FORMS)
def test_what_transformers_5_wrote_gets_the_names_that_4_reads(form: str, tmp_path: Path) -> None:
    """transformers 4 would take a rope_theta of 10000 and 128 experts in silence."""
    original = write_as_4(tmp_path / "model")
    AutoConfig.from_pretrained(original).save_pretrained(original)
    assert not {"rope_theta", "num_experts", "torch_dtype"} & read(original / "config.json").keys()
    config = read(pruned(tmp_path, original, form)[0] / "config.json")
    assert (config["rope_theta"], config["num_experts"], config["torch_dtype"]) == (1e6, 4, "float32")
    assert (
        config["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "default"}
        and config["num_local_experts"] == 4
    )


def test_scaled_rotations_keep_their_names(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    original = write_as_4(tmp_path / "model", rope_scaling=scaling)
    checkpoint, _ = pruned(tmp_path, original, "masked")
    assert read(checkpoint / "config.json")["rope_scaling"] == scaling
    dense, masked = (AutoConfig.from_pretrained(folder).rope_parameters for folder in (original, checkpoint))
    assert dense == masked and masked["factor"] == 2.0
    AutoConfig.from_pretrained(original).save_pretrained(original)
    checkpoint, _ = pruned(tmp_path, original, "masked")
    assert read(checkpoint / "config.json")["rope_scaling"]["rope_type"] == "yarn"
    assert AutoConfig.from_pretrained(checkpoint).rope_parameters == dense


def test_our_own_family_keeps_the_hubs_names(tmp_path: Path) -> None:
    config, _ = write_original_folder(tmp_path / "model")
    checkpoint, _ = pruned(tmp_path, tmp_path / "model", "masked")
    found = read(checkpoint / "config.json")
    changed = {name for name in config.keys() | found.keys() if config.get(name) != found.get(name)}
    assert changed == {"heapr", "auto_map", "num_experts"}
    assert found["auto_map"] == {
        "AutoConfig": "deepseek_moe.DeepseekMoeConfig",
        "AutoModel": "deepseek_moe.DeepseekMoeModel",
        "AutoModelForCausalLM": "deepseek_moe.DeepseekForCausalLM",
    }
    assert read(checkpoint / "tokenizer_config.json")["tokenizer_class"] == "LlamaTokenizerFast"


def test_settings_of_generation_in_the_configuration_stay_there(tmp_path: Path) -> None:
    original = write_as_4(tmp_path / "model", temperature=0.6, num_return_sequences=2)
    for form in FORMS:
        checkpoint, _ = pruned(tmp_path, original, form)
        assert read(checkpoint / "config.json")["temperature"] == 0.6
        find_model(str(checkpoint), dtype="float32").load(torch.device("cpu"))


@pytest.fixture
def wrapper(tmp_path: Path) -> Path:
    """A model that sees, around a language model."""
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 16,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [],
    }  # fmt: skip
    text = tiny_model("qwen3_5_moe").config.to_dict()
    Qwen3_5MoeForConditionalGeneration(
        Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    ).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("form", FORMS)
def test_a_wrapper_is_pruned_as_a_whole_and_the_card_says_so(
    form: str, wrapper: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    checkpoint, _ = pruned(tmp_path, wrapper, form)
    line = "is pruned; 21 below model.visual are carried over unchanged"
    assert f"only the text decoder of Qwen3_5MoeForConditionalGeneration {line}" in caplog.text
    assert "keeps the field names" not in caplog.text
    config, before = read(checkpoint / "config.json"), read(wrapper / "config.json")
    assert config["vision_config"] == before["vision_config"] | {"dtype": "float32"}
    found, text = config["text_config"], before["text_config"]
    kept = text.keys() - {"moe_intermediate_size"}
    assert {name: found[name] for name in kept} == {name: text[name] for name in kept}
    card = (checkpoint / "README.md").read_text()
    assert "It is a `Qwen3_5MoeForConditionalGeneration` as the original" in card
    source = find_model(str(checkpoint), dtype="float32")
    assert len(source.remarks) == 1
    assert source.load(torch.device("cpu")).model.model.visual is not None


def test_the_card_of_a_whole_model_says_that_it_loads_as_the_original(tmp_path: Path) -> None:
    checkpoint, _ = pruned(tmp_path, write_as_4(tmp_path / "model"), "masked")
    card = (checkpoint / "README.md").read_text()
    assert (
        "it loads as the original model does and is no smaller.\n" in card
        and "only the language model" not in card
    )


def test_stray_tensors_do_not_reach_the_checkpoint(tmp_path: Path) -> None:
    original = write_as_4(tmp_path / "model")
    save_file({"extra": torch.ones(1)}, original / "model.fp16.safetensors")
    checkpoint, _ = pruned(tmp_path, original, "masked")
    assert {path.name for path in checkpoint.glob("model*")} == {WEIGHTS, INDEX}
