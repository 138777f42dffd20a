"""Zero-shot accuracy: lm-eval's engine against log-likelihoods summed by hand, its options, its side effects,
the paper's tasks."""

from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tqdm import tqdm

from heapr.errors import ConfigError
from heapr.evaluation import zero_shot_engine, zero_shot_local, zero_shot_tasks
from heapr.evaluation.zero_shot import ZeroShot, average_accuracy
from heapr.model.moe import MoEModel
from heapr.plugins import build
from heapr.pruning.surgery import mask, remove
from heapr.types import Plan
from tests.evaluation.material import Source, of_model
from tests.tiny import byte_tokenizer, tiny_qwen3_moe

ITEMS = [
    {"question": f"{a}+{b}=", "answers": [str(a + b), str(a * b + 1), "the long answer"], "right": n % 3}
    for n, (a, b) in enumerate((a, b) for a in range(2, 7) for b in range(2, 6))
]


def write_task(folder: Path, name: str = "sums", items: list[dict[str, Any]] = ITEMS) -> Path:
    """A task of the user's own in lm-eval's YAML, with its data beside it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": name, "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder.parent / "cache")},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{answers}}", "doc_to_target": "right", "metadata": {"version": 3.0},
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    return write_task(tmp_path / "tasks")


def measure(model: MoEModel, folder: Path | None, task: str = "sums", **options: Any) -> dict[str, Any]:
    evaluator = ZeroShot(task, include_path=None if folder is None else str(folder), **options)
    evaluator.prepare(Source(byte_tokenizer()))
    found = evaluator(of_model(model))
    return {
        **found.metrics,
        **{f"protocol/{name}": record for name, record in found.details["protocols"].items()},
    }


def log_likelihood(model: MoEModel, context: str, continuation: str) -> float:
    """Sum over the continuation's tokens of the log-probability after everything before them."""
    before = byte_tokenizer()(context)["input_ids"]
    whole = byte_tokenizer()(context + continuation)["input_ids"]
    with torch.no_grad():
        log_probability = model.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(log_probability[place - 1, whole[place]].item() for place in range(len(before), len(whole)))


def test_accuracy_is_that_of_log_likelihoods_summed_by_hand(model: MoEModel, sums: Path) -> None:
    right: dict[str, list[bool]] = {"accuracy": [], "accuracy_norm": []}
    for item in ITEMS:
        found = [log_likelihood(model, item["question"], f" {answer}") for answer in item["answers"]]
        per_character = [value / len(answer) for value, answer in zip(found, item["answers"], strict=True)]
        right["accuracy"].append(max(range(3), key=found.__getitem__) == item["right"])
        right["accuracy_norm"].append(max(range(3), key=per_character.__getitem__) == item["right"])
    metrics = measure(model, sums)
    for name, answers in right.items():
        share = sum(answers) / len(answers)
        assert metrics[f"{name}/sums"] == pytest.approx(share)
        assert metrics[f"{name}_stderr/sums"] == pytest.approx(
            math.sqrt(share * (1 - share) / (len(answers) - 1))
        )
    assert 0 < metrics["accuracy/sums"] < 1


def test_a_pruned_model_gets_its_own_answers(sums: Path) -> None:
    """Those of the masked dense model, not those that the dense model gave before."""
    generator = torch.Generator().manual_seed(0)
    plan = Plan(layers={index: torch.rand((4, 8), generator=generator) > 0.8 for index in (0, 1)})
    dense, masked, pruned = (MoEModel(tiny_qwen3_moe()) for _ in range(3))
    mask(masked, plan)
    remove(pruned, plan)
    evaluator = ZeroShot("sums", include_path=str(sums))
    evaluator.prepare(Source(byte_tokenizer()))
    before, expected, found, again = (evaluator(of_model(model)) for model in (dense, masked, pruned, dense))
    assert found == expected
    assert found.metrics["accuracy/sums"] != before.metrics["accuracy/sums"]
    assert again == before


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_neither_result_nor_identity(model: MoEModel, sums: Path, batch_size: int) -> None:
    assert measure(model, sums, batch_size=batch_size) == measure(model, sums)
    fixed, automatic = (
        ZeroShot("sums", include_path=str(sums), batch_size=size) for size in (batch_size, "auto")
    )
    assert fixed.identity() == automatic.identity()


