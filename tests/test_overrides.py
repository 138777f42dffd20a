"""Arguments that Hydra cannot read: named, with what to type instead; what is proposed is tried."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from heapr.errors import ConfigError
from heapr.overrides import check_one_option, explain_comma, explain_option, explain_override, quoted_override
from tests.experiment import CONF

VALUES = [
    "/tmp/é", "b=c", "x(1", "x)", "x#y", "it's", "'x", '"x', "/t{b", "}", "[/tmp/a", "a]", "/tmp/a&b", "~/x", "a~b", "日本", "<b>", "!b",
    "`b`;c",
    'say "hi" é', "x\\é\\", '\\"é', "\\\\\"'é", "a: é", "x,é", "ä b",
]  # fmt: skip


def as_the_shell_gives_it(text: str) -> str:
    """What a program gets as its argument from a POSIX shell."""
    return subprocess.run(
        ["sh", "-c", f"printf %s {text}"], capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout


@pytest.mark.parametrize("value", VALUES)
def test_what_is_proposed_gives_the_value_that_was_meant(value: str) -> None:
    override = f"paths.outputs={value}"
    message = explain_override(override, [override])
    assert message.startswith(f"argument '{override}': ")
    proposed = re.search(r"; write (.*) \(the outer quotes", message)[1]
    assert as_the_shell_gives_it(proposed) == shlex.split(proposed)[0]
    parsed = OverridesParser.create().parse_override(shlex.split(proposed)[0])
    assert (
        parsed.key_or_group == "paths.outputs"
        and str(parsed.value()) == value
        and not parsed.is_sweep_override()
    )


@pytest.mark.parametrize(
    ("override", "arguments", "message"),
    [
        ("a=/tmp/é", [], """argument 'a=/tmp/é': é in a value must be inside quotes; write 'a="/tmp/é"' (the outer"""),
        ("a=[/tmp/é.txt,b.txt]", [], """write 'a=["/tmp/é.txt",b.txt]' (the outer"""),
        ("a=b,é", ["-m"], """write 'a=b,"é"' (the outer"""),
        ("a={b: é}", [], "put \"...\" around that part of the value"),
        ("pruning.ratio==0.3", [], "argument 'pruning.ratio==0.3' has one '=' too many; write pruning.ratio=0.3"),
        ("paths.outputs", [], "argument 'paths.outputs' is not an override; give key=value"),
        ("é=3", [], "argument 'é=3': 'é' cannot be the name of a field"),
        ("=3", [], "argument '=3': '' cannot be the name of a field"),
        ("a=x\ny", [], r"argument 'a=x\ny' holds a character that cannot be printed"),
    ],
)  # fmt: skip
def test_the_argument_is_named_in_one_line(override: str, arguments: list[str], message: str) -> None:
    found = explain_override(override, [*arguments, override])
    assert message in found and len(found.splitlines()) == 1


def test_a_comma_outside_a_sweep() -> None:
    assert (
        explain_comma("a=/x,/y")
        == """argument 'a=/x,/y' has a comma; write 'a="/x,/y"' for one value, 'a=[/x,/y]' for a list, or add -m to run once for each"""
    )


def test_an_option_that_is_no_name() -> None:
    message = "argument 'pruning=0.4': 0.4 is not the name of an option; known options of pruning: expert, global, layer"
    assert explain_option(["score=fisher", "pruning.ratio=0.4", "pruning=0.4"], CONF) == message


def test_what_can_be_read_stays_as_it_is() -> None:
    assert quoted_override("a", "/tmp/x.y-z_1", is_sweep=False) == "a=/tmp/x.y-z_1"


def test_a_group_of_one_option_refuses_a_list() -> None:
    check_one_option(["score=fisher", "evaluation/corpora=[pydocs,ptb]", "calibration.corpus.paths=[a.txt]"])
    for override in ("score=[heapr,fisher]", "pruning/repair=[joint]"):
        with pytest.raises(
            ConfigError, match=r"gives a list, but .* takes one option; give one, or run each with -m"
        ):
            check_one_option([override])
