"""A whole report: its files, its figures' data, its page, and what it refuses."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from heapr.errors import ConfigError
from heapr.report.sweep.bars import bars
from heapr.report.sweep.consistency import consistency
from heapr.report.sweep.curves import calibration_curve, ratio_curve
from heapr.report.sweep.facts import facts
from heapr.report.sweep.layers import layer_heatmap
from heapr.report.sweep.page import inline_svg, without_local_links
from heapr.report.sweep.published_results import read_published
from heapr.report.sweep.ratio_points import ratio_points
from heapr.report.sweep.report import check_protocols, write_report
from heapr.report.sweep.report_layout import Entry, read_layout
from heapr.report.sweep.results import JobResult
from heapr.report.sweep.style import MARKERS, legend_above, look, name_scales, panels, style
from tests.report.sweep.sweeps import config, failed, job, write_details, write_published

PERPLEXITY, ACCURACY = "perplexity/wikitext2", "accuracy/piqa"


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with style():
        yield


def ratios() -> list[JobResult]:
    jobs = []
    for criterion, factor in (("Heapr", 4.0), ("Random", 8.0)):
        for ratio in (0.4, 0.2):
            jobs.append(
                job(
                    len(jobs),
                    {PERPLEXITY: 7.5 + factor * ratio, ACCURACY: 0.75 - ratio / 4},
                    config(ratio, criterion),
                )
            )
    return jobs


def curve_data(axis: Any) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of what has a label: lines, and the data line of error bars."""
    found = {}
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle
        found[label] = ([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()])
    return found


def test_ratio_curve_draws_ours_the_published_the_unpruned_and_flops_on_a_panel_of_their_own(
    tmp_path: Path,
) -> None:
    published = read_published(
        write_published(
            tmp_path,
            "Mix1.5-A2B,0.4,HEAPr-G,wikitext2_ppl,9.3,x",
            "Mix1.5-A2B,0.2,HEAPr-G,wikitext2_ppl,8.4,x",
        )
    )
    (drawing,) = ratio_curve(Entry(kind="ratio_curve", title="", metrics=(PERPLEXITY,)), ratios(), published)
    quality, flops, routed = drawing.figure.axes
    assert (quality.get_ylabel(), flops.get_ylabel()) == ("WikiText-2 perplexity", "FLOPs saved (%)")
    assert routed.get_ylabel() == "experts' FLOPs saved (%)"
    assert {axis.get_xlabel() for axis in (quality, flops, routed)} == {"atomic experts removed (%)"}
    data = curve_data(quality)
    assert data["heapr"] == (pytest.approx([0, 20, 40]), pytest.approx([7.5, 8.3, 9.1]))
    assert data["random"][1] == pytest.approx([7.5, 9.1, 10.7])
    assert data["heapr, published"] == ([20.0, 40.0], [8.4, 9.3])
    assert data["unpruned"][1] == [7.5, 7.5]
    assert curve_data(flops)["random"] == (pytest.approx([0, 20, 40]), pytest.approx([0, 10, 20]))
    assert curve_data(routed)["random"][1] == pytest.approx([0, 16, 32])
    (legend,) = drawing.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "heapr",
        "random",
        "heapr, published",
        "unpruned",
    ]


def test_a_line_has_one_point_for_every_ratio_and_a_bar_its_own_place() -> None:
    values = {("Heapr", "global"): 8.0, ("Camera", "global"): 9.0, ("Camera", "layer"): 10.0}
    jobs = [
        job(n, {PERPLEXITY: value}, config(0.25, *what)) for n, (what, value) in enumerate(values.items())
    ]
    (drawing,) = ratio_curve(
        Entry(kind="ratio_curve", title="", metrics=(PERPLEXITY,), series=("criterion",)), jobs, []
    )
    lines = {label: ys for label, (_, ys) in curve_data(drawing.figure.axes[0]).items()}
    assert lines == {
        "heapr global": [7.5, 8.0],
        "camera global": [7.5, 9.0],
        "camera layer": [7.5, 10.0],
        "unpruned": [7.5, 7.5],
    }
    (drawing,) = bars(
        Entry(kind="bars", title="", metrics=(PERPLEXITY,), x="criterion", series=("ratio",)), jobs, []
    )
    (axis,) = drawing.figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "heapr global",
        "camera global",
        "camera layer",
    ]
    assert [bar.get_width() for bar in axis.patches] == [8.0, 9.0, 10.0]


