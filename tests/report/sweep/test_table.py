"""Tables by hand: the best, gaps, differences, averages; and their texts in three languages."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from heapr.errors import ConfigError
from heapr.report.sweep import metrics
from heapr.report.sweep.published_results import read_published
from heapr.report.sweep.render import escape_tex, to_csv, to_html, to_markdown, to_tex
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult
from heapr.report.sweep.table import build_table
from heapr.report.sweep.table_parts import GAP, Table
from tests.report.sweep.sweeps import config, failed, job, write_published

PERPLEXITY, ACCURACY = "perplexity/wikitext2", "accuracy/piqa"
ENTRY = Entry(
    kind="table", title="Results", rows=("model", "ratio", "criterion"), metrics=(PERPLEXITY, ACCURACY)
)


def criteria(ratio: float = 0.25) -> list[JobResult]:
    return [
        job(0, {PERPLEXITY: 8.1234, ACCURACY: 0.70, "accuracy_stderr/piqa": 0.0107}, config(ratio)),
        job(1, {PERPLEXITY: 9.5, ACCURACY: 0.72}, config(ratio, "Random")),
        job(2, {PERPLEXITY: 8.1236, ACCURACY: 0.60}, config(ratio, "Fisher")),
    ]


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in (*row.labels, *row.cells)] for row in table.rows]


def best(table: Table) -> list[list[bool]]:
    return [[cell.is_best for cell in row.cells] for row in table.rows]


def test_the_unpruned_model_comes_first_and_the_best_are_those_that_print_the_best_value() -> None:
    table = build_table(ENTRY, criteria(), [])
    no_break = "\N{NO-BREAK SPACE}"
    assert table.columns == (
        "criterion",
        f"WikiText-2 perplexity{no_break}↓",
        f"piqa accuracy (%){no_break}↑",
    )
    assert texts(table) == [
        ["unpruned", "7.50", "75.00 (1.00)"],
        ["heapr", "8.12", "70.00 (1.07)"],
        ["random", "9.50", "72.00"],
        ["fisher", "8.12", "60.00"],
    ]
    assert best(table) == [[False, False], [True, False], [False, True], [True, False]]
    assert table.caption.startswith(
        "In all rows: model Mix-1.5-A2B, removed (asked) 25 %. In parentheses: standard error."
    )


def test_the_best_is_sought_among_the_same_ratio_and_nothing_alone_is_best() -> None:
    jobs = [
        job(0, {PERPLEXITY: 8.0}, config(0.5)),
        job(1, {PERPLEXITY: 9.0}, config(0.5, "Random")),
        job(2, {PERPLEXITY: 7.6}, config(0.25)),
    ]
    table = build_table(
        Entry(kind="table", title="", rows=("ratio", "criterion"), metrics=(PERPLEXITY,)), jobs, []
    )
    assert [row[0] for row in texts(table)] == ["unpruned", "25 %", "50 %", "50 %"]
    assert best(table) == [[False], [False], [True], [False]]
    assert [row.starts_group for row in table.rows] == [True, True, True, False]


def test_rules_stand_between_groups_not_between_single_rows_and_an_unpruned_row_says_something() -> None:
    jobs = [
        job(number, {"truth/spearman": 0.5}, config(ratio)) for number, ratio in enumerate((0.2, 0.4, 0.6))
    ]
    table = build_table(Entry(kind="table", title="", rows=("ratio",), metrics=(PERPLEXITY,)), jobs, [])
    assert [row.starts_group for row in table.rows] == [True, True, False, False]
    table = build_table(
        Entry(kind="table", title="", rows=("ratio",), metrics=("truth/spearman", "accuracy/none")), jobs, []
    )
    assert [row[0] for row in texts(table)] == ["20 %", "40 %", "60 %"]


def test_failed_jobs_are_gaps_that_say_why() -> None:
    jobs = [
        *criteria()[:1],
        failed(
            1,
            "score=random",
            "pruning.ratio=0.25",
            "model.path=Some/Mix-1.5-A2B",
            error="OutOfMemoryError: 3 GiB\nmore",
        ),
    ]
    table = build_table(ENTRY, jobs, [])
    assert texts(table)[2] == ["random", GAP, GAP]
    assert table.rows[2].cells[0].notes == table.rows[2].labels[0].notes == (1,)
    assert table.notes == (
        "Job 1 failed (score=random pruning.ratio=0.25 model.path=Some/Mix-1.5-A2B): OutOfMemoryError: 3 GiB",
    )
    assert not any(flag for row in best(table) for flag in row)


def test_a_metric_that_a_finished_job_did_not_measure_is_a_gap_without_a_note() -> None:
    table = build_table(
        ENTRY,
        [job(0, {PERPLEXITY: 8.0}), job(1, {PERPLEXITY: 9.0, ACCURACY: 0.7}, config(criterion="Random"))],
        [],
    )
    assert texts(table)[1] == ["heapr", "8.00", GAP] and table.rows[1].cells[1].notes == ()


def test_seeds_are_averaged_and_a_missing_one_is_named() -> None:
    entry = Entry(
        kind="table", title="", rows=("ratio", "num_samples"), metrics=(PERPLEXITY,), average_over="seed"
    )
    jobs = [
        job(n, {PERPLEXITY: value}, config(seed=n, num_samples=8)) for n, value in enumerate((8.0, 9.0, 10.0))
    ]
    lost = failed(
        4,
        "calibration.num_samples=32",
        "calibration.seed=1",
        "pruning.ratio=0.25",
        "model.path=Some/Mix-1.5-A2B",
    )
    table = build_table(entry, [*jobs, job(3, {PERPLEXITY: 7.0}, config(seed=0, num_samples=32)), lost], [])
    assert texts(table) == [["unpruned", "7.50"], ["8", "9.00 ± 1.00"], ["32", "7.00"]]
    assert table.rows[2].cells[0].notes == (1,) and table.notes[0].startswith("Job 4 failed")
    assert "Mean ± sample standard deviation over seed." in table.caption


def test_what_differs_in_more_than_the_seed_is_not_averaged() -> None:
    entry = Entry(kind="table", title="", rows=("ratio",), metrics=(PERPLEXITY,), average_over="seed")
    with pytest.raises(
        ConfigError, match=r"jobs 0, 1 would be averaged over seed, but differ in calibration.num_samples"
    ):
        build_table(entry, [job(0, {}, config(seed=0)), job(1, {}, config(seed=1, num_samples=8))], [])


def test_rows_that_nothing_tells_apart_get_their_jobs_numbers() -> None:
    table = build_table(
        ENTRY, [job(0, {PERPLEXITY: 8.0}), job(5, {PERPLEXITY: 9.0}, config(num_samples=8))], []
    )
    assert table.columns[0] == "job" and [row.labels[0].text for row in table.rows] == ["", "0", "5"]


def test_published_numbers_stand_beside_ours_with_source_and_difference(tmp_path: Path) -> None:
    folder = write_published(
        tmp_path,
        'Mix1.5-A2B,0.25,HEAPr-G,wikitext2_ppl,8.5,"HEAPr README, 2025-10-13"',
        'Mix1.5-A2B,0.25,HEAPr-G,wikitext2_ppl,8.0,"HEAPr README, 2026-02-20"',
        'Mix1.5-A2B,0.25,HEAPr-G,piqa_acc,71.5,"HEAPr README, 2026-02-20"',
        "Mix1.5-A2B,0.25,HEAPr-G,avg7_acc,71.5,elsewhere",
        "Mix1.5-A2B,0.5,HEAPr-G,piqa_acc,1.0,elsewhere",
        "Other-A2B,0.25,HEAPr-G,piqa_acc,2.0,elsewhere",
        "Mix1.5-A2B,0.25,HEAPr-L,piqa_acc,3.0,elsewhere",
        "Mix1.5-A2B,0.25,Unheard-of,piqa_acc,4.0,elsewhere",
        "Mix1.5-A2B,0.0,Original,wikitext2_ppl,7.51,D2-MoE (ICML 2025) Table 2",
    )
    entry = Entry(
        kind="table", title="", rows=("criterion",), metrics=(PERPLEXITY, ACCURACY, "accuracy/average")
    )
    jobs = [
        job(0, {PERPLEXITY: 8.12, ACCURACY: 0.70, "accuracy/average": 0.7}),
        job(1, {PERPLEXITY: 9.0}, config(criterion="Random")),
    ]
    table = build_table(entry, jobs, read_published(folder))
    assert texts(table) == [
        ["unpruned", "7.50", "75.00 (1.00)", GAP],
        ["published", "7.51", "", ""],
        ["difference", "−0.01", "", ""],
        ["heapr", "8.12", "70.00", "70.00"],
        ["published", "8.00", "71.50", ""],  # one task is not the average of seven
        ["difference", "+0.12", "−1.50", ""],
        ["random", "9.00", GAP, GAP],
    ]
    assert table.notes == (
        "Published in D2-MoE (ICML 2025) Table 2: 512 calibration sequences, accuracies as whole percents.",
        (
            "Published in HEAPr README, 2026-02-20: 128 calibration sequences of 2048 tokens, perplexity over"
            " windows of 2048."
        ),
    )
    assert table.caption.endswith(
        "Published numbers have protocols of their own; ours: wikitext2 in windows of 2048 tokens."
    )
    assert table.rows[4].labels[-1].notes == (2,) and table.rows[4].cells[0].notes == ()
    with pytest.raises(ConfigError, match=r"results.csv is missing"):
        read_published(tmp_path / "nothing")


def test_csv_holds_every_job_and_every_number_unrounded(tmp_path: Path) -> None:
    published = read_published(write_published(tmp_path, "Mix1.5-A2B,0.25,HEAPr-G,piqa_acc,71.5,elsewhere"))
    jobs = [*criteria(), failed(3, "score=random", error='said "no", twice')]
    rows = list(csv.DictReader(io.StringIO(to_csv(jobs, published))))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["status"] for row in rows] == ["finished", "finished", "finished", "failed"]
    assert (
        float(rows[0]["pruned/perplexity/wikitext2"]) == 8.1234
        and float(rows[0]["dense/perplexity/wikitext2"]) == 7.5
    )
    assert float(rows[0]["published/accuracy/piqa"]) == 0.715 and rows[1]["published/accuracy/piqa"] == ""
    assert (
        rows[3]["error"] == 'said "no", twice'
        and rows[3]["pruned/perplexity/wikitext2"] == ""
        and rows[3]["criterion"] == "random"
    )


def test_tex_is_escaped() -> None:
    assert (
        escape_tex(r"50 % of a_b & C:\x {y} #1 $2 ~ ^ é 漢")
        == r"50 \% of a\_b \& C:\textbackslash{}x \{y\} \#1 \$2 \textasciitilde{} \textasciicircum{} e ?"
    )
    assert escape_tex("[a]") == "{[}a{]}"
    assert escape_tex("8.0 ± 0.1 −3 ↓ —") == r"8.0 $\pm$ 0.1 $-$3 $\downarrow$ ---"


def test_tex_has_as_many_cells_as_columns_and_bold_and_marks() -> None:
    table = build_table(
        ENTRY,
        [
            *criteria(),
            failed(3, "score=my_score", "pruning.ratio=0.25", "model.path=a/Mix-1.5-A2B", error="a_b 100%"),
        ],
        [],
    )
    tex = to_tex(table)
    assert tex.isascii() and r"\textbf{8.12}" in tex and r"---$^{1}$" in tex and r"a\_b 100\%" in tex
    assert r"\begin{tabular}{lrr}" in tex and r"\begin{table}" in tex
    assert r"\begin{table*}" in to_tex(replace(table, columns=("a",) * 7))
    unescaped = tex.replace(r"\{", "").replace(r"\}", "")
    assert unescaped.count("{") == unescaped.count("}")
    body = tex[tex.index(r"\toprule") : tex.index(r"\bottomrule")].splitlines()
    assert all(line.count(" & ") == 2 for line in body if line.endswith(r"\\"))
    assert tex.count(r"\midrule") == 2


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_tex_compiles(tmp_path: Path) -> None:
    document = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n%s\\end{document}\n"
    (tmp_path / "table.tex").write_text(
        document % to_tex(build_table(ENTRY, [*criteria(), failed(3, "score=a_b")], []))
    )
    subprocess.run(["pdflatex", "-halt-on-error", "table.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_markdown_rows_are_as_long_as_their_header_and_special_letters_are_shown() -> None:
    jobs = [
        *criteria(),
        failed(3, "score=x", "pruning.ratio=0.25", "model.path=a/Mix-1.5-A2B", error="a|b *c* <d>"),
    ]
    markdown = to_markdown(build_table(ENTRY, jobs, []))
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5 and {row.count("|") for row in rows} == {4}
    assert "| **8.12** |" in markdown and f"{GAP}<sup>1</sup>" in markdown and r"a\|b \*c\* \<d\>" in markdown


def test_html_is_escaped_and_balanced() -> None:
    page = to_html(build_table(ENTRY, [*criteria(), failed(3, "score=<b>", error="x < y & z")], []))
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Checker().feed(page)
    assert opened == [] and "x &lt; y &amp; z" in page and "<b>8.12</b>" in page


def test_continuations_have_directions_only_where_one_is_better() -> None:
    """Length and variety are printed, and shown by default nowhere."""
    pruned = {
        "loop_rate_greedy/wikitext2": 0.125, "loop_rate_greedy_stderr/wikitext2": 0.0333, "distinct_ngrams_greedy/wikitext2": 0.5,
        "length_greedy/wikitext2": 63.94,
    }  # fmt: skip
    measured = job(0, pruned)
    measured.summary["metrics"]["comparison"]["greedy_agreement/wikitext2"] = 0.4
    shown = [name for name in metrics.known([measured]) if not name.startswith("size/")]
    assert shown == ["loop_rate_greedy/wikitext2", "greedy_agreement/wikitext2"]
    assert (
        metrics.column_label(shown[0])
        == "WikiText-2 greedy loop rate (%)\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}"
    )
    assert metrics.standard_error(measured, shown[0]) == 0.0333
    assert metrics.text("loop_rate_greedy/wikitext2", 0.125) == "12.5"
    assert metrics.column_label("length_greedy/wikitext2") == "WikiText-2 greedy length (tokens)"
    assert metrics.text("length_greedy/wikitext2", 63.94) == "63.9"
