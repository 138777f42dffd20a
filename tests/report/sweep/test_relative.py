"""Shares of a baseline's increase by hand: matched, averaged over seeds, drawn; methods in words; what
pruning costs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heapr.errors import ConfigError
from heapr.report.sweep import metrics, report
from heapr.report.sweep.factors import UNKNOWN, factor
from heapr.report.sweep.relative import relative_curve, relative_table
from heapr.report.sweep.report import write_report
from heapr.report.sweep.report_layout import Entry, read_layout
from heapr.report.sweep.results import JobResult
from heapr.report.sweep.shares import with_shares
from heapr.report.sweep.style import style
from heapr.report.sweep.table_parts import GAP, Table
from tests.report.sweep.sweeps import config, failed, job

PERPLEXITY, ACCURACY, KL = "perplexity/wikitext2", "accuracy/piqa", "kl_to_dense/wikitext2"
JOINT = {"_target_": "heapr.pruning.repair.JointRepair", "refits": 0}
BASELINE = {"method": "heapr"}


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with style():
        yield


def settings(
    ratio: float = 0.25, criterion: str = "Heapr", *, seed: int = 0, scope: str = "global", **pruning: Any
) -> dict[str, Any]:
    found = config(ratio, criterion, scope, seed=seed)
    return found | {"pruning": {**found["pruning"], "rounds": 1, "repair": None, **pruning}}


def entry(kind: str = "relative_table", **values: Any) -> Entry:
    given = {"kind": kind, "metrics": [PERPLEXITY], "baseline": BASELINE, "average_over": "seed", **values}
    return read_layout([given]).entries[0]


def seeds(values: dict[str, tuple[float, ...]], ratio: float = 0.25, first: int = 0) -> list[JobResult]:
    """Jobs of criteria, one per seed, with these perplexities; the unpruned model's is 7.5."""
    cases = [
        (criterion, seed, number)
        for criterion, numbers in values.items()
        for seed, number in enumerate(numbers)
    ]
    return [
        job(first + n, {PERPLEXITY: v}, settings(ratio, criterion, seed=seed))
        for n, (criterion, seed, v) in enumerate(cases)
    ]


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in (*row.labels, *row.cells)] for row in table.rows]


def test_shares_are_formed_per_seed_and_then_averaged() -> None:
    """Seed 0: 0.5 of 2, seed 1: 2 of 4; the share of the means would be 0.42."""
    table = relative_table(
        entry(), seeds({"Heapr": (9.5, 11.5), "Fisher": (8.0, 9.5), "Random": (12.5, 13.5)}), []
    )
    assert table.columns == ("method", "WikiText-2 perplexity, share of increase\N{NO-BREAK SPACE}↓")
    assert texts(table) == [["heapr", "1.00 ± 0.00"], ["fisher", "0.38 ± 0.18"], ["random", "2.00 ± 0.71"]]
    assert [row.cells[0].is_best for row in table.rows] == [False, True, False]
    assert "divided by how far it is with method heapr." in table.caption
    assert "Mean ± sample standard deviation over seed." in table.caption


def test_the_lowest_is_sought_among_the_same_model_and_ratio() -> None:
    jobs = [
        *seeds({"Heapr": (9.5,), "Fisher": (8.5,)}),
        *seeds({"Heapr": (17.5,), "Fisher": (8.5,), "Random": (9.5,)}, 0.5, first=2),
    ]
    jobs += [
        job(5, {PERPLEXITY: 8.5}, settings() | {"model": {"name": "tiny", "path": "x", "dtype": "float32"}})
    ]
    table = relative_table(entry(), jobs, [])
    assert texts(table) == [
        ["Mix-1.5-A2B", "25 %", "heapr", "1.00"], ["Mix-1.5-A2B", "25 %", "fisher", "0.50"],
        ["Mix-1.5-A2B", "50 %", "heapr", "1.00"], ["Mix-1.5-A2B", "50 %", "fisher", "0.10"], ["Mix-1.5-A2B", "50 %", "random", "0.20"],
        ["tiny", "25 %", "heapr", "1.00"],
    ]  # fmt: skip
    assert [row.cells[0].is_best for row in table.rows] == [False, True, False, True, False, False]


def test_what_has_no_baseline_is_a_gap_with_a_note() -> None:
    jobs = [
        *seeds({"Heapr": (9.5,), "Fisher": (8.0, 9.5)}),
        *seeds({"Fisher": (9.0,)}, 0.5, first=3),
        failed(4, "recipe=best"),
    ]
    jobs[0] = JobResult(0, (), None, jobs[0].summary, None)
    table = relative_table(entry(rows=["ratio", "method"]), jobs, [])
    assert texts(table) == [
        ["25 %", "heapr", "1.00"],
        ["25 %", "fisher", "0.25"],
        ["50 %", "fisher", GAP],
        [UNKNOWN, "best", GAP],
    ]
    assert [row.cells[0].notes for row in table.rows] == [(), (1,), (1,), (2,)]
    assert table.notes[0] == "No finished job with method heapr and all else equal." and table.notes[
        1
    ].startswith("Job 4 failed")