def test_the_batch_size_that_lm_eval_finds_gives_the_same_result_without_a_word(
    model: MoEModel, sums: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = measure(model, sums)
    monkeypatch.setattr(zero_shot_engine, "BATCH_SIZE_ON_CPU", "auto")  # as on a GPU
    assert measure(model, sums) == expected
    assert capfd.readouterr() == ("", "")


def test_the_protocol_names_version_shots_limit_and_requests(model: MoEModel, sums: Path) -> None:
    whole, with_shots, limited = (
        measure(model, sums, **o)["protocol/sums"] for o in ({}, {"num_fewshot": 2}, {"limit": 5})
    )
    assert (whole["version"], whole["num_fewshot"], whole["limit"], whole["num_items"]) == (
        3.0,
        0,
        None,
        len(ITEMS),
    )
    assert limited["num_items"] == 5
    assert len({record["requests_sha256"] for record in (whole, with_shots, limited)}) == 3
    assert measure(model, sums)["protocol/sums"] == whole


def test_identity_follows_content_of_the_users_folder_and_options(tmp_path: Path) -> None:
    first = write_task(tmp_path / "first")
    identity = ZeroShot("sums", include_path=str(first)).identity()
    assert identity["lm_eval"].startswith("0.4.")
    assert ZeroShot("sums", include_path=str(first), limit=3).identity() != identity
    assert ZeroShot("sums", include_path=str(first), num_fewshot=1).identity() != identity
    write_task(first, items=ITEMS[1:])
    assert ZeroShot("sums", include_path=str(first)).identity() != identity
    assert json.loads(json.dumps(identity)) == identity


def test_leaves_no_side_effects(model: MoEModel, sums: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import lm_eval.api.model
    import lm_eval.models.huggingface

    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    evaluator = ZeroShot("sums", include_path=str(sums))
    evaluator.prepare(Source(tokenizer))
    evaluator(of_model(model))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2] and torch.equal(
        torch.get_rng_state(), states[2]
    )
    assert tokenizer.pad_token is None
    assert lm_eval.api.model.tqdm is tqdm and lm_eval.models.huggingface.tqdm is tqdm
    assert logging.getLogger("lm_eval").propagate and not logging.getLogger("lm_eval").handlers
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


def test_requests_that_lose_their_beginning_are_counted(
    model: MoEModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"question": "x" * 100, "answers": ["ab", "cd"], "right": 0}
    measure(model, write_task(tmp_path / "tasks", items=[long, {**long, "question": "y"}]))
    assert "sums: 2 inputs are longer than the model accepts and lost their beginning" in caplog.text


def write_generating_task(folder: Path) -> None:
    """The task 'say', on the data of 'sums'."""
    generate = {
        "task": "say", "dataset_path": "json", "output_type": "generate_until", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}, "cache_dir": str(folder.parent / "cache")},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answers[right]}}",
        "generation_kwargs": {"until": ["="], "max_gen_toks": 2, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
    }  # fmt: skip
    (folder / "say.yaml").write_text(json.dumps(generate))


