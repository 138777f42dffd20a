"""Continuations against a slow generator; loops, agreement and errors by hand; what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from heapr.errors import ConfigError
from heapr.evaluation import continuations as module
from heapr.evaluation.continuations import continuations, distinct_ratio, is_loop, uniforms
from heapr.evaluation.generation import CONTINUATIONS, Generation, compare_continuations, mean_and_error
from heapr.model.experts.dispatch import use_comparable_experts
from heapr.model.moe import MoEModel
from heapr.ranks import Ranks
from heapr.text.corpora import TextFiles
from tests.evaluation.material import Source, material_of, of_model
from tests.experiment import cached_stages, run_in, write_model, write_texts
from tests.tiny import byte_tokenizer, tiny_ids, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog; " * 8
OPTIONS = {
    "num_prompts": 5, "prompt_length": 6, "new_tokens": 16, "batch_size": 2, "temperature": 0.7, "seed": 3, "agreed_tokens": 4,
}  # fmt: skip


def generation(folder: Path, **changes: Any) -> Generation:
    (folder / "text.txt").write_text(TEXT)
    corpus = TextFiles([str(folder / "text.txt")], split="all")
    return Generation(corpus, **{**OPTIONS, **changes})


def prepared(folder: Path, **changes: Any) -> Generation:
    measurement = generation(folder, **changes)
    measurement.prepare(Source(byte_tokenizer()))
    return measurement


def slow(
    model: MoEModel,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    end_ids: Sequence[int],
    uniform: Sequence[float] | None,
) -> list[int]:
    """One prompt at a time, the whole text read again for every token."""
    written: list[int] = []
    for step in range(num_tokens):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *written]])
            logits = model.model(input_ids=ids, use_cache=False).logits[0, -1].double()
        token = int(logits.argmax())
        if uniform is not None:
            probabilities = (logits / 0.7).softmax(dim=0).tolist()
            sums = [math.fsum(probabilities[: v + 1]) for v in range(len(probabilities))]
            token = next(v for v, total in enumerate(sums) if total > uniform[step])
        if token in end_ids:
            break
        written.append(token)
    return written


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek", "deepseek_v2", "gpt_oss", "qwen3_next", "jamba"])
def test_cache_batch_and_ragged_experts_change_nothing(family: str) -> None:
    """Attention, latent, sliding, linear and state-space layers, dense and pruned."""
    material = material_of(tiny_model(family), tiny_ids(4, 12))
    prompts_NW = tiny_ids(3, 7)
    rows = [uniforms(3, number, 10) for number in range(3)]
    for model in material.dense_and_pruned():
        end_ids = [0, *range(200, 257)]
        model.model.generation_config.eos_token_id = end_ids
        with use_comparable_experts(model.model):
            greedy = continuations(model, prompts_NW, 10)
            sampled = continuations(
                model, prompts_NW, 10, uniform_NT=torch.tensor(rows, dtype=torch.float64), temperature=0.7
            )
            prompts = prompts_NW.tolist()
            assert greedy == [slow(model, prompt, 10, end_ids=end_ids, uniform=None) for prompt in prompts]
            assert sampled == [
                slow(model, prompt, 10, end_ids=end_ids, uniform=uniform)
                for prompt, uniform in zip(prompts, rows, strict=True)
            ]


def test_loops_by_hand() -> None:
    assert is_loop([5] * 16) and not is_loop([5] * 15)
    assert is_loop([1, 2, 3, *[7, 8] * 8])  # 16 tokens of period 2
    assert not is_loop([*[7, 8] * 8, 1])  # it went on
    sentence = list(range(20))
    assert is_loop([99, *sentence * 3]) and not is_loop([99, *sentence * 2])  # three times at least
    assert not is_loop([98, *sentence[1:], *sentence * 2])  # 59 tokens of period 20
    assert not is_loop([])


def test_distinct_3_grams_by_hand() -> None:
    assert distinct_ratio([1, 2, 3, 1, 2, 3]) == 3 / 4  # 123 231 312 123
    assert distinct_ratio([1, 2, 3]) == 1.0
    assert distinct_ratio([1, 2]) is None


def test_the_sampled_token_is_where_the_cumulative_probability_passes_the_number() -> None:
    scores_NV = torch.tensor([0.0, 0.2, 0.0, 0.3, 0.5]).log().expand(5, -1)
    uniform_NT = torch.tensor([[0.0], [0.19], [0.21], [0.49], [0.999999]], dtype=torch.float64)
    chosen = module._Choice(4, uniform_NT, 1.0)(torch.zeros(5, 4), scores_NV).argmax(dim=1)
    assert chosen.tolist() == [1, 1, 3, 3, 4]  # never what cannot be
    cold = module._Choice(4, uniform_NT, 0.01)(torch.zeros(5, 4), scores_NV).argmax(dim=1)
    assert cold.tolist() == [1, 4, 4, 4, 4]


def test_settings_of_the_model_do_not_count_and_are_left_alone(model: MoEModel) -> None:
    prompts_NW = tiny_ids(2, 7)
    expected = continuations(model, prompts_NW, 12)
    settings = GenerationConfig(
        eos_token_id=0, repetition_penalty=9.0, do_sample=True, temperature=3.0, no_repeat_ngram_size=1,
        suppress_tokens=expected[0][:1], max_length=9, min_length=11,
    )  # fmt: skip
    model.model.generation_config = settings
    assert continuations(model, prompts_NW, 12) == expected
    assert model.model.generation_config is settings and settings.repetition_penalty == 9.0


def test_a_class_that_cannot_generate_is_refused(model: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.model), "can_generate", classmethod(lambda _: False))
    with pytest.raises(
        ConfigError, match="Qwen3MoeForCausalLM cannot generate text, .* evaluation.generation=null"
    ):
        continuations(model, tiny_ids(2, 7), 3)


def test_the_batch_size_does_not_matter(model: MoEModel, tmp_path: Path) -> None:
    whole = prepared(tmp_path, batch_size=100)(of_model(model))
    single = prepared(tmp_path, batch_size=1)(of_model(model))
    assert whole == single
    assert generation(tmp_path, batch_size=1).identity() == generation(tmp_path).identity()
    other = prepared(tmp_path, seed=4)(of_model(model))
    written, others = (found.details[CONTINUATIONS]["text_files"] for found in (whole, other))
    assert written["greedy"] == others["greedy"] and written["sampled"] != others["sampled"]


def test_prompts_are_evenly_spread_behind_the_tokens_before_a_text(model: MoEModel, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    measurement = generation(tmp_path)
    measurement.prepare(Source(tokenizer))
    windows = [ids[start : start + 22] for start in range(0, len(ids) - 21, 22)]
    chosen = [windows[number * len(windows) // 5] for number in range(5)]
    assert measurement._windows_NW.tolist() == [[0, *window] for window in chosen]
    found = measurement(of_model(model))
    (protocol,) = found.details["protocols"].values()
    assert protocol["special_tokens"] == ["<|endoftext|>"] and protocol["num_prompts"] == 5
    text = [window[6:] for window in chosen]
    assert found.details["of_the_text_itself"]["distinct_ngrams_text/text_files"] == pytest.approx(
        sum(distinct_ratio(tokens) for tokens in text) / 5
    )


def test_metrics_are_means_over_prompts(
    model: MoEModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loops, one text that ends early, one that ends at once, and one of 16 different tokens."""
    texts = [[5] * 16, [1, 2] * 8, [1, 2, 3, 4], [], list(range(16))]
    given = iter([*texts[:2]] * 2 + [*texts[2:4]] * 2 + [texts[4]] * 2)

    def write(model: MoEModel, prompts_NW: Tensor, *_: Any, **__: Any) -> list[list[int]]:
        return [next(given) for _ in prompts_NW]

    monkeypatch.setattr("heapr.evaluation.generation.continuations", write)
    found = prepared(tmp_path)(of_model(model))
    for way in ("greedy", "sampled"):
        assert found.details[CONTINUATIONS]["text_files"][way] == texts
        assert found.metrics[f"loop_rate_{way}/text_files"] == 2 / 5
        error = math.sqrt((2 * 0.6**2 + 3 * 0.4**2) / 4 / 5)
        assert found.metrics[f"loop_rate_{way}_stderr/text_files"] == pytest.approx(error)
        assert found.metrics[f"length_{way}/text_files"] == pytest.approx((16 + 16 + 4 + 0 + 16) / 5)
        distinct = (1 / 14 + 2 / 14 + 1 + 1) / 4  # the empty one has no 3-grams
        assert found.metrics[f"distinct_ngrams_{way}/text_files"] == pytest.approx(distinct)


