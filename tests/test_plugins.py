"""Plug-ins are built from the configuration: every argument is checked by its annotation, before anything is
computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt

from heapr.errors import ConfigError
from heapr.plugins import build, describe

Size = Annotated[int, Ge(2)] | None
Share = Annotated[float, Gt(0), Lt(1)]
Batch = Annotated[int, Ge(1)] | Literal["auto"]


class Example:
    """Takes one argument of each kind."""

    def __init__(
        self,
        *,
        window: Annotated[int, Ge(2)] = 2,
        size: Size = None,
        share: Share = 0.5,
        alpha: Annotated[float, Le(1)] = 1,
        batch_size: Batch = "auto",
        target: Literal["layer", "stream"] = "layer",
        is_sequential: bool = True,
        names: Sequence[str] = (),
        parts: Mapping[str, Any] | None = None,
        made_here: object = None,
    ) -> None:
        self.window, self.made_here = window, made_here


def example(**arguments: Any) -> Example:
    made: Example = build({"_target_": "tests.test_plugins.Example", **arguments}, "x.example")
    return made


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"window": 1}, "window=1 is below 2; give a whole number of at least 2"),
        ({"window": "abc"}, "window=abc has the wrong type; give a whole number of at least 2"),
        ({"window": 2.5}, "window=2.5 has the wrong type; give a whole number of at least 2"),
        ({"window": True}, "window=True has the wrong type; give a whole number of at least 2"),
        ({"window": None}, "window=None has the wrong type; give a whole number of at least 2"),
        ({"size": 1}, "size=1 is below 2; give a whole number of at least 2 or null"),
        ({"size": "all"}, "size=all has the wrong type; give a whole number of at least 2 or null"),
        ({"share": 0}, "share=0 is not above 0; give a number above 0 and below 1"),
        ({"share": 1.0}, "share=1.0 is not below 1; give a number above 0 and below 1"),
        ({"share": float("nan")}, "share=nan is not finite; give a number above 0 and below 1"),
        ({"alpha": 1.5}, "alpha=1.5 is above 1; give a number of at most 1"),
        ({"batch_size": 0}, "batch_size=0 is below 1; give a whole number of at least 1 or auto"),
        ({"batch_size": "all"}, "batch_size=all is unknown; give a whole number of at least 1 or auto"),
        ({"target": "strem"}, "target=strem is unknown; give layer or stream"),
        ({"is_sequential": 1}, "is_sequential=1 has the wrong type; give true or false"),
        ({"names": "a"}, "names=a has the wrong type; give a list"),
        ({"parts": [1]}, "parts=[1] has the wrong type; give a mapping or null"),
    ],
    ids=str,
)
def test_an_argument_out_of_its_range_is_one_line_that_says_where_and_what_to_give(
    argument: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        example(**argument)
    assert str(caught.value) == f"x.example.{message}"


def test_what_is_in_range_is_passed_on() -> None:
    assert (
        example(window=3, size=2, share=0.1, batch_size=4, names=["a"], parts={"a": 1}, alpha=1).window == 3
    )


def test_misspelt_missing_and_unknown_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'x.example.windw'; did you mean x.example.window\?"):
        example(windw=3)
    with pytest.raises(ConfigError, match="score lacks alpha; give it, for example score.alpha=..."):
        build({"_target_": "heapr.score.activation.Camera"}, "score")
    with pytest.raises(ConfigError, match="cannot be imported"):
        build({"_target_": "tests.test_plugins.Nothing"}, "score")


def test_what_is_injected_is_neither_checked_nor_an_option() -> None:
    entry = {"_target_": "tests.test_plugins.Example"}
    assert build(entry, "here", made_here=3, window=0).window == 0
    with pytest.raises(ConfigError, match="unknown key 'here.made_here'"):
        build({**entry, "made_here": 1}, "here", made_here=3)


def test_an_annotation_in_words() -> None:
    assert describe(str) == "text" and describe(float | None) == "a number or null"
