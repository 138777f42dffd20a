"""The axes of a figure: their scales, ticks and numbers.

In: a panel, and the jobs that it shows. matplotlib is imported where it is needed: it takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from heapr.report.sweep.factors import UNKNOWN, factor, header, in_order, show
from heapr.report.sweep.results import Jobs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

# Of an axis with zero and large numbers.
LARGE_TICKS = [digit * 10.0**power for power in range(6) for digit in (2, 5, 10)]
TICKS = (0.0, 0.5, 1.0, *LARGE_TICKS)
# A logarithmic axis that shows less than this factor gets the ticks of a linear one.
NARROW_SPAN = 4
# A line whose increase is more than so many times the median of at least so many lines is cut off.
WEAK, LEAST_LINES = 3.0, 5
ROOM, LOG_ROOM = 0.06, 1.2  # of shares: above and below what is drawn, as a part of it and as a factor
MARGIN = 1.1  # times the increase of the highest line that is not cut off
# From the factor that an axis spans at most to the digits at its ticks; beyond, powers of ten.
TICK_DIGITS = (
    (10, (1.0, 2.0, 3.0, 5.0, 7.0)),
    (500, (1.0, 2.0, 5.0)),
)


def share_logarithmic(axes: Sequence[Axes], least_span: float) -> bool:
    """Make the vertical axes of all panels logarithmic if one spans enough and none reaches zero.

    Args:
        axes: the panels.
        least_span: a panel whose largest value is more than so many times its smallest needs the scale.

    Returns:
        Whether they are logarithmic now.
    """
    ends = [limits(axis) for axis in axes]
    if any(lowest <= 0 for lowest, _ in ends):
        return False
    spans = [highest / lowest for lowest, highest in ends]
    if max(spans, default=1.0) <= least_span:
        return False
    for axis, span in zip(axes, spans, strict=True):
        logarithmic(axis, span, which="y")
    return True


def one_scale(axes: Sequence[Axes], least_span: float) -> None:
    """Give the shares on all panels one scale and the same ends.

    The points set them; error bars may leave the panel, since those of a share that means nothing are huge.

    Args:
        axes: the panels, of one figure or several.
        least_span: from which span on the scale is logarithmic.
    """
    for axis in axes:
        axis.set_yscale("linear")
        axis.autoscale(axis="y")
    if not share_logarithmic(axes, least_span):
        scale_with_zero(axes, least_span)
    ends = [limits(axis) for axis in axes]
    lowest, highest = min(low for low, _ in ends), max(high for _, high in ends)
    is_linear = axes[0].get_yscale() == "linear"
    for axis in axes:
        if is_linear:
            room = ROOM * (highest - min(0.0, lowest))
            axis.set_ylim(min(0.0, lowest) - room, highest + room)
        elif axis.get_yscale() == "log":
            axis.set_ylim(lowest / LOG_ROOM, highest * LOG_ROOM)
            logarithmic(axis, highest / lowest, which="y")
        else:
            _signed_logarithmic(axis, lowest, highest)


def scale_with_zero(axes: Sequence[Axes], least_span: float) -> None:
    """Choose the scale of shares on axes that cannot be, or need not be, logarithmic throughout.

    Args:
        axes: the panels, which get one scale.
        least_span: a share above it needs a scale that is logarithmic above 1.
    """
    ends = [limits(axis) for axis in axes]
    is_wide = any(highest > least_span for _, highest in ends)
    if is_wide:
        for axis, (lowest, highest) in zip(axes, ends, strict=True):
            _signed_logarithmic(axis, lowest, highest)
        return
    for axis in axes:
        bottom, _ = axis.get_ylim()
        axis.set_ylim(bottom=min(0.0, bottom))


def _signed_logarithmic(axis: Axes, lowest: float, highest: float) -> None:
    """Make the axis linear up to 1 and logarithmic above, for shares at or below zero beside large ones.

    Such a share means no worse than the unpruned model.
    """
    from matplotlib.ticker import FuncFormatter

    axis.set_yscale("symlog", linthresh=1.0)
    axis.set_ylim(lowest - 0.1, 1.4 * highest)
    ticks = [tick for tick in TICKS if tick <= highest]
    axis.set_yticks(ticks)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def limits(axis: Axes) -> tuple[float, float]:
    """Return the smallest and the largest y of the lines that are drawn, without margins and error bars.

    Lines that leave the panel at its top (`cut_off_weak`) do not count beyond it.
    """
    import numpy as np

    ys: list[float] = []
    for line in axis.get_lines():
        is_end_of_error_bar = line.get_marker() in {"_", "|"}
        if not is_end_of_error_bar:
            ys += map(float, np.asarray(line.get_ydata()))
    top = math.inf if axis.get_autoscaley_on() else axis.get_ylim()[1]
    inside = [y for y in ys if y <= top]
    return min(inside, default=1.0), max(inside, default=1.0)


def cut_off_weak(axis: Axes, increases: Mapping[str, float], dense: float) -> list[str]:
    """Let lines leave the panel at its top that are much worse than most, so that the others can be read.

    Args:
        axis: the panel, of a metric that is better when lower.
        increases: the largest increase of each line over the dense model's, by label.
        dense: the dense model's metric.

    Returns:
        The labels of those lines.
    """
    ordered = sorted(increases.values())
    if len(ordered) < LEAST_LINES:
        return []
    most = WEAK * ordered[len(ordered) // 2]
    weak = [label for label, increase in increases.items() if increase > most]
    kept = [increase for increase in ordered if increase <= most]
    if not weak or max(kept) <= 0:
        return []
    axis.set_ylim(dense - (MARGIN - 1) * max(kept), dense + MARGIN * max(kept))
    return weak


def logarithmic(axis: Axes, span: float, which: str) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks.

    Args:
        axis: the panel.
        span: largest value divided by the smallest: decides how many ticks there are.
        which: "x" or "y".
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    scale = axis.yaxis if which == "y" else axis.xaxis
    lowest, highest = scale.get_view_interval()
    shown_span = max(span, highest / lowest)
    scale.set_major_locator(_round_ticks(span, shown_span))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    scale.set_minor_formatter(NullFormatter())


def _round_ticks(span: float, shown_span: float) -> Locator:
    """Return round numbers for a logarithmic axis, the fewer the more it spans.

    Args:
        span: largest value divided by the smallest.
        shown_span: the same with the axis' margins, if they add to it.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    if shown_span < NARROW_SPAN:
        # A range this narrow may contain none of the round numbers of a logarithmic axis.
        return MaxNLocator(4, steps=[1, 2.5, 5, 10])
    for most, digits in TICK_DIGITS:
        if span < most:
            return LogLocator(subs=digits)
    return LogLocator(subs=(1.0,))


