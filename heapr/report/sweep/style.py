"""How figures look and are written: as wide as a page's text, colour-blind safe, with stable bytes.

In: a drawn figure. Out: a PNG and an SVG. matplotlib is imported where it is needed: it takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 6.6  # inches: a page's text
MOST_COLUMNS = 3  # panels side by side
# Inches: a row of the legend, the space around a label, one of its letters.
LEGEND_ROW, LEGEND_HANDLE, LEGEND_LETTER = 0.15, 0.39, 0.058
DPI = 200  # a figure is 1320 pixels wide
UNPRUNED, PUBLISHED = "unpruned", ", published"
HOLLOW = "hollow: baseline's increase < 3 std. errors"  # such a share means nothing
# Okabe and Ito's palette without yellow, which is hard to see on white, and black, which marks the unpruned
# model.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h", "d", "8")
LINES = ("-", "--", "-.", ":")
DENSE_LINE: dict[str, Any] = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 0.9}
SETTINGS: dict[str, Any] = {
    "backend": "agg",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.handlelength": 2.0,
    "legend.columnspacing": 1.2,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "heapr",  # names inside an SVG do not change from run to run
}
SCALES = {"log": "log scale", "symlog": "log scale above 1"}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@contextmanager
def style() -> Iterator[None]:
    """Apply our matplotlib settings to everything that is drawn or written inside."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)  # type: ignore[arg-type]
        yield


def panels(number: int, *, height: float, most: int = MOST_COLUMNS) -> tuple[Figure, list[Axes]]:
    """Return a figure with its panels in rows of equal length; pyplot does not know of it.

    Args:
        number: of panels.
        height: of a row, in inches.
        most: panels side by side; four stand two by two.
    """
    from matplotlib.figure import Figure

    rows = math.ceil(number / most)
    columns = math.ceil(number / rows)
    figure = Figure(figsize=(WIDTH, height * rows + 0.2), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[number:]:
        empty.remove()
    return figure, axes[:number]


def name_scales(figure: Figure) -> None:
    """Add to the label of every logarithmic axis that it is one."""
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            words = SCALES.get(axis.get_scale())
            label = axis.get_label().get_text()
            if words and label:
                axis.set_label_text(f"{label}\n({words})")


def look(number: int) -> dict[str, Any]:
    """Return the colour, marker and line of the series with this number.

    From the eighth series on, colours repeat with another line and marker.
    """
    turn = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[turn % len(LINES)],
    }


def legend_above(figure: Figure, axes: Sequence[Axes], title: str = "") -> None:
    """Draw one legend above all panels, with every label once; its title serves as the figure's title."""
    found: dict[str, Any] = {}
    for panel in axes:
        handles, labels = panel.get_legend_handles_labels()
        for label, handle in zip(labels, handles, strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    ordered = sorted(found, key=_place_in_legend)
    handles = [found[label] for label in ordered]
    columns = _legend_columns(ordered)
    rows = math.ceil(len(ordered) / columns)
    if title:
        rows += 1
    # The panels keep their height.
    height = figure.get_figheight()
    figure.set_figheight(height + LEGEND_ROW * rows)
    figure.legend(handles, ordered, loc="outside upper center", ncols=columns, title=title or None)


def _place_in_legend(label: str) -> int:
    """Return a key for sorting: our lines, published points, the unpruned model, what a hollow mark means."""
    if label == HOLLOW:
        return 3
    if label == UNPRUNED:
        return 2
    return 1 if label.endswith(PUBLISHED) else 0


def _legend_columns(labels: Sequence[str]) -> int:
    """Return the most columns that fit into a figure's width; at least one."""
    columns = len(labels)
    while columns > 1 and _legend_width(labels, columns) > WIDTH:
        columns -= 1
    return columns


def _legend_width(labels: Sequence[str], columns: int) -> float:
    """Return a legend's width in inches; matplotlib fills it by columns, the first of which are longer."""
    rows, num_longer = divmod(len(labels), columns)
    width = 0.0
    start = 0
    for number in range(columns):
        end = start + rows
        if number < num_longer:
            end += 1
        num_letters = max(map(len, labels[start:end]), default=0)
        width += LEGEND_HANDLE + LEGEND_LETTER * num_letters
        start = end
    return width


def write_figure(figure: Figure, path: Path) -> list[Path]:
    """Write the figure to `<path>.svg` and `<path>.png`, and return both paths."""
    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    figure.savefig(svg, metadata=NO_METADATA)
    figure.savefig(png, dpi=DPI, metadata={"Software": None})
    return [svg, png]