def test_models_get_figures_of_their_own() -> None:
    other = job(4, {PERPLEXITY: 9.0}, {**config(), "model": {"name": "tiny", "path": "builtin:x"}})
    drawings = ratio_curve(Entry(kind="ratio_curve", title="", metrics=(PERPLEXITY,)), [*ratios(), other], [])
    assert [drawing.about for drawing in drawings] == ["Mix-1.5-A2B", "tiny"]


def test_calibration_curve_has_means_and_deviations() -> None:
    values = {(8, 0): 9.0, (8, 1): 11.0, (32, 0): 8.0, (32, 1): 8.5}
    jobs = [
        job(n, {PERPLEXITY: v}, config(num_samples=size, seed=seed))
        for n, ((size, seed), v) in enumerate(values.items())
    ]
    entry = Entry(
        kind="calibration_curve",
        title="",
        metrics=(PERPLEXITY,),
        x="num_samples",
        series=("corpus",),
        average_over="seed",
    )
    (drawing,) = calibration_curve(entry, jobs, [])
    (axis,) = drawing.figure.axes
    assert curve_data(axis)["wikitext2"] == ([8.0, 32.0], [10.0, 8.25])
    (container,) = axis.containers
    (errors,) = container[2]
    assert [segment[:, 1].tolist() for segment in errors.get_segments()] == [
        pytest.approx([10 - 2**0.5, 10 + 2**0.5]),
        pytest.approx([8.25 - 0.125**0.5, 8.25 + 0.125**0.5]),
    ]
    assert (axis.get_xlabel(), axis.get_xscale()) == ("calibration sequences", "log")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["8", "32"]


