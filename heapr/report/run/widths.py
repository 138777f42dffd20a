"""A run's figure: how much was removed of every layer and expert.

In: layers, as `heapr.evaluation.routing.layer_routing` returns them. Out: a PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heapr.report.sweep.layers import layer_figure
from heapr.report.sweep.results import removals
from heapr.report.sweep.style import style, write_figure


def draw_widths(layers: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path:
    """Draw the layers into a PNG (and an SVG beside it), and return the PNG.

    Args:
        layers: one for each MoE layer.
        title: of the figure.
        path: of the PNG.
    """
    with style():
        figure = layer_figure(removals(layers), title)
        _, png = write_figure(figure, path)
    return png
