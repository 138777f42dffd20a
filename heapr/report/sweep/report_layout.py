"""What a report shows: the `report` section of an experiment.

In: a list of entries, or a mapping with the keys of `Layout` and the list under `entries`. Out: a checked
`Layout`.

    - {kind: table, title: ..., rows: [model, ratio, criterion], metrics: [perplexity/wikitext2],
       average_over: seed}
    - {kind: ratio_curve, metrics: [perplexity/wikitext2], series: [criterion, scope]}
    - {kind: calibration_curve, metrics: [...], x: num_samples, series: [...], average_over: seed}
    - {kind: bars, metrics: [...], x: criterion, series: [ratio]}
    - {kind: layer_heatmap, order: sorted}
    - {kind: consistency, series: [criterion]}
    - {kind: relative_table, rows: [model, ratio, method], baseline: {method: heapr}, average_over: seed,
       metrics: [perplexity/wikitext2, pruning_time_ratio]}
    - {kind: relative_curve, metrics: [perplexity/wikitext2], series: [method], baseline: {method: heapr},
       average_over: seed}

Every entry may have a `title` and a `where`: values of factors (or lists of them) that its jobs must have.

The relative kinds show (pruned - dense) / (baseline's pruned - dense). A job's baseline is the one that has
the values of factors under `baseline` and equals it in everything else; `where` does not restrict it.
Shares are computed per job, then averaged. Metrics without a dense counterpart (costs, sizes) are shown as
they are. A share is marked if the baseline's increase is below three of its standard errors
(heapr.report.sweep.doubt): list kl_to_dense beside perplexity.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from heapr.errors import ConfigError
from heapr.report.sweep import metrics
from heapr.report.sweep.factors import METHOD, NAMES, is_factor, varying
from heapr.report.sweep.results import Jobs
from heapr.words import did_you_mean

ROWS = ("model", "ratio", "criterion", "scope", "form", "corpus", "num_samples", "seed")
# The keys of each kind, beside kind, title and where.
KEYS = {
    "table": {"rows", "metrics", "average_over"},
    "ratio_curve": {"metrics", "series", "average_over"},
    "calibration_curve": {"metrics", "x", "series", "average_over"},
    "bars": {"metrics", "x", "series", "average_over"},
    "layer_heatmap": {"order"},
    "consistency": {"series"},
    "relative_table": {"rows", "metrics", "baseline", "average_over"},
    "relative_curve": {"metrics", "series", "baseline", "average_over"},
}
TITLES = {
    "table": "Results",
    "ratio_curve": "Quality and FLOPs against the share removed",
    "calibration_curve": "Quality against calibration size",
    "bars": "Comparison",
    "layer_heatmap": "Share removed of every expert",
    "consistency": "Predicted against measured increase of the loss",
    "relative_table": "Share of the baseline's increase",
    "relative_curve": "Share of the baseline's increase against the share removed",
}
RELATIVE_KINDS = ("relative_table", "relative_curve")
LISTS = ("rows", "metrics", "series")  # keys whose value may be one name instead of a list
# What an entry of a kind has if it does not say otherwise, where that differs from `Entry`.
BY_METHOD = {"rows": ("model", "ratio", METHOD), "series": (METHOD,)}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "calibration_curve": {"x": "num_samples"},
    "bars": {"x": "criterion", "series": ("ratio",)},
    "relative_table": BY_METHOD,
    "relative_curve": BY_METHOD,
}
ORDERS = ("index", "sorted")


@dataclass(frozen=True)
class Entry:
    """A table or a figure.

    Attributes:
        kind: one of `KEYS`.
        title: above it.
        where: values by factor that its jobs must have.
        rows: factors that identify a table's row.
        metrics: by contract name.
        series: factors that tell lines, colours or markers apart.
        x: factor on the axis.
        average_over: factor whose values are averaged.
        baseline: values by factor of the job against which shares are computed.
        order: of a layer's experts: by index, or sorted by share removed.
    """

    kind: str
    title: str
    where: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ROWS
    metrics: tuple[str, ...] = ()
    series: tuple[str, ...] = ("criterion", "scope")
    x: str = ""
    average_over: str | None = None
    baseline: Mapping[str, Any] = field(default_factory=dict)
    order: str = "index"


@dataclass(frozen=True)
class Layout:
    """A whole report.

    Attributes:
        title: of the page.
        command, date: how and when the results were made.
        entries: tables and figures in their order; empty means the default.
    """

    title: str = "Sweep"
    command: str = ""
    date: str = ""
    entries: tuple[Entry, ...] = ()


def read_layout(section: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> Layout:
    """Check the `report` section of an experiment and return it as a layout.

    Raises:
        ConfigError: a kind, key, factor or order is unknown, or an entry lacks its metrics or baseline.
    """
    given: Mapping[str, Any] = section if isinstance(section, Mapping) else {"entries": section}
    known = [attribute.name for attribute in fields(Layout)]
    _check_keys(given, known, "report")
    texts: dict[str, str] = {}
    for name, value in given.items():
        if name != "entries" and value is not None:
            texts[name] = str(value)
    entries = []
    for number, described in enumerate(given.get("entries") or []):
        entry = _entry(described, f"report.{number}")
        entries.append(entry)
    return Layout(**texts, entries=tuple(entries))


def default_entries(jobs: Jobs) -> tuple[Entry, ...]:
    """Return one table of everything, and the ratio curve if there are several ratios."""
    names = metrics.known(jobs)
    table = Entry(kind="table", title=TITLES["table"], metrics=tuple(names))
    if not varying(jobs, ["ratio"]) or not names:
        return (table,)
    perplexities = [name for name in names if name.startswith("perplexity/")]
    quality = perplexities[:1]
    accuracies = [name for name in names if name.startswith("accuracy/")]
    quality += [name for name in accuracies if name == "accuracy/average"] or accuracies[:1]
    drawn = tuple(quality or names[:1])
    curve = Entry(kind="ratio_curve", title=TITLES["ratio_curve"], metrics=drawn)
    return (table, curve)


def _entry(given: Mapping[str, Any], place: str) -> Entry:
    kind = given.get("kind")
    if kind not in KEYS:
        raise ConfigError(f"{place}.kind={kind!r} is unknown; choose one of {', '.join(KEYS)}")
    _check_keys(given, ["kind", "title", "where", *sorted(KEYS[kind])], place)
    values = {"title": TITLES[kind], **DEFAULTS.get(kind, {})}
    for name, value in given.items():
        if name in LISTS and isinstance(value, str):
            values[name] = (value,)
        elif name in LISTS and value is not None:
            values[name] = tuple(value)
        elif value is not None:
            values[name] = value
    entry = Entry(**values)
    _check_values(entry, place)
    return entry


def _check_values(entry: Entry, place: str) -> None:
    used = {
        "rows": entry.rows,
        "series": entry.series,
        "where": tuple(entry.where),
        "baseline": tuple(entry.baseline),
        "x": (entry.x,) if entry.x else (),
        "average_over": (entry.average_over,) if entry.average_over else (),
    }
    for key, names in used.items():
        for name in names:
            if not is_factor(name):
                raise ConfigError(
                    f"{place}.{key}: {_unknown(name, (*NAMES, METHOD))}, or a field of the configuration by"
                    " its dotted path"
                )
    if entry.order not in ORDERS:
        raise ConfigError(f"{place}.order={entry.order!r} is unknown; choose one of {', '.join(ORDERS)}")
    if not entry.metrics and entry.kind in {"ratio_curve", "calibration_curve", "bars", *RELATIVE_KINDS}:
        raise ConfigError(
            f"{place} ({entry.kind}) has no metrics; give them, for example metrics: [perplexity/wikitext2]"
        )
    if not entry.baseline and entry.kind in RELATIVE_KINDS:
        raise ConfigError(
            f"{place} ({entry.kind}) has no baseline; give the factors it has, for example baseline:"
            " {method: heapr}"
        )


def _check_keys(given: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{place}: {_unknown(name, known)}")


def _unknown(name: str, known: Collection[str]) -> str:
    return f"unknown '{name}'; {did_you_mean(name, known)}known here: {', '.join(known)}"
