"""What every entry point must do with wrong input: exit code 2 and one line; asked for in this process."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, create_defaults_list
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from heapr.one_line_errors import one_line_errors
from tests.command import Completed, run_py_here
from tests.experiment import CONF

LOG_LINE = re.compile(r"\d\d:\d\d:\d\d INFO |here  |missing  ")  # of work that came before
LONGEST = 900  # letters of a message; known names may be listed


def line_of(result: Completed) -> str:
    """The line of a refusal."""
    assert result.returncode == 2, (result.returncode, result.stdout[-500:], result.stderr[-3000:])
    *log, line = result.stderr.strip().splitlines()
    assert all(LOG_LINE.match(before) for before in log), result.stderr
    assert line.startswith("error: ") and "Traceback" not in result.stderr
    assert len(line) < LONGEST, line
    return line


def refused(folder: Path, *arguments: str) -> str:
    """The line with which `python run.py <arguments>` refuses."""
    with weights_stay_away(), composed_once(arguments), FILES.read_once():
        return line_of(run_py_here(*arguments, folder=folder))


def refused_call(call: Callable[[], object]) -> str:
    """The line with which a command that consists of this call would refuse."""
    stderr, code = io.StringIO(), 0
    with weights_stay_away(), contextlib.redirect_stderr(stderr):
        try:
            with one_line_errors(CONF):
                call()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return line_of(Completed([], code, "", stderr.getvalue()))


def composed_once(arguments: Sequence[str]) -> contextlib.AbstractContextManager[object]:
    """Inside the context, Hydra does not compose once more to see whether a file asks for a sweep."""
    if "-m" in arguments:
        return contextlib.nullcontext()
    return mock.patch("hydra._internal.hydra.Hydra.get_mode", return_value=None)


class _ConfigurationFiles:
    """What Hydra read and merged before: nearly all of the time that a refusal takes.

    The chosen options decide which files are read, so they are the key, together with the folders that are
    searched. The values on the command line go on top, and Hydra puts them there each time.
    """

    def __init__(self) -> None:
        self._lists: dict[object, DefaultsList] = {}
        self._merged: dict[int, DictConfig] = {}

    @contextlib.contextmanager
    def read_once(self) -> Iterator[None]:
        """Inside the context, Hydra reads and merges the same files once."""
        merge = ConfigLoaderImpl._compose_config_from_defaults_list

        def merge_once(loader: ConfigLoaderImpl, defaults: list[Any], repo: IConfigRepository) -> DictConfig:
            if id(defaults) not in self._merged:  # the list stays in _lists, so its id is its own
                self._merged[id(defaults)] = merge(loader, defaults=defaults, repo=repo)
            return copy.deepcopy(self._merged[id(defaults)])

        with (
            mock.patch.object(config_loader_impl, "create_defaults_list", self._list_once),
            mock.patch.object(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_once),
        ):
            yield

    def _list_once(
        self, *, repo: IConfigRepository, overrides_list: list[Override], **options: Any
    ) -> DefaultsList:
        values = Overrides(repo, overrides_list).config_overrides
        choices = [override.input_line for override in overrides_list if override not in values]
        folders = [(source.provider, source.path) for source in repo.get_sources()]
        key = (*choices, *folders, *options.items())
        if key not in self._lists:
            self._lists[key] = create_defaults_list(repo=repo, overrides_list=overrides_list, **options)
        known = self._lists[key]
        return DefaultsList(known.defaults, known.defaults_tree, values, known.overrides)


FILES = _ConfigurationFiles()


@contextlib.contextmanager
def weights_stay_away() -> Iterator[None]:
    """Inside the context, loading a model fails the test: a mistake must be found before."""
    accepted = AssertionError("was accepted")
    with (
        mock.patch("heapr.model.load.ModelSource._load_weights", side_effect=accepted),
        mock.patch("torch.set_num_threads"),
    ):
        yield