def test_bars_are_as_long_as_the_numbers_beside_them() -> None:
    (drawing,) = bars(
        Entry(kind="bars", title="", metrics=(ACCURACY,), x="criterion", series=("ratio",)), ratios(), []
    )
    (axis,) = drawing.figure.axes
    assert [[bar.get_width() for bar in container.patches] for container in axis.containers] == [
        pytest.approx([65, 65]),
        pytest.approx([70, 70]),
    ]
    assert [container.get_label() for container in axis.containers] == ["40 % removed", "20 % removed"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["heapr", "random"]
    assert sorted(text.get_text() for text in axis.texts) == ["65.00", "65.00", "70.00", "70.00"]
    assert axis.get_xlabel() == "piqa accuracy (%)"


def test_heat_map_shows_experts_by_index_or_sorted_and_layers_beside_them(tmp_path: Path) -> None:
    layers = [
        {"layer": 3, "layer_kept_ratio": 0.5, "kept_ratio": [0.75, 0.25]},
        {"layer": 7, "layer_kept_ratio": 0.9, "kept_ratio": [1.0, 0.8]},
    ]
    jobs = [job(0, {}, stages=[write_details(tmp_path / "a", "routing", {"layers": layers})])]
    for order, first in (("index", [25.0, 75.0]), ("sorted", [75.0, 25.0])):
        (drawing,) = layer_heatmap(Entry(kind="layer_heatmap", title="", order=order), jobs, [])
        heat, beside = drawing.figure.axes[:2]
        assert heat.images[0].get_array().tolist()[0] == pytest.approx(first)
        assert [bar.get_width() for bar in beside.patches] == pytest.approx([50, 10])
        assert heat.get_ylabel() == "decoder layer" and [
            label.get_text() for label in heat.get_yticklabels()
        ] == ["3", "7"]


def test_consistency_draws_every_score_once_with_identity_line_and_correlations(tmp_path: Path) -> None:
    groups = [
        {"score_sum": 1.0, "predicted_increase": 10.0**-power, "measured_increase": 3 * 10.0**-power}
        for power in (4, 3, 2)
    ]
    groups.append({"score_sum": 1.0, "predicted_increase": 1e-5, "measured_increase": -1e-6})
    truth = write_details(tmp_path / "t", "truth", {"groups": groups})
    jobs = [job(number, {}, config(ratio), stages=[truth]) for number, ratio in enumerate((0.2, 0.4))]
    for each in jobs:
        each.metrics["comparison"].update({"truth/spearman": -0.125, "truth/pearson": 0.987})
    (drawing,) = consistency(Entry(kind="consistency", title="", series=("criterion",)), jobs, [])
    (axis,) = drawing.figure.axes
    data = curve_data(axis)
    assert data["heapr: Spearman −0.12, Pearson 0.99"] == (
        [1e-4, 1e-3, 1e-2],
        pytest.approx([3e-4, 3e-3, 3e-2]),
    )
    assert data["not above zero, at the edge"] == ([1e-5], pytest.approx([1.5e-4]))
    assert data["predicted = measured"][0] == data["predicted = measured"][1]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log") and axis.get_xlim() == axis.get_ylim()
    assert axis.get_xlabel() == "predicted increase of the loss (nats)"


def test_models_and_jobs_of_several_figures_are_named_in_them(tmp_path: Path) -> None:
    other = job(4, {PERPLEXITY: 9.0}, {**config(), "model": {"name": "tiny", "path": "builtin:x"}})
    drawings = ratio_curve(Entry(kind="ratio_curve", title="", metrics=(PERPLEXITY,)), [*ratios(), other], [])
    assert [drawing.figure.legends[0].get_title().get_text() for drawing in drawings] == [
        "Mix-1.5-A2B",
        "tiny",
    ]
    routing = write_details(
        tmp_path / "a", "routing", {"layers": [{"layer": 0, "layer_kept_ratio": 0.5, "kept_ratio": [0.5]}]}
    )
    jobs = [job(number, {}, config(ratio), stages=[routing]) for number, ratio in enumerate((0.2, 0.4))]
    drawings = layer_heatmap(Entry(kind="layer_heatmap", title=""), jobs, [])
    assert [drawing.figure.get_suptitle() for drawing in drawings] == ["20 % removed", "40 % removed"]


@pytest.mark.parametrize(
    ("label", "columns"),
    [("20 %", 4), ("60 % of the FLOPs left", 3), ("heapr: Spearman 0.88, Pearson 0.97", 2)],
)
def test_a_legend_has_as_many_columns_as_fit_and_is_no_wider_than_the_figure(
    label: str, columns: int
) -> None:
    figure, (axis,) = panels(1, height=1.5)
    for number in range(4):
        axis.plot([0, 1], [0, number], label=f"{label}{number}")
    legend_above(figure, [axis])
    figure.canvas.draw()
    (legend,) = figure.legends
    assert legend._ncols == columns
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_figures_keep_to_the_pages_width_and_to_readable_letters() -> None:
    (drawing,) = ratio_curve(Entry(kind="ratio_curve", title="", metrics=(PERPLEXITY,)), ratios(), [])
    drawing.figure.canvas.draw()
    from matplotlib.text import Text

    assert drawing.figure.get_figwidth() == 6.6
    assert min(text.get_fontsize() for text in drawing.figure.findobj(Text) if text.get_text()) >= 7


def test_an_empty_layout_gives_a_table_of_everything_and_the_ratio_curve(tmp_path: Path) -> None:
    jobs = [*ratios(), failed(4, "score=heapr", "pruning.ratio=0.6", error="ran out <of> memory")]
    files = write_report(jobs, {}, tmp_path / "report", None)
    names = ["table.md", "table.csv", "table.tex", "ratio_curve.svg", "ratio_curve.png", "report.html"]
    assert [path.name for path in files] == names and all(path.stat().st_size for path in files)
    markdown = files[0].read_text()
    assert markdown.count("\n| ") == 2 + 1 + 5 - 1 + 1  # header, rule, unpruned, five jobs
    assert "Job 4 failed (score=heapr pruning.ratio=0.6): ran out" in markdown
    with Image.open(files[4]) as image:
        assert image.size[0] >= 1300
    svg = files[3].read_text()
    assert "<text" in svg and "atomic experts removed (%)" in svg and "<metadata" not in svg
    assert files[4].stat().st_size < 150_000 and files[3].stat().st_size < 150_000


def test_tables_that_stand_alone_have_the_reports_title(tmp_path: Path) -> None:
    entries = [
        {"kind": "table", "metrics": [PERPLEXITY]},
        {"kind": "table", "title": "Accuracy", "metrics": [ACCURACY]},
    ]
    markdown, _, tex, page = write_report(
        ratios(), {"title": "Two criteria", "entries": entries}, tmp_path, None
    )
    assert [line for line in markdown.read_text().splitlines() if line.startswith("#")] == [
        "### Two criteria",
        "### Accuracy",
    ]
    assert r"\caption{Two criteria}" in tex.read_text() and r"\caption{Accuracy}" in tex.read_text()
    assert page.read_text().count("Two criteria") == 2  # title and heading


def test_reports_are_the_same_every_time(tmp_path: Path) -> None:
    first, second = (write_report(ratios(), {}, tmp_path / name, None) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_page_needs_nothing_else_and_tells_everything(tmp_path: Path) -> None:
    jobs = [*ratios(), failed(4, "score=heapr", error="x < y")]
    jobs[0] = replace(jobs[0], folder=tmp_path / "0")
    entries = [
        {"kind": "table", "rows": ["ratio", "criterion"], "metrics": [PERPLEXITY]},
        {"kind": "ratio_curve", "metrics": [PERPLEXITY]},
        {"kind": "layer_heatmap"},
    ]
    layout = {"title": "A & B", "command": "python sweep.py", "date": "2026-11-22", "entries": entries}
    page = write_report(jobs, layout, tmp_path, None)[-1].read_text()
    assert not re.search(r"https?:|<script|<link|@import|src=", page)
    assert "<title>A &amp; B</title>" in page and "python sweep.py" in page and "2026-11-22" in page
    assert "4 of 5 jobs finished, 1 failed" in page and "Job 4 failed (score=heapr): x &lt; y" in page
    assert "Nothing to draw: no job has its numbers." in page
    assert "<th>job</th><th>criterion</th><th>removed (asked)</th>" in page
    assert '<summary><a class=local href="0">Job 0</a>: heapr 40 % removed</summary>' in page
    assert "Job 1: heapr 20 % removed" in page
    assert "<dt>calibrated on</dt><dd>128 sequences of 2,048 tokens of wikitext2, seed 0</dd>" in page
    assert "<figcaption>Lines start at the unpruned model (0 %)" in page
    assert page.count("<a class=local ") == 1 and '<a class=local href="0">Job 0</a>' in page
    alone = without_local_links(page)
    assert "class=local" not in alone and "<summary>Job 0: " in alone and 'href="ratio_curve.svg"' in alone
    figure = page[page.index("<svg") : page.index("</svg>") + 6]
    ET.fromstring(figure.replace("<svg", '<svg xmlns:xlink="x"', 1))
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag != "meta":
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Checker().feed(page)
    assert opened == []


def test_mixed_protocols_are_refused_with_the_difference(tmp_path: Path) -> None:
    jobs = ratios()
    other = copy.deepcopy(jobs[1].summary)
    assert other is not None
    other["protocols"]["pruned"]["wikitext2"]["window"] = 512
    with pytest.raises(
        ConfigError,
        match=(
            r"wikitext2 was measured with different window: 2048 \(job 0 dense and 6 more\), 512 \(job 1"
            r" pruned\)"
        ),
    ):
        write_report([jobs[0], JobResult(1, (), None, other, None), *jobs[2:]], {}, tmp_path, None)


def test_models_may_differ_in_what_their_tokenizers_decide() -> None:
    other = copy.deepcopy(ratios()[0].summary)
    assert other is not None
    other["config"]["model"] = {"name": "tiny", "path": "builtin:x"}
    for records in other["protocols"].values():
        records["wikitext2"] |= {"num_tokens": 7, "tokens_sha256": "cd"}
    check_protocols([*ratios(), JobResult(9, (), None, other, None)])
    other["protocols"]["dense"]["wikitext2"]["joiner"] = " "
    with pytest.raises(ConfigError, match="different joiner"):
        check_protocols([*ratios(), JobResult(9, (), None, other, None)])


def test_a_sweep_of_failures_is_a_table_of_gaps_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    files = write_report([failed(0, "score=heapr"), failed(1, "score=random")], {}, tmp_path, None)
    assert [path.name for path in files] == ["table.md", "table.csv", "table.tex", "report.html"]
    assert "Job 0 failed" in files[0].read_text() and "Job 1 failed" in files[0].read_text()
    with pytest.raises(ConfigError, match="the sweep has no jobs"):
        write_report([], {}, tmp_path, None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "pie"}, "report.0.kind='pie' is unknown; choose one of table"),
        ({"kind": "table", "metric": []}, "report.0: unknown 'metric'; did you mean metrics"),
        (
            {"kind": "table", "rows": ["criterium"]},
            "report.0.rows: unknown 'criterium'; did you mean criterion",
        ),
        ({"kind": "bars"}, r"report.0 \(bars\) has no metrics"),
        ({"kind": "layer_heatmap", "order": "random"}, "report.0.order='random' is unknown"),
    ],
)
def test_mistakes_in_a_layout_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_layout([entry])


