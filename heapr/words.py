"""Small things about words that several modules need for their messages and names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable


def first_line(error: BaseException) -> str:
    """What an error says first; the name of its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, known: Iterable[str], *, before: str = "", most: int = 1) -> str:
    """A suggestion to put into a message, with a blank behind it; nothing where no known name is near.

    Args:
        name: that is not known.
        known: names.
        before: put before each name, such as the path of a key.
        most: suggestions.
    """
    near = difflib.get_close_matches(name, list(known), n=most)
    return f"did you mean {' or '.join(before + name for name in near)}? " if near else ""


def unknown_key(path: str, known: Collection[str]) -> str:
    """The message for a misspelt key: what is known, and the nearest."""
    parent, _, key = path.rpartition(".")
    suggestion = did_you_mean(key, known, before=f"{parent}." if parent else "")
    return f"unknown key '{path}'; {suggestion}known here: {', '.join(sorted(known)) or 'none'}"


def class_name(target: str) -> str:
    """Of a plug-in, from its `_target_`: the last part."""
    return target.rpartition(".")[2]


def option_name(target: str, between: str = "_") -> str:
    """The name of a plug-in's option, from its `_target_`: heapr.score.gradient.HeaprSum is heapr_sum.

    Args:
        target: full name of a class, or its name alone.
        between: put between words.
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", between, class_name(target)).lower()


def step_title(stage: str, what: str) -> str:
    """What tables call a step, given its stage and its name beside it: "calibrate round 2", "prune repair",
    "routing"."""
    return what if stage == "evaluate" else f"{stage} {what}".strip()
