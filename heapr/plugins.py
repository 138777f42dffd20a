"""Builds plug-ins, the objects that a `_target_` in the configuration names.

In: an entry and its place in the configuration. Out: the object. Which classes may be named at all is checked
before, for the whole configuration (heapr/targets.py). Arguments are checked against the annotations of the
class's `__init__`: types and ranges, such as `window: Annotated[int, Ge(2)]`. Nothing is called that is not a
class of the right kind.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union

import pydantic
from annotated_types import Ge, Gt, Le, Lt

from heapr.errors import ConfigError
from heapr.limits import LARGEST_SEED
from heapr.targets import TARGET, kind_at
from heapr.words import unknown_key

RULES = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
COMPLAINTS = {  # by pydantic's name for the error; every other error is a wrong type
    "greater_than_equal": "is below {ge:g}",
    "greater_than": "is not above {gt:g}",
    "less_than_equal": "is above {le:g}",
    "less_than": "is not below {lt:g}",
    "finite_number": "is not finite",
    "literal_error": "is unknown",
}
TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def build(entry: Mapping[str, Any], where: str, **injected: Any) -> Any:
    """Make the plug-in that an entry's `_target_` names; the other keys are its arguments.

    Args:
        entry: a plug-in's configuration.
        where: its place in the configuration, for messages.
        injected: further arguments, which do not come from the configuration and are not checked.

    Raises:
        ConfigError: the target is unknown, or an argument is unknown, missing, of the wrong type or out of
            range; and whatever the plug-in itself raises.
    """
    target = plug_in(entry, where)
    arguments = {key: value for key, value in entry.items() if key != TARGET}
    parameters = inspect.signature(target).parameters
    known = {name: parameter for name, parameter in parameters.items() if name not in injected}
    hints = typing.get_type_hints(target.__init__, include_extras=True)
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(unknown_key(f"{where}.{key}", known))
        check_value(f"{where}.{key}", value, hints.get(key, Any))
    required = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    absent = [name for name in required if name not in arguments]
    if absent:
        raise ConfigError(f"{where} lacks {', '.join(absent)}; give it, for example {where}.{absent[0]}=...")
    return target(**arguments, **injected)


def plug_in(entry: Any, where: str) -> type[Any]:
    """Import the class that an entry's `_target_` names.

    Raises:
        ConfigError: there is no `_target_`; or it cannot be imported, is no class, or is one of another kind.
    """
    if not isinstance(entry, Mapping) or TARGET not in entry:
        raise ConfigError(
            f"{where} has no _target_, so it names no plug-in; is a key misspelled? See docs/adding.md"
        )
    name = f"{where}.{TARGET}='{entry[TARGET]}'"
    module, _, attribute = str(entry[TARGET]).rpartition(".")
    try:
        target: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing a module may raise anything
        reason = "" if isinstance(error, ImportError | AttributeError) else f" ({type(error).__name__})"
        raise ConfigError(f"{name} cannot be imported{reason}; see docs/adding.md") from error
    if not inspect.isclass(target):
        raise ConfigError(f"{name} is not a class; see docs/adding.md")
    kind = kind_at(where)
    methods = () if kind is None else kind.methods
    absent = [method for method in methods if not inspect.isfunction(getattr(target, method, None))]
    if kind is not None and absent:
        raise ConfigError(f"{name} is not a {kind.name}: it has no {', '.join(absent)}; see docs/adding.md")
    return target


def check_value(name: str, value: Any, hint: Any) -> None:
    """Check type and range of one argument.

    Raises:
        ConfigError: it does not fit; the message says what was given, why it cannot be, and what to give.
    """
    if type(value) is int and abs(value) > LARGEST_SEED:
        raise ConfigError(f"{name}={value} is above {LARGEST_SEED}; give {describe(hint)}")
    try:
        pydantic.TypeAdapter(hint, config=RULES).validate_python(value)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{name}={value} {_complaint(error)}; give {describe(hint)}") from error


def _complaint(error: pydantic.ValidationError) -> str:
    """What is wrong with a value. For a union, the complaint of the member whose type fits."""
    for detail in error.errors():
        form = COMPLAINTS.get(detail["type"])
        if form is not None:
            return form.format(**detail.get("ctx", {}))
    return "has the wrong type"


def describe(hint: Any) -> str:
    """Say in words what an annotation allows.

    `Annotated[int, Ge(1)] | None` is "a whole number of at least 1 or null".
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{describe(parts[0])} {_range(parts[1:])}".strip()
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, parts))
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return "a mapping"
    if inspect.isclass(origin) and issubclass(origin, Iterable):
        return "a list"
    return TYPE_NAMES.get(hint, str(hint))


def _range(bounds: Iterable[Any]) -> str:
    words = []
    for bound in bounds:
        match bound:
            case Ge(limit):
                words.append(f"of at least {limit}")
            case Gt(limit):
                words.append(f"above {limit}")
            case Le(limit):
                words.append(f"of at most {limit}")
            case Lt(limit):
                words.append(f"below {limit}")
    return " and ".join(words)
