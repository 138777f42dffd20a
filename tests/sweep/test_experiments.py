"""Every job of every experiment composes, passes the checks, and its plug-ins can be built."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from heapr.evaluation.build import build_measurements
from heapr.plugins import build
from heapr.sweep.definition import Job, experiment_names, load_definition, make_jobs
from tests.experiment import CONF, compose_experiment

EXPERIMENTS = CONF.parent / "experiments"
VERSIONS = [(name, version) for name in experiment_names(EXPERIMENTS) for version in ("paper", "tiny")]


def jobs_of(name: str, version: str) -> list[Job]:
    return make_jobs(
        load_definition(EXPERIMENTS, name), ["model=tiny"] if version == "tiny" else [], baselines=True
    )


def first_of_their_kinds(jobs: Iterable[Job]) -> dict[str, Job]:
    """Of jobs that differ by numbers alone the first, by what they share."""
    found: dict[str, Job] = {}
    for job in jobs:
        found.setdefault(re.sub(r"=[\d.]+", "=", " ".join(job)), job)
    return found


@functools.cache
def check_settings(settings: Job) -> None:
    """Compose and build; a number swept changes neither, so that many jobs share one check."""
    config = compose_experiment(*settings)
    assert not config.pruning.save_checkpoint
    build(config.calibration.corpus, "calibration.corpus")
    build(config.score, "score")
    names = [one.name for one in build_measurements(config.evaluation)]
    assert names and not any("throughput" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), VERSIONS)
def test_every_job_composes_and_builds(name: str, version: str) -> None:
    for job in first_of_their_kinds(jobs_of(name, version)).values():
        check_settings(job)


def test_every_override_composes_and_builds() -> None:
    """In as few jobs of all experiments as it takes, the longest first."""
    jobs = first_of_their_kinds(job for version in VERSIONS for job in jobs_of(*version))
    seen: set[str] = set()
    for kind in sorted(jobs, key=lambda kind: len(jobs[kind]), reverse=True):
        if not seen.issuperset(kind.split()):
            check_settings(jobs[kind])
            seen.update(kind.split())


@pytest.mark.parametrize(("name", "version"), VERSIONS)
def test_ratios_are_shares(name: str, version: str) -> None:
    jobs = jobs_of(name, version)
    assert jobs
    for job in jobs:
        for number in re.findall(r"pruning\.ratio=([\d.]+)", " ".join(job)):
            assert 0 < float(number) < 1


@pytest.mark.parametrize("name", experiment_names(EXPERIMENTS))
def test_paper_versions_name_the_papers_models_and_tiny_ones_need_no_network(name: str) -> None:
    paper = {"deepseek_moe_16b_base", "qwen1_5_moe_a2_7b_chat", "qwen3_30b_a3b", "qwen2_57b_a14b"}
    for job in jobs_of(name, "paper"):
        assert {override for override in job if override.startswith("model=")} <= {
            f"model={model}" for model in paper
        }
        assert any(override.startswith("calibration=") for override in job)
    for job in jobs_of(name, "tiny"):
        assert "model=tiny" in job
        assert not re.search("wikitext2|ptb|c4|evaluation=paper", " ".join(job))


def test_the_main_table_has_the_published_ratios() -> None:
    found = [
        re.search(r"model=(\S+) pruning.ratio=(\S+)", " ".join(job))
        for job in make_jobs(load_definition(EXPERIMENTS, "main_table"), [])
    ]
    assert [match.groups() for match in found if match] == [
        ("deepseek_moe_16b_base", "0.2"), ("deepseek_moe_16b_base", "0.4"), ("qwen1_5_moe_a2_7b_chat", "0.25"),
        ("qwen1_5_moe_a2_7b_chat", "0.5"), ("qwen3_30b_a3b", "0.25"), ("qwen3_30b_a3b", "0.5"), ("qwen2_57b_a14b", "0.4"),
    ]  # fmt: skip


def test_published_numbers_lie_beside_the_experiments() -> None:
    header = (EXPERIMENTS / "published" / "results.csv").read_text().splitlines()[0]
    assert header == "model,ratio,method,metric,value,source"
    assert Path(EXPERIMENTS / "published" / "README.md").is_file()


@pytest.mark.parametrize("version", ["paper", "tiny"])
def test_shares_of_perplexity_stand_beside_shares_of_divergence_that_every_job_measures(version: str) -> None:
    definition = load_definition(EXPERIMENTS, "beyond")
    for entry in definition.layout(version):
        named = entry.get("metrics", [])
        if entry["kind"].startswith("relative"):
            corpora = [name.partition("/")[2] for name in named if name.startswith("perplexity/")]
            assert corpora and {f"kl_to_dense/{corpus}" for corpus in corpora} <= set(named)
    for job in {
        tuple(override for override in job if not re.search(r"ratio|seed", override))
        for job in jobs_of("beyond", version)
    }:
        names = {one.name for one in build_measurements(compose_experiment(*job).evaluation)}
        assert {
            f"fidelity/{name.removeprefix('perplexity/')}" for name in names if name.startswith("perplexity/")
        } <= names