def test_every_metric_of_a_group_and_of_a_generating_task_is_reported(model: MoEModel, sums: Path) -> None:
    write_generating_task(sums)
    group = {
        "group": "both",
        "task": ["sums"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (sums / "both.yaml").write_text(json.dumps(group))
    said = measure(model, sums, "say", limit=2)
    assert 0 <= said["exact_match.first/say"] <= 1 and "accuracy/say" not in said
    found = measure(model, sums, "both")
    assert found["accuracy/both"] == pytest.approx(found["accuracy/sums"])
    assert found["protocol/sums"]["task"] == "sums"


def test_a_task_that_generates_is_refused_where_the_model_is_streamed(sums: Path) -> None:
    write_generating_task(sums)
    chooses, says = (ZeroShot(task, include_path=str(sums)) for task in ("sums", "say"))
    for evaluator in (chooses, says):
        evaluator.prepare(Source(byte_tokenizer()))
    chooses.refuse_generation()
    with pytest.raises(ConfigError, match="'say' generates text, .* give runtime.stream=false"):
        says.refuse_generation()


ARC = {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "B"}
PAPER_ROWS: dict[str, dict[str, Any]] = {
    "allenai/openbookqa": {"question_stem": "The sun is", "choices": ARC["choices"], "answerKey": "A"},
    "allenai/ai2_arc": ARC,
    "allenai/winogrande": {"sentence": "The cup fell, so _ broke.", "option1": "it", "option2": "she", "answer": "1"},
    "Rowan/hellaswag": {
        "ctx_a": "A man runs.", "ctx_b": "he", "activity_label": "Run", "endings": ["stops.", "sits.", "swims.", "flies."], "label": "0",
    },
    "baber/piqa": {"goal": "open a door", "sol1": "push it", "sol2": "eat it", "label": 0},
    "regisss/math_qa": {"Problem": "1 + 1?", "options": "a ) 2 , b ) 3 , c ) 4 , d ) 5 , e ) 6", "correct": "a"},
}  # fmt: skip


@pytest.fixture
def paper_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **_: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list([PAPER_ROWS[path]] * 3)
                for split in ("train", "validation", "test")
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_the_papers_seven_tasks_run_and_are_averaged(paper_data: None) -> None:
    model = MoEModel(tiny_qwen3_moe(max_position_embeddings=512))
    tasks = ["openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "mathqa"]
    metrics: dict[str, Any] = {}
    for task in tasks:
        metrics |= measure(model, None, task)
        assert metrics[f"protocol/{task}"]["num_fewshot"] == 0 and metrics[f"protocol/{task}"]["version"]
    accuracies = [metrics[f"accuracy/{task}"] for task in tasks]
    assert set(accuracies) == {0.0, 1.0}  # three equal questions each
    average = average_accuracy(["efficiency", *(f"accuracy/{task}" for task in tasks)], metrics)
    assert average["accuracy/average"] == pytest.approx(sum(accuracies) / 7)
    # The one task without.
    normalised = [metrics[f"accuracy_norm/{task}"] for task in tasks if task != "winogrande"]
    assert average["accuracy_norm/average"] == pytest.approx(
        (sum(normalised) + metrics["accuracy/winogrande"]) / 7
    )
    assert metrics["protocol/arc_easy"]["data"] == "allenai/ai2_arc/ARC-Easy"


def test_average_needs_an_accuracy_of_every_task() -> None:
    metrics = {
        "accuracy/a": 0.5,
        "accuracy/b": 0.7,
        "accuracy/b_part": 0.1,
        "accuracy_stderr/a": 0.03,
        "accuracy_stderr/b": 0.04,
    }
    average = average_accuracy(["accuracy/a", "perplexity/x", "accuracy/b"], metrics)
    assert average == {
        "accuracy/average": pytest.approx(0.6),
        "accuracy_stderr/average": pytest.approx(0.025),
    }
    assert average_accuracy(["accuracy/a", "accuracy/gsm8k"], metrics) == {}
    assert average_accuracy(["perplexity/x"], metrics) == {}


def test_normalised_average_takes_plain_accuracy_where_a_task_has_no_other() -> None:
    metrics = {"accuracy/a": 0.5, "accuracy_norm/a": 0.6, "accuracy/b": 0.7}
    metrics |= {"accuracy_stderr/a": 0.01, "accuracy_norm_stderr/a": 0.03, "accuracy_stderr/b": 0.04}
    average = average_accuracy(["accuracy/a", "accuracy/b"], metrics)
    assert average["accuracy_norm/average"] == pytest.approx(0.65) and average[
        "accuracy_norm_stderr/average"
    ] == pytest.approx(0.025)
    assert average["accuracy/average"] == pytest.approx(0.6)


def test_data_that_are_not_here_are_named_at_once() -> None:
    with pytest.raises(
        ConfigError,
        match=r"zero-shot task 'piqa' are not on this machine: .*'baber/piqa'.*python -m heapr.prefetch",
    ) as caught:
        ZeroShot("piqa").prepare(Source(byte_tokenizer()))
    assert "\n" not in str(caught.value)


def test_an_unknown_task_is_refused_with_suggestions(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All of lm-eval's take long to read.
    only_the_papers = zero_shot_tasks._task_manager(sums, "content", everything=False)
    monkeypatch.setattr(zero_shot_tasks, "_task_manager", lambda *_, everything: only_the_papers)
    for task, message in {
        "piqua": "piqa",
        "sum": "sums",
        "arc-easy": "arc_easy",
    }.items():
        with pytest.raises(ConfigError, match=f"'{task}' is unknown; did you mean .*{message}") as caught:
            ZeroShot(task, include_path=str(sums)).prepare(Source(byte_tokenizer()))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0 is below 1"),
        ({"num_fewshot": -1}, "num_fewshot=-1 is below 0"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"batch_size": "all"}, "batch_size=all is unknown; give a whole number of at least 1 or auto"),
        ({"include_path": "/no/such/folder"}, "include_path='/no/such/folder' is not a folder"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(
            {"_target_": "heapr.evaluation.zero_shot.ZeroShot", **options},
            "evaluation.zero_shot",
            task="piqa",
        )


BAD_TEMPLATES = [
    ({"doc_to_text": "{{question"}, "unexpected end of template"),
    ({"doc_to_text": "{{question|nonsense}}"}, "No filter named 'nonsense'"),
    ({"doc_to_text": "{{quesiton}}"}, "'quesiton' is undefined"),
    ({"doc_to_text": "{{1 / 0}}"}, "ZeroDivisionError"),
    ({"doc_to_choice": "{{answers.first}}"}, "has no attribute 'first'"),
    ({"doc_to_choice": "{{question}}"}, "SyntaxError"),
    ({"doc_to_target": "{{right"}, "unexpected end of template"),
    ({"doc_to_target": "wrong"}, "the answer 'wrong' of the first question is none of its choices"),
    ({"doc_to_target": "3"}, "IndexError"),
    ({"description": "{{question"}, "unexpected end of template"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_TEMPLATES)
def test_a_bad_template_of_ones_own_task_is_refused_with_the_reason(
    change: dict[str, str], reason: str, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: without a search through all tasks of lm-eval, which takes long."""
    task = json.loads((sums / "sums.yaml").read_text())
    (sums / "sums.yaml").write_text(json.dumps({**task, **change}))
    own = zero_shot_tasks._task_manager(sums, str(change), everything=False)
    managers = {False: own}
    monkeypatch.setattr(zero_shot_tasks, "_task_manager", lambda *_, everything: managers[everything])
    with pytest.raises(ConfigError, match=r"zero-shot task 'sums' cannot be loaded \(.*; correct") as caught:
        ZeroShot("sums", include_path=str(sums)).prepare(Source(byte_tokenizer()))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DOCUMENTS = [
    " ".join(WORDS[(n * step + n) % 10] + str(n) for n in range(length))
    for step, length in zip(range(40), range(28, 68), strict=True)
]


def test_items_ask_for_the_documents_own_continuation() -> None:
    items = zero_shot_local.make_items(DOCUMENTS)
    assert len(items) == sum(len(document.split()) // 28 for document in DOCUMENTS)
    owners = {item.context: document for item in items for document in DOCUMENTS if item.context in document}
    for item in items:
        assert f"{item.context} {item.choices[item.label]}" in owners[item.context]
        assert len(set(item.choices)) == 4
        assert len(item.context.split()) == 24 and all(len(choice.split()) == 4 for choice in item.choices)
    lengths = [[len(choice) for choice in item.choices] for item in items]
    assert sum(max(row) - min(row) for row in lengths) / len(lengths) < 2
    assert all(sum(item.label == label for item in items) > 0.05 * len(items) for label in range(4))


def test_items_depend_on_the_texts_alone() -> None:
    assert zero_shot_local.make_items(DOCUMENTS) == zero_shot_local.make_items(DOCUMENTS)
    backwards = zero_shot_local.make_items(DOCUMENTS[::-1])
    assert sorted(map(str, backwards)) == sorted(map(str, zero_shot_local.make_items(DOCUMENTS)))


def test_too_few_documents_give_no_items() -> None:
    assert zero_shot_local.make_items(DOCUMENTS[:3]) == []


def test_a_tokenizer_without_an_end_token_is_refused_before_the_start(sums: Path) -> None:
    """lm-eval would find out when the first request is made, after calibration."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    evaluator = ZeroShot("sums", include_path=str(sums))
    with pytest.raises(
        ConfigError, match="zero-shot task 'sums' needs a token for the beginning or the end of a text"
    ) as caught:
        evaluator.prepare(Source(tokenizer))
    assert "\n" not in str(caught.value)
    tokenizer.bos_token = "<|endoftext|>"
    evaluator.prepare(Source(tokenizer))
    write_task(sums, "written")
    task = json.loads((sums / "written.yaml").read_text())
    for name in ("doc_to_choice", "metric_list"):
        del task[name]
    generating = {
        "output_type": "generate_until",
        "doc_to_target": "{{right}}",
        "generation_kwargs": {"until": ["."]},
    }
    (sums / "written.yaml").write_text(json.dumps({**task, **generating}))
    with pytest.raises(ConfigError, match="zero-shot task 'written' needs a token for the end of a text"):
        ZeroShot("written", include_path=str(sums)).prepare(Source(tokenizer))