def test_agreement_and_increase_by_hand() -> None:
    loop = [7] * 16
    dense = {
        "a": {"agreed_tokens": 2, "greedy": [[1, 2, 3], [1], [1], loop], "sampled": [[], [], loop, loop]}
    }
    pruned = {
        "a": {"agreed_tokens": 2, "greedy": [[1, 2, 9], [1], [1, 2], loop], "sampled": [loop, [], [], loop]}
    }
    metrics = compare_continuations(dense, pruned)
    assert metrics["greedy_agreement/a"] == 3 / 4  # the third went on where the dense one ended
    assert metrics["loop_rate_increase_greedy/a"] == 0.0
    assert metrics["loop_rate_increase_sampled/a"] == 0.0
    # Increases 1, 0, -1, 0 of the same prompts.
    assert metrics["loop_rate_increase_sampled_stderr/a"] == pytest.approx(math.sqrt(2 / 3) / 2)
    assert compare_continuations({"of the dense model alone": {}}, {}) == {}
    assert mean_and_error("x", "a", []) == {} and mean_and_error("x", "a", [2.0]) == {"x/a": 2.0}


class OneOfTwo(Ranks):
    size = 2

    def __init__(self, rank: int, found: dict[int, list[Any]]) -> None:
        self.rank, self._found = rank, found

    def in_order(self, found: Sequence[Any]) -> list[Any]:
        self._found[self.rank] = list(found)
        return list(found)


