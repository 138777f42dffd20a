"""Where a sweep's jobs removed atomic experts: a heat map over layers and experts, and bars over layers.

In: an entry of the layout and its jobs, whose artifacts are read. Out: drawings.
Shape letters: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from heapr.report.sweep.curves import Drawing
from heapr.report.sweep.factors import NAMES, RATIO, describe, varying
from heapr.report.sweep.published_results import Numbers
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import Jobs, LayerRemoval, finished, removed_by_layer
from heapr.report.sweep.style import COLOURS, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_HEIGHT, MOST_HEIGHT = 1.7, 5.5  # inches
MOST_LABELS = 12  # of layers


def layer_heatmap(entry: Entry, jobs: Jobs, published: Numbers) -> list[Drawing]:
    """Draw a figure per job: the share removed of every expert, and beside it of every layer."""
    done = finished(jobs)
    shown = varying(done, NAMES)
    if RATIO not in shown:
        shown.append(RATIO)
    drawings = []
    for job in done:
        layers = removed_by_layer(job)
        if layers is not None:
            about = describe(job, shown)
            figure = layer_figure(layers, about, is_sorted=entry.order == "sorted")
            drawings.append(Drawing(figure, about))
    return drawings


def layer_figure(layers: Sequence[LayerRemoval], title: str, *, is_sorted: bool = False) -> Figure:
    """Draw the share removed of every expert, and beside it of every layer.

    Args:
        layers: in order.
        title: above the figure; may be empty.
        is_sorted: whether a layer's experts stand in order of what they lost, or by index.
    """
    from matplotlib.figure import Figure

    height = 0.09 * len(layers) + 1.0
    within_limits = min(max(height, LEAST_HEIGHT), MOST_HEIGHT)
    figure = Figure(figsize=(WIDTH, within_limits), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=8)
    heat, bars = figure.subplots(1, 2, width_ratios=[2.3, 1], sharey=True)
    _heat_map(figure, heat, layers, is_sorted=is_sorted)
    _bars_of_layers(bars, layers)
    return figure


def _bars_of_layers(axis: Axes, layers: Sequence[LayerRemoval]) -> None:
    shares_L = [100 * layer.share for layer in layers]
    places = range(len(layers))
    axis.barh(places, shares_L, height=0.7, color=COLOURS[0])
    axis.set_xlim(left=0)
    axis.set_xlabel("of the layer (%)")
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)


def _heat_map(figure: Figure, axis: Axes, layers: Sequence[LayerRemoval], *, is_sorted: bool) -> None:
    """Draw a row for each layer and a column for each expert, with the colours' scale above."""
    shares_LE = _shares(layers, is_sorted=is_sorted)
    image = axis.imshow(shares_LE, cmap="Blues", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    places = range(len(layers))
    labels = [str(layer.layer) for layer in layers]
    # Every step-th layer has a label.
    step = math.ceil(len(layers) / MOST_LABELS) or 1
    axis.set_yticks(places[::step], labels[::step])
    axis.set_ylabel("decoder layer")
    axis.set_xlabel("experts, most removed first" if is_sorted else "expert")
    axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axis, location="top", shrink=0.95, aspect=30, pad=0.03)
    bar.set_label("atomic experts removed (%)")
    bar.outline.set_visible(False)


def _shares(layers: Sequence[LayerRemoval], *, is_sorted: bool) -> list[list[float]]:
    """Return percentages removed (L, E); NaN where a layer has fewer experts than others."""
    widest = max(len(layer.share_E) for layer in layers)
    shares_LE = []
    for layer in layers:
        shares_E = [100 * share for share in layer.share_E]
        if is_sorted:
            shares_E.sort(reverse=True)
        missing = [math.nan] * (widest - len(shares_E))
        shares_LE.append(shares_E + missing)
    return shares_LE