def test_weak_criteria_do_not_set_the_scale_and_are_named() -> None:
    """Increases 1, 2, 3, 4 and 40: the last is more than three times the median."""
    names = ("Heapr", "Fisher", "Taylor", "Camera", "Random")
    increases = dict(zip(names, (1.0, 2.0, 3.0, 4.0, 40.0), strict=True))
    jobs = []
    for name, increase in increases.items():
        for ratio in (0.25, 0.5):
            jobs.append(job(len(jobs), {PERPLEXITY: 7.5 + 2 * ratio * increase}, config(ratio, name)))
    (drawing,) = ratio_curve(Entry(kind="ratio_curve", title="", metrics=(PERPLEXITY,)), jobs, [])
    low, high = drawing.figure.axes[0].get_ylim()
    assert 11.5 < high < 12 and 7 < low < 7.5
    assert drawing.caption == "Beyond the top of WikiText-2 perplexity: random up to 47.50."
    few, *_ = ratio_curve(Entry(kind="ratio_curve", title="", metrics=(PERPLEXITY,)), jobs[4:], [])
    assert few.figure.axes[0].get_ylim()[1] > 40 and few.caption == ""


def test_twelve_lines_have_twelve_marks() -> None:
    assert len({look(number)["marker"] for number in range(12)}) == 12 <= len(MARKERS)


