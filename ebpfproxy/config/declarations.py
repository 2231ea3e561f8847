"""A field of a configuration declares its flag, which is the only description of an option.

A field's type has the values, its ``Meta`` the bounds and the text, its :class:`Flag` the name on the command
line. From these come the options of ``ebpfproxy run`` (:mod:`ebpfproxy.cli.settings`), what a flag sets
(:mod:`ebpfproxy.config.flags`), the tables in ``docs/configuration.md`` and the JSON schema.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from ebpfproxy.config.documents import fields_of, join


class Flag:
    """The annotation of a field that a flag sets.

    ``names`` start with their dashes. ``metavar`` is the value in the help; PATH, DIR and FILE are completed
    as such. ``default`` says in words what an empty or absent value means. ``choices`` are the values where
    the field's type does not list them. ``variable`` of the environment sets it, too, after EBPFPROXY_ and
    its name.
    """

    def __init__(
        self,
        *names: str,
        metavar: str | None = None,
        default: str = "",
        choices: tuple[str, ...] = (),
        variable: str = "",
    ) -> None:
        self.names = names
        self.metavar = metavar
        self.default = default
        self.choices = choices
        self.variable = variable


class Ignored:
    """The annotation of a field, or a section, that is checked and then ignored."""


IGNORED: Final = Ignored()

#: These fields identify the document and are no settings.
_KINDS = ("kind", "api_version")


class Option(msgspec.Struct, frozen=True):
    """One setting: a leaf of a configuration's struct."""

    #: The names in the file, joined: ``conntrack.maxPerCore``.
    path: str
    #: The annotated type.
    type: Any
    value: Any
    flag: Flag | None
    text: str
    is_ignored: bool


def options_of(document: msgspec.Struct, path: str = "", *, is_ignored: bool = False) -> Iterator[Option]:
    """The settings of a document and their values, sections resolved, in the order of the struct."""
    for field in fields_of(type(document)).values():
        if field.name in _KINDS:
            continue
        here, value = join(path, field.encode_name), getattr(document, field.name)
        metadata = getattr(field.type, "__metadata__", ())
        ignored = is_ignored or IGNORED in metadata
        if isinstance(value, msgspec.Struct):
            yield from options_of(value, here, is_ignored=ignored)
            continue
        yield Option(
            here,
            field.type,
            value,
            next((each for each in metadata if isinstance(each, Flag)), None),
            next((each.description for each in metadata if getattr(each, "description", None)), ""),
            ignored,
        )


def bounds(kind: Any) -> tuple[Any, Any]:
    """The least and the greatest value of a number's type; None where there is none."""
    for each in typing.get_args(kind):
        if isinstance(each, msgspec.Meta) and (each.ge is not None or each.le is not None):
            return each.ge, each.le
        if typing.get_args(each) and (found := bounds(each)) != (None, None):
            return found
    return None, None


def described(option: Option) -> str:
    """The text with the meaning of an absent value, for the schema and the docs."""
    if option.flag is None or not option.flag.default:
        return option.text
    absent = "null" if option.value is None else "Empty"
    return f"{option.text} {absent}: {option.flag.default}."
