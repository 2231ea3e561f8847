"""Options of commands that are settings of the configuration: made from what its fields declare."""

from __future__ import annotations

import enum
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ebpfproxy.cli import completion
from ebpfproxy.config.declarations import Flag, Option, bounds
from ebpfproxy.config.documents import bare
from ebpfproxy.config.flags import KUBE_PROXY_OPTIONS, NO_FIELD, OWN_OPTIONS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_PATHS = ("PATH", "DIR", "FILE")
_RANGES = {int: click.IntRange, float: click.FloatRange}
_COMPLETED = {"--lb-algorithm": completion.algorithms}
#: What names of variables of the environment begin with.
VARIABLES = "EBPFPROXY"
#: Flags of kube-proxy without a field.
_IGNORED = ("boot-id-file", "machine-id-file")


def setting(path: str, **attributes: Any) -> Decorator:
    """The option that sets a field of EbpfProxyConfiguration, with further attributes for click."""
    (option,) = (each for each in OWN_OPTIONS if each.path == path)
    assert option.flag is not None
    return _option(option.flag, _of_own(option, option.flag), **attributes)


def all_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for every field of both documents that has a flag."""
    for name in _IGNORED:
        function = click.option(f"--{name}", hidden=True)(function)
    for options, attributes in ((KUBE_PROXY_OPTIONS, _of_kube_proxy), (OWN_OPTIONS, _of_own)):
        for option in reversed(options):
            if option.flag is not None:
                function = _option(option.flag, attributes(option, option.flag))(function)
    return function


def given(ctx: click.Context) -> dict[str, Any]:
    """The flags that were given, in the environment or on the command line, by name."""
    said = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return {
        name: value
        for name, value in ctx.params.items()
        if ctx.get_parameter_source(name) in said and name.replace("_", "-") not in NO_FIELD
    }


def _option(flag: Flag, attributes: dict[str, Any], **more: Any) -> Decorator:
    """What both documents have in common: choices, paths, and a default that is said in words."""
    if flag.choices:
        attributes["type"] = click.Choice(flag.choices)
    elif flag.metavar in _PATHS:
        # The command says what it cannot read; some that take the option never read it.
        attributes["type"] = click.Path(path_type=Path, readable=False)
    if flag.metavar:
        attributes["metavar"] = flag.metavar
    if flag.default:
        attributes["help"] += f"  [default: {flag.default}]"
        attributes["default"] = None
    names = attributes.pop("names", flag.names)
    if flag.variable:
        own = flag.names[0].removeprefix("--").replace("-", "_").upper()
        attributes["envvar"] = [f"{VARIABLES}_{own}", flag.variable]
    return click.option(*names, **attributes, shell_complete=_COMPLETED.get(names[0]), **more)


def _of_own(option: Option, flag: Flag) -> dict[str, Any]:
    """The field's type decides: click checks numbers and choices, a boolean has a flag for each value."""
    attributes: dict[str, Any] = {"help": option.text, "default": _plain(option.value)}
    kind = bare(option.type)
    is_list = typing.get_origin(kind) is tuple
    values = _values(bare(typing.get_args(kind)[0]) if is_list else kind)
    if kind is bool:
        attributes["names"] = [f"{name}/--no-{name.removeprefix('--')}" for name in flag.names]
    elif values:
        attributes |= {"type": click.Choice(values), "multiple": is_list}
    elif kind in _RANGES:
        attributes["type"] = _RANGES[kind](*bounds(option.type))
    return attributes


def _of_kube_proxy(option: Option, flag: Flag) -> dict[str, Any]:
    """Text, which :func:`ebpfproxy.config.flags.lay` checks; a boolean is as in Go: ``--name[=false]``."""
    path = f"{option.path} of KubeProxyConfiguration."
    attributes: dict[str, Any] = {
        "help": option.text or (f"Ignored: {path}" if option.is_ignored else path),
        "default": None if option.is_ignored else _plain(option.value),
        "metavar": None if flag.choices else "VALUE",
    }
    if bare(option.type) is bool:
        shown = None if option.is_ignored else str(option.value).lower()
        attributes |= {"is_flag": False, "flag_value": "true", "metavar": "[=BOOL]", "default": shown}
    return attributes


def _values(kind: Any) -> Sequence[str]:
    """What the type lists: of a Literal or an Enum."""
    if isinstance(kind, enum.EnumMeta):
        return [str(each) for each in typing.cast(type[enum.Enum], kind)]
    return [str(each) for each in typing.get_args(kind)]


def _plain(value: Any) -> Any:
    """A default as help shows it; None where there is nothing to show."""
    if isinstance(value, bool):
        return value
    if value is None or value == "" or isinstance(value, tuple | dict):
        return None
    return value if isinstance(value, int | float) and not isinstance(value, enum.Enum) else str(value)