def test_two_processes_write_what_one_does(model: MoEModel, tmp_path: Path) -> None:
    found: dict[int, list[Any]] = {}
    for rank in range(2):
        material = of_model(model)
        shared = type(material)(**{**vars(material), "ranks": OneOfTwo(rank, found)})
        prepared(tmp_path)(shared)
    first, second = found[0], found[1]
    in_order = [*first[0], *second[0], *first[1]]  # batches 0, 1, 2
    alone = prepared(tmp_path)(of_model(model)).details[CONTINUATIONS]["text_files"]
    assert in_order == [list(both) for both in zip(alone["greedy"], alone["sampled"], strict=True)]


def test_not_a_number_is_refused(model: MoEModel, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.lm_head.weight[3] = float("nan")
    with pytest.raises(
        FloatingPointError, match="generation/text_files: a logit is NaN in batch 0; use a wider"
    ):
        prepared(tmp_path)(of_model(model))


def test_mistakes_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="agreed_tokens=17 is above new_tokens=16"):
        generation(tmp_path, agreed_tokens=17)
    source = Source(byte_tokenizer())
    source.max_sequence_length = 21
    with pytest.raises(ConfigError, match="prompt_length . new_tokens = 22 is above the model's limit of 21"):
        generation(tmp_path).prepare(source)
    with pytest.raises(ConfigError, match="corpus 'text_files' .* less than one window of 516"):
        generation(tmp_path, new_tokens=510).prepare(Source(byte_tokenizer()))


def settings_of_run(folder: Path) -> list[str]:
    sizes = {**OPTIONS, "num_prompts": 3}
    return [
        "model=hf", f"model.path={write_model(folder / 'model')}", "model.dtype=float32", *write_texts(folder),
        "evaluation/evaluators@evaluation=[generation]", "pruning.save_checkpoint=false",
        *(f"evaluation.generation.{name}={value}" for name, value in sizes.items()),
    ]  # fmt: skip


def only_generation(overrides: Sequence[str]) -> list[str]:
    """Without settings of measurements that are not made."""
    others = ("zero_shot", "perplexity", "efficiency", "fidelity", "throughput", "truth")
    return [
        override
        for override in overrides
        if not override.startswith(tuple(f"evaluation.{name}" for name in others))
    ]


def test_a_run_measures_once_and_compares(tmp_path: Path) -> None:
    settings = only_generation(settings_of_run(tmp_path))
    nothing = run_in(tmp_path, *settings, "pruning.ratio=0.0")
    metrics = nothing.metrics
    assert metrics["dense"] == metrics["pruned"] and "loop_rate_greedy/text_files" in metrics["dense"]
    assert metrics["comparison"]["greedy_agreement/text_files"] == 1.0
    assert metrics["comparison"]["loop_rate_increase_sampled/text_files"] == 0.0
    offered = generation(tmp_path).objectives
    assert set(offered) <= metrics["pruned"].keys() | metrics["comparison"].keys()
    half = run_in(tmp_path, *settings, "pruning.ratio=0.5", "evaluation.generation.batch_size=3")
    stages = {stage["what"]: stage["cached"] for stage in half.stages if stage["stage"] == "evaluate"}
    assert stages == {"generation/text_files dense": True, "generation/text_files pruned": False}
    assert 0 <= half.metrics["comparison"]["greedy_agreement/text_files"] < 1
    assert cached_stages(run_in(tmp_path, *settings, "pruning.ratio=0.5"))["evaluate"]
    with pytest.raises(ConfigError, match="generation/text_files generates text, and a streamed model would"):
        run_in(tmp_path, *settings, "pruning.ratio=0.25", "runtime.stream=true")


def test_a_copy_writes_the_same(causal_lm: PreTrainedModel, tmp_path: Path) -> None:
    """Also in bfloat16, where most pairs of logits are close."""
    model = MoEModel(causal_lm.bfloat16())
    copied = MoEModel(copy.deepcopy(model.model))
    measurement = prepared(tmp_path)
    assert measurement(of_model(model)) == measurement(of_model(copied))
