"""Compose and run experiments in tests, on a tiny model folder and a small text."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from heapr.run_experiment import Summary, run
from heapr.schema import ExperimentConfig, register, resolve
from tests.tiny import byte_tokenizer, tiny_qwen3_moe

CONF = Path(__file__).parents[1] / "conf"


def compose_experiment(*overrides: str, conf: Path = CONF) -> ExperimentConfig:
    """What `python run.py <overrides>` would run.

    The files of the chosen options are read and merged once for all tests: that is nearly all of composing.
    Values go on top of a copy as Hydra itself puts them there (tests/test_conf.py compares).
    """
    values = [override for override in overrides if not _is_choice(override, conf)]
    config = copy.deepcopy(
        _compose(conf, tuple(override for override in overrides if override not in values))
    )
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), config)
    return resolve(config)


def _is_choice(override: str, conf: Path) -> bool:
    """Whether an option of a group is chosen; all others set a value."""
    return (conf / override.partition("=")[0].partition("@")[0].lstrip("+~")).is_dir()


@functools.cache
def _compose(conf: Path, choices: tuple[str, ...]) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", overrides=list(choices))


def write_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    tiny_qwen3_moe(seed, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_texts(folder: Path) -> list[str]:
    """Overrides that calibrate on one small text and evaluate on another."""
    sentences = [
        f"Line {number}: the {word} of {number * 7 % 31} things.\n"
        for number in range(60)
        for word in ("sum", "list")
    ]
    (folder / "train.txt").write_text("".join(sentences[:80]))
    (folder / "test.txt").write_text("".join(sentences[80:]))
    return [
        "calibration=text_files", f"calibration.corpus.paths=[{folder / 'train.txt'}]",
        "calibration.num_samples=6", "calibration.sequence_length=32", "calibration.batch_size=4",
        "evaluation/corpora=[text_files]", f"evaluation.corpora.text_files.paths=[{folder / 'test.txt'}]",
        "evaluation.zero_shot=null", "evaluation.perplexity.window=32", "evaluation.efficiency.window=32", "evaluation.fidelity.window=32",
        "evaluation.throughput.prompt_length=16", "evaluation.throughput.new_tokens=2", "evaluation.throughput.repeats=1",
        "evaluation.throughput.batch_size=1", "evaluation.truth.num_groups=4", "evaluation.truth.sample_size=4",
    ]  # fmt: skip


def run_in(folder: Path, *overrides: str) -> Summary:
    """Run an experiment whose outputs lie in a folder."""
    run_folder = folder / "run"
    run_folder.mkdir(parents=True, exist_ok=True)
    return run(
        compose_experiment("tracking=none", f"paths.outputs={folder / 'outputs'}", *overrides), run_folder
    )


def cached_stages(summary: Summary) -> dict[str, bool]:
    """Whether each stage was found; evaluate counts as found if all of its artifacts were."""
    found: dict[str, bool] = {}
    for stage in summary.stages:
        found[stage["stage"]] = found.get(stage["stage"], True) and stage["cached"]
    return found
