"""Downloads the model, corpora and tasks of an experiment, for a machine without a network.

Run:  python -m heapr.prefetch <the same overrides, and --config-dir, as for a run>

In: an experiment's configuration. Out: filled caches (HF_HOME says where), one line per item, and exit code 2
if one is missing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from heapr.compose_experiment import compose_experiment
from heapr.definitions import conf_folder
from heapr.errors import ConfigError
from heapr.one_line_errors import one_line_errors
from heapr.overrides import config_dir_as_override
from heapr.schema import ExperimentConfig

logger = logging.getLogger(__name__)


def main(overrides: Sequence[str]) -> None:
    """Fetch everything and log it; a mistake in the overrides ends in one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    conf = conf_folder()
    if {"-h", "--help"} & set(overrides):
        sys.stdout.write(f"{__doc__}\n")
        return
    with one_line_errors(conf):
        config = compose_experiment(config_dir_as_override(overrides), conf)
        missing = fetch_all(config)
        if missing:
            names = ", ".join(missing)
            raise ConfigError(
                f"{len(missing)} items that this experiment needs could not be fetched: {names}"
            )


def fetch_all(config: ExperimentConfig) -> list[str]:
    """Fetch every item that is not in a local cache yet; log a line for each.

    Returns:
        names of the items that could not be fetched.

    Raises:
        ConfigError: the configuration is wrong.
    """
    return [name for name, fetch in _items(config).items() if not _fetch(name, fetch)]


def _items(config: ExperimentConfig) -> dict[str, Callable[[], None]]:
    """How to fetch each thing that the experiment needs from the hub."""
    from heapr.evaluation.build import build_corpora
    from heapr.evaluation.measurement import Need
    from heapr.evaluation.zero_shot import ZeroShot
    from heapr.prepare import build_plugins
    from heapr.text.mixture import parts_of
    from heapr.text.published_corpora import PublishedText

    plugins = build_plugins(config)
    assert plugins.text is not None, "only a dry run continues without the text"
    corpora = [corpus for corpus, _ in parts_of(plugins.text)]
    if any(Need.CORPUS in measurement.needs for measurement in plugins.measurements):
        corpora += build_corpora(config.evaluation)
    items: dict[str, Callable[[], None]] = {f"model {config.model.path}": lambda: _fetch_model(config)}
    for corpus in corpora:
        if isinstance(corpus, PublishedText):
            items[f"corpus {corpus.name} ({corpus.split})"] = corpus.fetch
    for measurement in plugins.measurements:
        if isinstance(measurement, ZeroShot):
            items[f"task {measurement.task}"] = measurement.fetch
    return items


def _fetch_model(config: ExperimentConfig) -> None:
    from heapr.prepare import find_source

    source = find_source(config.model)
    source.fetch()
    if not source.has_weights:
        raise ConfigError(
            f"the weights of model.path='{config.model.path}' are not in '{source.folder}'; get them where"
            " there is a network"
        )


def _fetch(name: str, fetch: Callable[[], None]) -> bool:
    """Look in the caches first, then ask the hub; log the outcome and return whether the item is here."""
    from heapr.hub import hub_is_reachable, no_network

    try:
        with no_network():
            fetch()
        logger.info("here     %s", name)
        return True
    except ConfigError as error:
        reason = str(error)
    if hub_is_reachable():
        try:
            fetch()
            logger.info("fetched  %s", name)
            return True
        except ConfigError as error:
            reason = str(error)
    logger.error("missing  %s: %s", name, reason)
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
