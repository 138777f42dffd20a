"""A wandb dashboard that compares ratios and criteria.

Run:  python -m heapr.tracking.dashboard [--entity ...] [--project heapr]
Needs a login and pip install 'heapr[dashboard]'.
In: the metrics that a project's runs logged. Out: a saved view of the project; its address is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from heapr.arguments import one_line_arguments
from heapr.errors import ConfigError
from heapr.tracking.tracker import CHANGE, CURVE, FIGURES, NUM_TOKENS, RATIO
from heapr.tracking.wandb import has_key, is_reachable
from heapr.words import first_line

COMMAND = "python -m heapr.tracking.dashboard"
MODEL, CRITERION = "labels.model", "labels.criterion"  # in a run's configuration
# Beginnings of the names of what pruning costs in quality.
DAMAGE = (
    f"{CHANGE}perplexity/",
    f"{CHANGE}accuracy/",
    "kl_to_dense/",
    f"{CHANGE}loop_rate_greedy/",
    "greedy_agreement/",
)
TABLES = ("comparison", "layers")
PROGRESS = ("calibration/loss", "calibration/tokens_per_second")
EFFICIENCY = ("parameters_removed_ratio", "flops_removed_ratio")


def main(arguments: Sequence[str] | None = None) -> None:
    """Create the dashboard, or say in one line why that is not possible."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Create a wandb dashboard.")
    parser.add_argument("--entity", help="wandb user or team; yours if not given")
    parser.add_argument("--project", default="heapr", help="wandb project, as tracking.project")
    try:
        with one_line_arguments(COMMAND):
            options = parser.parse_args(arguments)
        address = create_dashboard(options.entity, options.project)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    sys.stdout.write(f"{address}\n")


def create_dashboard(entity: str | None, project: str) -> str:
    """Save a dashboard of a project and return its address.

    Raises:
        ConfigError: wandb-workspaces or a key is missing, wandb does not answer or refuses, or the project
            has nothing to compare.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError("the dashboard needs wandb-workspaces; pip install 'heapr[dashboard]'")
    if not has_key():
        raise ConfigError(
            "the dashboard is saved by wandb, but no key is found; set WANDB_API_KEY or run wandb login"
        )
    if not is_reachable():
        raise ConfigError(
            "the dashboard is saved by wandb, which does not answer; check the network and WANDB_BASE_URL"
        )
    import wandb

    try:
        api = wandb.Api(timeout=20)
        owner = entity or api.default_entity
        runs = api.runs(f"{owner}/{project}")
        names = {name for run in runs for name in dict(run.summary)}
        dashboard = build_dashboard(owner, project, sorted(names))
        dashboard.save()
        return str(dashboard.url)
    except ConfigError:
        raise
    except Exception as error:
        # wandb documents no exceptions of its own.
        raise ConfigError(
            f"wandb made no dashboard of '{project}' ({first_line(error)}); check --entity, --project and"
            " the key"
        ) from error


def build_dashboard(entity: str, project: str, names: Sequence[str]) -> Any:
    """Return a workspace, which is sent to wandb when its `save` is called.

    It shows the curves of sweeps, a panel for each metric; the damage of every run against what was saved;
    then tables, figures and the progress of calibration.

    Args:
        entity: owner of the project.
        project: where it is saved.
        names: of everything that the project's runs logged.

    Raises:
        ConfigError: there is nothing to compare.
    """
    import wandb_workspaces.workspaces as ws

    metrics = [name for name in names if name.startswith(DAMAGE)]
    if not metrics:
        raise ConfigError(
            f"no run of '{entity}/{project}' has metrics yet; run experiments with tracking=wandb first"
        )
    runset = ws.RunsetSettings(groupby=[ws.Config(MODEL), ws.Config(CRITERION)])
    return ws.Workspace(
        entity=entity,
        project=project,
        name="Ratios and criteria",
        sections=_sections(names, metrics),
        runset_settings=runset,
    )


def _sections(names: Sequence[str], metrics: Sequence[str]) -> list[Any]:
    """Return the sections of the workspace, from the metrics to how runs were configured.

    Args:
        names: of everything that is logged.
        metrics: those of them that are compared.
    """
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2 import MediaBrowser, RunComparer, WeavePanelSummaryTable

    lines = [_curves(metric, of_metric) for metric, of_metric in _by_metric(names).items()]
    tables = [WeavePanelSummaryTable(table_name=name) for name in TABLES]
    one_above_the_other = ws.SectionLayoutSettings(columns=1, rows=2)
    figures = [name for name in names if name.startswith(FIGURES)]
    images = [MediaBrowser(title=name, media_keys=[name]) for name in figures]
    progress = [_progress(name) for name in PROGRESS]
    configurations = RunComparer(diff_only="split")
    return [
        ws.Section(name="Quality by ratio", panels=lines, is_open=True),
        ws.Section(name="Damage by what is saved", panels=_scatters(metrics), is_open=True),
        ws.Section(name="Tables", panels=tables, is_open=True, layout_settings=one_above_the_other),
        ws.Section(name="Figures", panels=images),
        ws.Section(name="Calibration", panels=progress),
        ws.Section(name="Configurations", panels=[configurations]),
    ]


def _by_metric(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the lines of each metric; a name is curve/<kind>/<text or task>/<method>."""
    found: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(CURVE):
            metric = name.removeprefix(CURVE).rpartition("/")[0]
            found.setdefault(metric, []).append(name)
    return found


def _curves(metric: str, names: Sequence[str]) -> Any:
    """Return a plot of one metric over the ratio, from the summary runs of sweeps: a line for each method."""
    from wandb_workspaces.reports.v2 import LinePlot

    return LinePlot(
        title=metric, x=RATIO, y=list(names), title_x="share of atomic experts removed", max_runs_to_show=100
    )


def _progress(name: str) -> Any:
    """Return a plot over tokens: a line for each model, with its mean and standard error."""
    from wandb_workspaces.reports.v2 import Config, LinePlot

    return LinePlot(
        title=name,
        x=NUM_TOKENS,
        y=[name],
        title_x="tokens",
        groupby=Config(MODEL),
        groupby_aggfunc="mean",
        groupby_rangefunc="stderr",
        max_runs_to_show=100,
    )


def _scatters(metrics: Sequence[str]) -> list[Any]:
    """Return a plot of each metric over each saving, a point for each run."""
    from wandb_workspaces.reports.v2 import ScatterPlot, SummaryMetric

    pairs = [(metric, saved) for metric in metrics for saved in EFFICIENCY]
    return [
        ScatterPlot(title=f"{metric} over {saved}", x=SummaryMetric(saved), y=SummaryMetric(metric))
        for metric, saved in pairs
    ]


if __name__ == "__main__":
    main()