def test_logarithmic_axes_say_so() -> None:
    figure, (first, second) = panels(2, height=1.5)
    first.set(yscale="log", ylabel="perplexity", xlabel="ratio")
    second.set(xscale="symlog", ylabel="perplexity", xlabel="share")
    name_scales(figure)
    labels = [(axis.get_xlabel(), axis.get_ylabel()) for axis in (first, second)]
    assert labels == [("ratio", "perplexity\n(log scale)"), ("share\n(log scale above 1)", "perplexity")]


def test_a_figure_in_the_page_has_the_pages_colours(tmp_path: Path) -> None:
    far = job(4, {PERPLEXITY: 90.0}, config(0.6))
    files = write_report([*ratios(), far], [{"kind": "ratio_curve", "metrics": [PERPLEXITY]}], tmp_path, None)
    (svg,) = [path for path in files if path.suffix == ".svg"]
    inside = inline_svg(svg.read_text())
    assert "#ffffff" in svg.read_text() and not re.search("#ffffff|#000000|#e3e3e3", inside)
    assert (
        "(log scale)" in inside
        and "var(--paper)" in inside
        and "var(--ink)" in inside
        and "#0072b2" in inside
    )
    page = files[-1].read_text()
    assert page.index('href="ratio_curve.svg"') < page.index('href="ratio_curve.png"')
    assert (
        "figure svg text { fill: var(--ink); }" in page and "figure svg { display: block; width: 100%" in page
    )