def test_where_chooses_rows_but_not_baselines() -> None:
    jobs = seeds({"Heapr": (9.5,), "Fisher": (8.5,), "Random": (11.5,)})
    assert texts(relative_table(entry(where={"method": ["fisher", "random"]}), jobs, [])) == [
        ["fisher", "0.50"],
        ["random", "2.00"],
    ]


def test_a_baseline_that_does_no_damage_has_no_shares_and_costs_stay_as_they_are() -> None:
    stages = [
        {
            "stage": "calibrate",
            "what": "",
            "key": "k",
            "path": "nowhere",
            "cached": False,
            "seconds": 2.0,
            "peak_memory_bytes": 2**30,
        }
    ]
    jobs = [
        job(n, {PERPLEXITY: v}, settings(criterion=c), stages=stages)
        for n, (c, v) in enumerate((("Heapr", 7.5), ("Fisher", 8.0)))
    ]
    table = relative_table(entry(metrics=[PERPLEXITY, "pruning_time_ratio"]), jobs, [])
    assert texts(table) == [["heapr", GAP, "1.0"], ["fisher", GAP, "1.0"]]
    assert table.notes == ("No worse than unpruned with method heapr: WikiText-2 perplexity.",)
    assert (table.rows[0].cells[0].notes, table.rows[0].cells[1].notes) == ((1,), ())


def test_accuracy_is_lost_and_divergence_starts_at_zero() -> None:
    baseline, other = (
        job(0, {ACCURACY: 0.65, KL: 0.4}, settings()),
        job(1, {ACCURACY: 0.7, KL: 0.1}, settings(criterion="Fisher")),
    )
    # Of the 0.1 lost from 0.75.
    assert metrics.share_of_increase(other, baseline, ACCURACY) == pytest.approx(0.5)
    assert metrics.share_of_increase(other, baseline, KL) == pytest.approx(0.25)
    assert metrics.share_of_increase(other, baseline, PERPLEXITY) is None


def test_a_factor_that_the_baseline_names_need_not_be_equal_and_others_must() -> None:
    jobs = [
        job(0, {PERPLEXITY: 9.5}, settings(budget="atomic_experts")),
        job(1, {PERPLEXITY: 8.5}, settings(criterion="Fisher", budget="flops")),
        job(2, {PERPLEXITY: 8.0}, settings(criterion="Fisher", budget="atomic_experts")),
    ]
    found, remarks = with_shares(entry(), jobs)
    assert (
        list(remarks) == [(1, f"relative/{PERPLEXITY}")]
        and found[2].metrics["comparison"][f"relative/{PERPLEXITY}"] == 0.25
    )
    found, remarks = with_shares(entry(baseline={**BASELINE, "pruning.budget": "atomic_experts"}), jobs)
    assert not remarks and found[1].metrics["comparison"][f"relative/{PERPLEXITY}"] == 0.5


def test_two_baselines_that_differ_are_refused() -> None:
    repaired = {"_target_": "heapr.pruning.repair.JointRepair", "ridge": 0.1}
    jobs = [
        job(n, {PERPLEXITY: 9.0}, settings(repair={**repaired, "ridge": ridge}))
        for n, ridge in enumerate((0.1, 0.01))
    ]
    with pytest.raises(
        ConfigError,
        match=(
            r"jobs 0 and 1 could both be the baseline \(method heapr \+ joint repair\), but differ in pruning"
        ),
    ):
        relative_table(entry(baseline={"method": "heapr + joint repair"}), jobs, [])


