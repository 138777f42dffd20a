"""Words for messages and names that several modules need."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]


def did_you_mean(name: str, known: Iterable[str], *, before: str = "", most: int = 1) -> str:
    """A suggestion for a message, followed by a blank; empty if no known name is similar.

    Args:
        name: the unknown name.
        known: the known names.
        before: put before each suggested name, such as the path of a key.
        most: the largest number of suggestions.
    """
    near = [before + match for match in difflib.get_close_matches(name, list(known), n=most)]
    return f"did you mean {' or '.join(near)}? " if near else ""


def unknown_key(path: str, known: Collection[str]) -> str:
    """The message for a misspelled key, with a suggestion and the known keys."""
    key = path.rpartition(".")[2]
    before = path.removesuffix(key)
    suggestion = did_you_mean(key, known, before=before)
    names = ", ".join(sorted(known)) or "none"
    return f"unknown key '{path}'; {suggestion}known here: {names}"


def plural(number: int, one: str, many: str = "") -> str:
    """A number of things: "1 job", "2 jobs".

    Args:
        number: how many.
        one: name of one of them.
        many: name of several, if it is not `one` with an s.
    """
    if number == 1:
        return f"1 {one}"
    return f"{number} {many}" if many else f"{number} {one}s"


def class_name(target: str) -> str:
    """Name of a plug-in's class: the last part of its `_target_`."""
    return target.rpartition(".")[2]


def option_name(target: str, between: str = "_") -> str:
    """Name of a plug-in's option, from its `_target_`: heapr.score.gradient.HeaprSum is heapr_sum.

    Args:
        target: name of a class, with or without its module.
        between: separates the words.
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", between, class_name(target)).lower()


def step_title(stage: str, what: str) -> str:
    """What tables call a step: "calibrate round 2", "prune repair", "routing".

    Args:
        stage: the step's stage.
        what: the step's name beside the stage; may be empty.
    """
    return what if stage == "evaluate" else f"{stage} {what}".strip()
