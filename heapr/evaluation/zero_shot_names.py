"""Whether lm-eval knows a task, found out from its files without importing it, which takes many seconds.

In: the name of a task, and a folder with further tasks. Out: nothing, or a refusal with suggestions.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from heapr.errors import ConfigError
from heapr.evaluation.zero_shot_local import NAME as LOCAL_TASK
from heapr.files import is_name
from heapr.words import did_you_mean, first_line

# A name in lm-eval's YAML, which may be JSON: of a task, group or tag, or an element of a list of these.
NAME = re.compile(
    rb"""(?:^|[{,])[ \t]*['"]?(?:task|group|tag)['"]?[ \t]*:[ \t]*['"]?([\w.:+-]+)"""
    rb"""|^[ \t]*-[ \t]*['"]?([\w.:+-]+)""",
    re.MULTILINE,
)
ENDINGS = ("*.yaml", "*.yml")
# lm-eval's folders of the paper's tasks, which are looked at first: there are 14,000 files in all.
PAPER_FOLDERS = ("openbookqa", "arc", "winogrande", "hellaswag", "piqa", "mathqa")


def check_task_name(name: str, folder: Path | None) -> None:
    """Check that some file of lm-eval, or of a folder, names a task, group or tag.

    Args:
        name: of the task.
        folder: with further tasks.

    Raises:
        ConfigError: no file does, or a YAML file of the folder cannot be read.
    """
    if not is_name(name):
        raise ConfigError(
            f"zero-shot task '{name[:100]}' is not the name of a task; lm-eval ls tasks lists all"
        )
    own: set[str] = set()
    if folder is not None:
        own = set(_names_in(folder))
        _check_yaml(folder)
    if name == LOCAL_TASK or name in own or name in _names_of_lm_eval(PAPER_FOLDERS):
        return
    known = _names_of_lm_eval()
    if name in known:
        return
    suggestion = did_you_mean(name, [*own, *known, LOCAL_TASK], most=3)
    raise ConfigError(
        f"zero-shot task '{name}' is unknown; {suggestion}see lm-eval ls tasks; include_path adds your own"
    )


@functools.cache
def _names_of_lm_eval(folders: tuple[str, ...] = ("",)) -> frozenset[str]:
    """Every name in lm-eval's files, or in some folders of them, and some words that are none."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "heapr needs lm-eval"
    names: set[str] = set()
    for folder in folders:
        names.update(_names_in(Path(spec.origin).parent / "tasks" / folder))
    return frozenset(names)


def _names_in(folder: Path) -> Iterator[str]:
    for file in _yaml_files(folder):
        for groups in NAME.findall(_content(file)):
            yield b"".join(groups).decode()


def _content(file: Path) -> bytes:
    """The bytes of a YAML file.

    Raises:
        ConfigError: it cannot be read; a pipe would be waited for.
    """
    problem = "it is not a file"
    try:
        if file.is_file():
            return file.read_bytes()
    except OSError as error:
        problem = error.strerror or first_line(error)
    raise ConfigError(
        f"'{file}', in a folder of tasks, cannot be read: {problem}; remove it, or name another folder"
    )


def _yaml_files(folder: Path) -> Iterator[Path]:
    for ending in ENDINGS:
        yield from folder.rglob(ending)


def _check_yaml(folder: Path) -> None:
    """Check that the files of a user's folder are YAML; lm-eval skips those that are not."""
    for file in _yaml_files(folder):
        _check_one_yaml(file)


def _check_one_yaml(file: Path) -> None:
    try:
        for _ in yaml.parse(_content(file), Loader=yaml.SafeLoader):
            pass
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"'{file}' is not YAML: {first_line(error)}; correct or remove it") from error