def test_curve_has_a_line_per_method_and_one_for_the_baseline() -> None:
    values = {"Heapr": (9.5, 11.5), "Fisher": (8.0, 9.5)}
    jobs = [
        *seeds(values, 0.5),
        *seeds({"Heapr": (8.5, 8.5), "Fisher": (7.6, 7.7), "Random": (8.5, 9.5)}, 0.25, first=4),
    ]
    lone = job(20, {PERPLEXITY: 8.0}, settings(0.6, "Fisher"))
    (drawing,) = relative_curve(entry("relative_curve"), [*jobs, lone], [])
    (axis,) = drawing.figure.axes
    containers = {container.get_label(): container for container in axis.containers}
    assert list(containers) == ["random", "fisher"]  # from above, as they lie
    line = containers["fisher"][0]
    assert list(line.get_xdata()) == pytest.approx([25, 50]) and list(line.get_ydata()) == pytest.approx(
        [0.15, 0.375]
    )
    (bars,) = containers["fisher"][2]
    assert bars.get_segments()[1][:, 1] == pytest.approx([0.375 - 0.125 * 2**0.5, 0.375 + 0.125 * 2**0.5])
    labels = {line.get_label(): line for line in axis.get_lines()}
    assert list(labels["heapr (baseline)"].get_ydata()) == [1.0, 1.0]
    assert (axis.get_ylabel(), axis.get_xlabel()) == (
        "WikiText-2 perplexity,\nshare of increase",
        "atomic experts removed (%)",
    )
    assert drawing.missing.startswith(
        "Not drawn, because the baseline or a number is missing: jobs 20. Not tested"
    )


def test_large_shares_and_those_below_zero_share_an_axis() -> None:
    jobs = seeds({"Heapr": (8.0,), "Fisher": (7.4,), "Random": (17.5,)})
    (drawing,) = relative_curve(entry("relative_curve"), jobs, [])
    (axis,) = drawing.figure.axes
    low, high = axis.get_ylim()
    assert (
        axis.get_yscale() == "symlog"
        and low < -0.2
        and high > 20
        and {0.0, 1.0, 20.0} <= set(axis.get_yticks())
    )


@pytest.mark.parametrize(
    ("random", "scale"), [(10.5, "linear"), (17.5, "log"), (7.4, "linear")], ids=["narrow", "wide", "below"]
)
def test_panels_share_one_scale(random: float, scale: str) -> None:
    """The second panel spans a factor of 2 at most, whatever the first one spans."""
    jobs = seeds({"Heapr": (8.5,), "Fisher": (8.0,), "Random": (random,)})
    for number, kl in enumerate((0.1, 0.05, 0.08)):
        summary = jobs[number].summary
        assert summary is not None
        summary["metrics"]["comparison"]["kl_to_dense/wikitext2"] = kl
    metrics = [PERPLEXITY, "kl_to_dense/wikitext2"]
    (drawing,) = relative_curve(entry("relative_curve", metrics=metrics), jobs, [])
    assert [axis.get_yscale() for axis in drawing.figure.axes] == [scale, scale]
    for axis in drawing.figure.axes:
        low, high = axis.get_ylim()
        ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
        assert len(ticks) >= 2


def test_report_holds_shares_in_all_forms(tmp_path: Path) -> None:
    section = [
        {"kind": "relative_table", "metrics": PERPLEXITY, "baseline": BASELINE, "average_over": "seed"}
    ]
    section += [
        {"kind": "relative_curve", "metrics": PERPLEXITY, "baseline": BASELINE, "where": {"method": "fisher"}}
    ]
    jobs = seeds({"Heapr": (9.5, 11.5), "Fisher": (8.0, 9.5)})
    files = {path.name: path for path in write_report(jobs, section, tmp_path, None)}  # type: ignore[arg-type]
    assert list(files) == [
        "table.md",
        "table.csv",
        "table.tex",
        "relative_curve.svg",
        "relative_curve.png",
        "report.html",
    ]
    assert "| fisher | **0.38 ± 0.18** |" in files["table.md"].read_text()
    assert (
        r"\textbf{0.38 $\pm$ 0.18}" in files["table.tex"].read_text()
        and "<b>0.38 ± 0.18</b>" in files["report.html"].read_text()
    )
    rows = list(csv.DictReader(files["table.csv"].open()))
    assert [float(row[f"comparison/relative to method heapr/{PERPLEXITY}"]) for row in rows] == [
        1.0,
        1.0,
        0.25,
        0.5,
    ]
    assert [row["method"] for row in rows] == ["heapr", "heapr", "fisher", "fisher"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (settings(), "heapr"),
        (
            settings(criterion="Fisher", repair={"_target_": "heapr.pruning.repair.ExpertRepair"}),
            "fisher + expert repair",
        ),
        (settings(criterion="Fisher", repair=JOINT), "fisher + joint repair"),
        (
            settings(criterion="Fisher", repair={**JOINT, "refits": 2}, rounds=4),
            "fisher + full repair, 4 rounds",
        ),
        (
            settings(
                criterion="Fisher", repair={**JOINT, "refits": 1, "target": "residual_stream"}, rounds=2
            ),
            "fisher + stream repair, 2 rounds",
        ),
        (
            settings(criterion="Fisher", repair={**JOINT, "target": "residual_stream"}),
            "fisher + joint stream repair",
        ),
        (settings(criterion="Camera", scope="layer"), "camera (layer)"),
        (config(), "heapr"),
    ],
)
def test_methods_in_words(found: dict[str, Any], expected: str) -> None:
    assert factor(job(0, {}, found), "method") == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["recipe=best", "pruning.ratio=0.5"], "best"),
        (["recipe=best", "pruning/repair=none", "pruning.rounds=2"], "best without repair, 2 rounds"),
        (["score=fisher", "pruning/repair=full", "pruning.rounds=4"], "fisher + full repair, 4 rounds"),
        (["score=camera", "pruning=layer", "pruning/repair=none", "pruning.rounds=1"], "camera (layer)"),
        (["pruning.ratio=0.5"], UNKNOWN),
    ],
)
def test_methods_of_failed_jobs(overrides: list[str], expected: str) -> None:
    assert factor(failed(0, *overrides), "method") == expected


