"""Converts a file's text to structs, strictly, and with every problem: msgspec alone stops at the first."""

from __future__ import annotations

import enum
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
import yaml
from msgspec.structs import FieldInfo

from ebpfproxy import yaml_text
from ebpfproxy.config.durations import Duration, parse_duration


class Problem(NamedTuple):
    """One error. ``where``: a file, with the document if it has several, or a flag."""

    where: str
    path: str
    text: str

    def __str__(self) -> str:
        """One line, whatever characters a key in the file has."""
        said = ": ".join(part for part in self if part)
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in said)


class ConfigurationError(Exception):
    """An invalid configuration: ``problems``, each a line of the message."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class Quantity(str):
    """A quantity of the API (``512``, ``4Ki``) as it was written, which may be a number."""

    __slots__ = ()


class FlushFrequency(Duration):
    """A duration that may also be a whole number of nanoseconds (component-base, TimeOrMetaDuration)."""

    __slots__ = ()


def _convert_custom(value: object, kind: type[Duration] | type[Quantity]) -> Duration | Quantity:
    """The types that msgspec does not know. Raises ValueError."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if issubclass(kind, Quantity):
        if not is_number and not isinstance(value, str):
            raise ValueError(f"{value!r} is not a quantity such as 4Ki")
        return kind(value)
    if is_number and issubclass(kind, FlushFrequency):
        return kind(typing.cast(int, value))
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a duration such as 30s or 1h30m")
    return kind(parse_duration(value).nanoseconds)


def convert(value: object, kind: Any, path: str, problems: list[Problem]) -> Any:
    """Converts ``value`` (plain mappings, sequences, scalars) to ``kind``, and adds errors to ``problems``.

    A null means an absent field, as in Go. An invalid field gets its default, so that others can still be
    checked; the result is valid only if no problem was added.
    """
    struct = _struct_of(kind)
    if struct is not None:
        return _convert_struct(value, struct, path, problems)
    inner = bare(kind)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is tuple and isinstance(value, list):
        items: list[Any] = [
            convert(each, arguments[0], f"{path}[{index}]", problems) for index, each in enumerate(value)
        ]
        # An invalid item keeps its index, so that the paths of the others stay right.
        return tuple("" if each is None and bare(arguments[0]) is str else each for each in items)
    if origin is dict and isinstance(value, dict):
        return {
            str(key): convert(each, arguments[1], join(path, str(key)), problems)
            for key, each in value.items()
        }
    try:
        if isinstance(inner, type) and issubclass(inner, Duration | Quantity):
            return _convert_custom(value, inner)
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problems.append(Problem("", path, _explain(error, value, inner)))
    except ValueError as error:
        problems.append(Problem("", path, str(error)))
    return None


def _explain(error: msgspec.ValidationError, value: object, kind: Any) -> str:
    """msgspec's message, with a short value and with the possible values."""
    shown = repr(value)
    if not isinstance(value, str | int | float) or len(shown) > 80:
        return str(error)
    if isinstance(kind, enum.EnumMeta):
        members = list(typing.cast(type[enum.Enum], kind))
        return f"{shown} is none of {', '.join(str(member.value) for member in members)}"
    if typing.get_origin(kind) is Literal:
        return f"{shown} is none of {', '.join(map(str, typing.get_args(kind)))}"
    return f"{error}: {shown}"


def _convert_struct(
    value: object, struct: type[msgspec.Struct], path: str, problems: list[Problem]
) -> msgspec.Struct:
    if not isinstance(value, dict):
        problems.append(Problem("", path, f"Expected `object`, got `{type(value).__name__}`"))
        return struct()
    fields = fields_of(struct)
    found: dict[str, Any] = {}
    for key, each in value.items():
        field = fields.get(key)
        if field is None:
            problems.append(Problem("", join(path, str(key)), "unknown field"))
        elif each is not None:
            before = len(problems)
            converted = convert(each, field.type, join(path, key), problems)
            # Sections and lists are kept without their invalid parts.
            if len(problems) == before or isinstance(converted, msgspec.Struct | tuple):
                found[field.name] = converted
    return struct(**found)


@functools.cache
def fields_of(struct: type[msgspec.Struct]) -> Mapping[str, FieldInfo]:
    """The fields by their names in a file. msgspec evaluates a struct's annotations whenever it is asked."""
    return {field.encode_name: field for field in msgspec.structs.fields(struct)}


def _struct_of(kind: Any) -> type[msgspec.Struct] | None:
    kind = bare(kind)
    return kind if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None


def bare(kind: Any) -> Any:
    """A field's type without its constraints, and without ``| None``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return bare(arguments[0])
    if origin in (typing.Union, types.UnionType):
        rest = [each for each in arguments if each is not types.NoneType]
        if len(rest) == 1:
            return bare(rest[0])
    return kind


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# -- YAML


class Document(NamedTuple):
    """``number`` counts from 1 in the order of the file, empty documents included; those are left out."""

    number: int
    value: Any
    problems: list[Problem]


def read_documents(text: str | bytes) -> list[Document]:
    """The documents of a YAML or JSON text. A repeated key is a problem of its document.

    Raises ConfigurationError, without a file's name, if the text is not YAML.
    """
    try:
        with yaml_text.failures():
            return list(_documents(text))
    except yaml.YAMLError as error:
        raise ConfigurationError([Problem("", "", _one_line(error))]) from error


def _documents(text: str | bytes) -> Iterator[Document]:
    yaml_text.check_depth(text)
    loader = yaml_text.Loader(text)
    try:
        number = 0
        while loader.check_node():
            node = loader.get_node()
            number += 1
            problems = list(_repeated(node, "", set()))
            value = loader.construct_document(node)
            if value is not None or problems:
                yield Document(number, value, problems)
    finally:
        loader.dispose()


def _repeated(node: Any, path: str, seen: set[int]) -> Iterator[Problem]:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, each in enumerate(node.value):
            yield from _repeated(each, f"{path}[{index}]", seen)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, each in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            where = join(path, name)
            if isinstance(key, yaml.ScalarNode) and (key.tag, name) in keys:
                yield Problem("", where, f"repeated key, again in line {key.start_mark.line + 1}")
            keys.add((key.tag, name))
            yield from _repeated(each, where, seen)


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