def ratio_axis(axis: Axes, jobs: Jobs, *, from_zero: bool = False) -> None:
    """Put ticks at ratios that were asked for, if there are at most 10, and at zero if it starts there."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    percentages = {100 * factor(job, "ratio") for job in jobs}
    if from_zero:
        percentages.add(0.0)
    ratios = sorted(percentages)
    if len(ratios) <= 10:
        axis.xaxis.set_major_locator(FixedLocator(ratios))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    if from_zero:
        axis.set_xlim(left=-0.02 * ratios[-1])
    axis.set_xlabel("atomic experts removed (%)")


def places_of(jobs: Jobs, x: str) -> dict[Any, float]:
    """Map every value of a factor to its place on the axis: itself if all are numbers, else its rank."""
    known = {factor(job, x) for job in jobs} - {UNKNOWN}
    values = sorted(known, key=in_order)
    if all(isinstance(value, int | float) for value in values):
        return {value: float(value) for value in values}
    return {value: float(rank) for rank, value in enumerate(values)}


def factor_axis(axis: Axes, x: str, places: dict[Any, float]) -> None:
    """Put ticks at the values that were run; sizes that grow by factors get a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, NullLocator

    numbers = list(places.values())
    if x in {"num_samples", "sequence_length"} and len(numbers) > 1:
        axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(numbers))
    axis.xaxis.set_minor_locator(NullLocator())
    labels = [show(x, value) for value in places]
    axis.set_xticklabels(labels)
    axis.set_xlabel(header(x))