def test_pruning_costs_what_making_its_artifacts_took(tmp_path: Path) -> None:
    """All rounds, cached or not, evaluations not; unknown as soon as one artifact's cost is."""

    def stage(
        name: str, seconds: float, peak: int, *, cached: bool = False, what: str = ""
    ) -> dict[str, Any]:
        folder = tmp_path / name / what.replace(" ", "_")
        if cached:
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))
            seconds, peak = 0.01, 0
        path = str(folder)
        return {
            "stage": name,
            "what": what,
            "key": what,
            "path": path,
            "cached": cached,
            "seconds": seconds,
            "peak_memory_bytes": peak,
        }

    stages = [
        stage("calibrate", 4.0, 100, cached=True), stage("score", 1.0, 50), stage("evaluate", 90.0, 900, what="perplexity dense"),
        stage("prune", 3.0, 70), stage("calibrate", 5.0, 300, cached=True, what="round 2"), stage("prune", 7.0, 200, what="round 2"),
    ]  # fmt: skip
    done = job(0, {}, stages=stages)
    assert (
        metrics.value(done, "pruning_time_ratio") == 20 / 4
        and metrics.value(done, "pruning_peak_memory_bytes") == 300
    )
    assert metrics.column_label("pruning_time_ratio") == "pruning time, in calibrations\N{NO-BREAK SPACE}↓"
    assert (
        metrics.text("pruning_time_ratio", 5.0) == "5.0"
        and metrics.text("pruning_peak_memory_bytes", 2.0**30) == "1.00"
    )
    # Of an older version.
    (tmp_path / "calibrate" / "round_2" / "manifest.json").write_text('{"seconds": 5.0}')
    assert (
        metrics.value(done, "pruning_time_ratio") == 5
        and metrics.value(done, "pruning_peak_memory_bytes") is None
    )
    (tmp_path / "calibrate" / "round_2" / "manifest.json").unlink()
    assert metrics.value(done, "pruning_time_ratio") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"baseline": {}}, r"report.0 \(relative_table\) has no baseline; give the factors it has"),
        ({"baseline": {"metod": "heapr"}}, "report.0.baseline: unknown 'metod'; did you mean method"),
        ({"metrics": []}, r"report.0 \(relative_table\) has no metrics"),
    ],
)
def test_mistakes_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        entry(**given)


def test_all_figures_of_a_report_have_one_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model's shares reach 20, the other's 1; both panels end alike."""
    drawn = []
    monkeypatch.setattr(report, "write_figure", lambda figure, path: drawn.append(figure) or [])
    jobs = seeds({"Heapr": (8.0,), "Fisher": (7.75,), "Random": (17.5,)})
    other = {"name": "tiny", "path": "builtin:x", "dtype": "float32"}
    for number, one in enumerate(seeds({"Heapr": (8.0,), "Fisher": (7.9,)}, first=3)):
        jobs.append(job(3 + number, dict(one.metrics["pruned"]), {**one.config, "model": other}))
    section = [{"kind": "relative_curve", "metrics": PERPLEXITY, "baseline": BASELINE}]
    write_report(jobs, section, tmp_path, None)
    panels = [figure.axes[0] for figure in drawn]
    assert len(panels) == 2 and panels[0].get_ylim() == panels[1].get_ylim()
    assert {panel.get_yscale() for panel in panels} == {"log"} and panels[1].get_ylim()[1] > 18


def test_an_error_bar_does_not_set_the_scale() -> None:
    """Shares of 0.25 and 4 over two seeds: their mean is 2.1, their deviation 2.7."""
    jobs = seeds({"Heapr": (8.5, 8.5), "Fisher": (7.75, 11.5)})
    (drawing,) = relative_curve(entry("relative_curve"), jobs, [])
    (axis,) = drawing.figure.axes
    low, high = axis.get_ylim()
    assert -0.2 < low < 0 and 2.125 < high < 2.3 and drawing.shares == (axis,)
