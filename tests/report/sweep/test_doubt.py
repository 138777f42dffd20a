"""Shares of what is near zero are marked, in every form of a table and in figures; verdicts computed by
hand."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from heapr.report.sweep.doubt import is_doubtful
from heapr.report.sweep.relative import relative_curve, relative_table
from heapr.report.sweep.report import write_report
from heapr.report.sweep.results import JobResult
from heapr.report.sweep.shares import with_shares
from heapr.report.sweep.style import HOLLOW, style
from heapr.report.sweep.table_parts import GAP, Table
from tests.report.sweep.sweeps import job
from tests.report.sweep.test_relative import ACCURACY, BASELINE, KL, PERPLEXITY, entry, settings, texts

MEANING = "†: the baseline's increase is below three of its standard errors, so the share means nothing."


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with style():
        yield


def measured(
    number: int,
    criterion: str,
    increase: float,
    error: float | None,
    *,
    seed: int = 0,
    ratio: float = 0.5,
    **more: float,
) -> JobResult:
    """A job whose perplexity is so much above the unpruned model's 7.5; `kl` if its divergence was
    measured."""
    pruned = {PERPLEXITY: 7.5 + increase}
    found = job(number, pruned, settings(ratio, criterion, seed=seed))
    comparison = {"perplexity_increase/wikitext2": increase}
    comparison |= {} if error is None else {"perplexity_increase_standard_error/wikitext2": error}
    comparison |= {KL: more["kl"]} if "kl" in more else {}
    assert found.summary is not None
    found.summary["metrics"]["comparison"].update(comparison)  # type: ignore[index]
    return found


def table_of(jobs: list[JobResult], *names: str, **values: object) -> Table:
    return relative_table(entry(metrics=list(names or [PERPLEXITY]), **values), jobs, [])


@pytest.mark.parametrize(("error", "text"), [(0.16, "0.50"), (0.17, "0.50†"), (0.5 / 3, "0.50")])
def test_a_share_is_marked_below_three_standard_errors(error: float, text: str) -> None:
    """Of the baseline's increase of 0.5; the other model's own error does not matter."""
    jobs = [measured(0, "Heapr", 0.5, error), measured(1, "Fisher", 0.25, 10.0)]
    table = table_of(jobs)
    assert texts(table)[1] == ["fisher", text]
    assert (MEANING in table.caption) == ("†" in text)
    assert table.rows[1].cells[0].is_best == ("†" not in text), "no best among numbers that mean nothing"


@pytest.mark.parametrize(
    ("increases", "marked"),
    [((0.3, 0.5), False), ((0.4, 0.2), True), ((0.4, 0.24), False), ((0.7, -0.1), True)],
    ids=["0.4 of 0.105", "0.3 of 0.105", "0.32 of 0.105", "0.3 of 0.105, of which one is below zero"],
)
def test_over_seeds_the_errors_mean_is_the_means_error(increases: tuple[float, float], marked: bool) -> None:
    """Errors of 0.12 and 0.09 on the same windows: that of the mean is 0.105, and three of it 0.315."""
    jobs = [measured(seed, "Heapr", increases[seed], (0.12, 0.09)[seed], seed=seed) for seed in (0, 1)]
    jobs += [measured(2 + seed, "Fisher", 0.15, 0.01, seed=seed) for seed in (0, 1)]
    shared, _ = with_shares(entry(), jobs)
    assert is_doubtful(shared[2:], f"relative/{PERPLEXITY}") is marked
    assert texts(table_of(jobs))[1][1].endswith("†") is marked


def test_what_has_no_standard_error_is_not_marked_and_the_caption_says_so() -> None:
    jobs = [measured(0, "Heapr", 0.01, None), measured(1, "Fisher", 0.1, 0.01)]
    table = table_of(jobs)
    assert texts(table)[1] == ["fisher", "10.00"] and "†" not in table.caption
    assert (
        "Not tested: these results do not hold standard errors of the baseline's increase." in table.caption
    )
    jobs += [measured(2, "Heapr", 0.1, 0.2, ratio=0.6), measured(3, "Fisher", 0.1, 0.2, ratio=0.6)]
    table = table_of(jobs)
    assert [text[-1] for text in texts(table)] == ["1.00", "10.00", "1.00†", "1.00†"]
    assert (
        f"{MEANING} Not tested, because the standard error of the baseline's increase is missing: jobs 0, 1."
        in table.caption
    )


def test_divergence_stands_beside_perplexity_and_says_where_it_was_not_measured() -> None:
    jobs = [
        measured(0, "Heapr", 0.5, 0.3, kl=0.2),
        measured(1, "Fisher", 0.25, 0.3, kl=0.06),
        measured(2, "Random", 1.0, 0.3),
    ]
    table = table_of(jobs, PERPLEXITY, KL)
    assert texts(table) == [
        ["heapr", "1.00†", "1.00"],
        ["fisher", "0.50†", "0.30"],
        ["random", "2.00†", "not measured"],
    ]
    assert not table.notes and table.rows[1].cells[1].is_best
    other_seed = [
        measured(3, "Heapr", 0.5, 0.3, kl=0.2, seed=1),
        measured(4, "Random", 1.0, 0.3, kl=0.1, seed=1),
    ]
    table = table_of([*jobs, *other_seed], KL)
    assert texts(table)[2] == ["random", "0.50"] and table.rows[2].cells[0].notes == (1,)
    assert table.notes == ("Not measured in job 2.",)
    table = table_of([jobs[2], measured(0, "Heapr", 0.5, 0.3), measured(1, "Fisher", 0.25, 0.3, kl=0.06)], KL)
    assert [text[1] for text in texts(table)] == ["not measured", "not measured", GAP]
    assert table.notes == ("Not measured with method heapr: WikiText-2 KL to unpruned.",)


def test_an_accuracy_is_tested_by_the_errors_of_both_models() -> None:
    """0.75 with an error of 0.01 each: three errors of the difference are 0.042."""
    for number, marked in ((0.72, True), (0.70, False)):
        pruned = {ACCURACY: number, "accuracy_stderr/piqa": 0.01}
        jobs = [job(0, pruned, settings()), job(1, {ACCURACY: 0.7}, settings(criterion="Fisher"))]
        shared, _ = with_shares(entry(metrics=[ACCURACY]), jobs)
        assert is_doubtful(shared[1:], f"relative/{ACCURACY}") is marked


def test_a_figure_shows_doubtful_points_hollow() -> None:
    jobs = [measured(0, "Heapr", 0.5, 0.1, ratio=0.25), measured(1, "Fisher", 0.3, 0.1, ratio=0.25)]
    jobs += [measured(2, "Heapr", 0.2, 0.1), measured(3, "Fisher", 0.3, 0.1)]
    (drawing,) = relative_curve(entry("relative_curve"), jobs, [])
    (axis,) = drawing.figure.axes
    hollow = [
        line for line in axis.get_lines() if line.get_markerfacecolor() == "white" and len(line.get_xdata())
    ]
    assert [list(line.get_xdata()) for line in hollow] == [[50.0]] and list(
        hollow[0].get_ydata()
    ) == pytest.approx([1.5])
    assert HOLLOW in [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert drawing.missing == MEANING.replace("†", "Hollow")
    (drawing,) = relative_curve(entry("relative_curve"), jobs[:2], [])
    assert (
        HOLLOW not in [text.get_text() for text in drawing.figure.legends[0].get_texts()]
        and drawing.missing == ""
    )


def test_every_form_explains_the_mark(tmp_path: Path) -> None:
    jobs = [measured(0, "Heapr", 0.2, 0.1, kl=0.2), measured(1, "Fisher", 0.1, 0.1, kl=0.1)]
    section = [
        {"kind": kind, "metrics": [PERPLEXITY, KL], "baseline": BASELINE}
        for kind in ("relative_table", "relative_curve")
    ]
    files = {
        path.name: path.read_text()
        for path in write_report(jobs, section, tmp_path, None)
        if path.suffix != ".png"
    }  # type: ignore[arg-type]
    assert "| fisher | 0.50† | **0.50** |" in files["table.md"] and MEANING in files["table.md"]
    assert r"fisher & 0.50$^{\dagger}$ & \textbf{0.50}" in files["table.tex"]
    assert MEANING.replace("†", r"$^{\dagger}$") in files["table.tex"]
    assert "0.50†</td>" in files["report.html"] and MEANING.replace("'", "&#x27;") in files["report.html"]
    assert MEANING.replace("†", "Hollow").replace("'", "&#x27;") in files["report.html"], "below the figure"
    (_, row) = csv.DictReader(files["table.csv"].splitlines())
    beside = "comparison/relative to method heapr/baseline_increase"
    assert (
        float(row[f"{beside}/{PERPLEXITY}"]) == pytest.approx(0.2)
        and float(row[f"{beside}_standard_error/{PERPLEXITY}"]) == 0.1
    )