def test_a_heat_map_says_its_ratio(tmp_path: Path) -> None:
    layers = [{"layer": 0, "layer_kept_ratio": 0.5, "kept_ratio": [0.75, 0.25]}]
    alone = job(0, {}, stages=[write_details(tmp_path / "a", "routing", {"layers": layers})])
    (drawing,) = layer_heatmap(Entry(kind="layer_heatmap", title=""), [alone], [])
    assert drawing.figure.get_suptitle() == drawing.about == "25 % removed"


def test_the_head_says_with_what_where_how_long_and_on_which_text(tmp_path: Path) -> None:
    """The calibration, of 90 seconds, is shared and counts once."""
    made = tmp_path / "calibrate"
    made.mkdir()
    (made / "manifest.json").write_text('{"seconds": 90.0, "peak_memory_bytes": 1}')
    stage = {"stage": "calibrate", "what": "", "key": "k", "path": str(made), "cached": True}
    machine = {"device": "cpu", "name": "Some CPU", "threads": 2}
    libraries = {"torch": "2.13.0", "transformers": "5.23.0"}
    environment = {
        "version": "0.1.0",
        "git_commit": "0123456789abcdef",
        "libraries": libraries,
        "machine": machine,
    }
    jobs = []
    for number, samples in enumerate((8, 32)):
        settings = config(num_samples=samples)
        about = environment | {"seconds": 20.0}
        jobs.append(job(number, {PERPLEXITY: 9.0}, settings, stages=[stage], environment=about))
    assert facts([*jobs, failed(2)]) == {
        "made with": "heapr 0.1.0 (commit 0123456789), torch 2.13.0, transformers 5.23.0",
        "on": "CPU Some CPU, 2 threads",
        "took": "40 s for 2 jobs; 1.5 min to make their 1 artifact, now or earlier",
        "models": "hf (Some/Mix-1.5-A2B, bfloat16)",
        "calibrated on": "8, 32 sequences of 2,048 tokens of wikitext2, seed 0",
    }


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(59, "59 s"), (60, "1.0 min"), (3599, "60.0 min"), (3600, "1.0 h"), (90_000, "25.0 h")],
)
def test_the_head_names_a_gpu_and_has_units_that_suit(seconds: int, shown: str) -> None:
    environment = {
        "version": "0.1.0",
        "git_commit": None,
        "libraries": {"torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"device": "cuda", "name": "Some GPU", "threads": 16},
        "seconds": seconds,
    }
    lines = facts([job(0, {PERPLEXITY: 9.0}, config(), environment=environment)])
    assert lines["made with"] == "heapr 0.1.0, torch 2.13.0, transformers 5.23.0"
    assert lines["on"] == "GPU Some GPU" and lines["took"] == f"{shown} for 1 job"


def test_points_of_curves_begin_at_the_unpruned_model_and_are_means_over_seeds() -> None:
    jobs = [*ratios(), job(4, {PERPLEXITY: 9.5}, config(0.2, seed=1))]
    points = ratio_points(jobs)
    assert list(points) == [0.0, 0.2, 0.4]
    assert points[0.0][f"{PERPLEXITY}/heapr"] == 7.5
    assert points[0.2][f"{PERPLEXITY}/heapr"] == pytest.approx((8.3 + 9.5) / 2)
    assert points[0.4][f"{ACCURACY}/random"] == pytest.approx(0.65)
    assert ratio_points(jobs[:1]) == {}
