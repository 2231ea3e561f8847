"""Renders ``deploy/chart`` without helm.

The chart is written in a small part of the template language; this reader knows that part, and nothing more:
any other function, an undefined value or a piece of syntax that is not listed here is an error, not a guess.

- ``{{ … }}``, ``{{- … -}}`` (white space beside it goes), ``{{- /* a comment */ -}}``
- ``if``, ``with``, ``else``, ``end``; nothing, false, zero, "" and empty collections are false
- a value: ``.Values.a.b``, ``.Chart.AppVersion``, ``.Release.Namespace``, ``.`` in ``with``, ``$.…`` from
  the top
- pipelines of ``toYaml``, ``nindent N``, ``quote``, ``default X``, ``not``, ``index M K``, ``include N .``,
  ``regexFind R``, ``trimPrefix P``, ``trimAll C``; the first may have its arguments beside it
- ``define`` at the top of ``deploy/chart/templates/_helpers.tpl``, for ``include``
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import yaml

from ebpfproxy import yaml_text
from tests.deploy.objects import DEPLOY, Objects, by_name

CHART = DEPLOY / "chart"
_ACTION = re.compile(r"\{\{(-\s)?\s*(/\*.*?\*/|[^{}]*?)\s*(\s-)?\}\}", re.DOTALL)
_WORD = re.compile(r'"[^"\\]*"|[^\s|]+|\|')
_HELPERS = "_helpers.tpl"
_PATH = re.compile(r"\$?(\.[A-Za-z][A-Za-z0-9]*)*\.?")


class TemplateError(Exception):
    """Unsupported syntax or an undefined value."""


class _Text(NamedTuple):
    text: str


class _Value(NamedTuple):
    pipeline: str


class _Block(NamedTuple):
    kind: str
    pipeline: str
    body: list[Any]
    otherwise: list[Any]


def chart_values(values: Mapping[str, Any], namespace: str) -> dict[str, Any]:
    """Returns what templates see: ``values`` merged into those of values.yaml, as helm does."""
    chart = yaml_text.load((CHART / "Chart.yaml").read_text())
    return {
        "Values": _merged(yaml_text.load((CHART / "values.yaml").read_text()), values),
        "Chart": {"AppVersion": chart["appVersion"]},
        "Release": {"Namespace": namespace},
    }


def render_chart(values: Mapping[str, Any] | None = None, namespace: str = "kube-system") -> Objects:
    """Returns all objects by kind and name."""
    top = chart_values(values or {}, namespace)
    found = []
    for path in sorted((CHART / "templates").glob("*.yaml")):
        text = render(path.read_text(), top)
        try:
            found += [each for each in yaml_text.load_all(text) if each is not None]
        except yaml.YAMLError as error:
            raise TemplateError(f"{path.name}: {error}\n{text}") from error
    return by_name(found)


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, Mapping)):
        return above
    return {**below, **{key: _merged(below.get(key), each) for key, each in above.items()}}


def render(text: str, top: Mapping[str, Any]) -> str:
    """Raises TemplateError."""
    nodes, rest = _parse(_split(text), 0)
    if rest:
        raise TemplateError("unexpected end or else")
    return _output(nodes, top, top)


def _split(text: str) -> list[_Text | _Value]:
    found: list[_Text | _Value] = []
    at, trim = 0, False
    for match in _ACTION.finditer(text):
        before = text[at : match.start()]
        if "{{" in before:
            raise TemplateError(f"braces in {before!r}")
        before = before.lstrip() if trim else before
        found.append(_Text(before.rstrip() if match[1] else before))
        if not match[2].startswith("/*"):
            found.append(_Value(match[2]))
        at, trim = match.end(), match[3] is not None
    last = text[at:]
    if "{{" in last:
        raise TemplateError(f"braces in {last!r}")
    found.append(_Text(last.lstrip() if trim else last))
    return found


def _parse(parts: list[_Text | _Value], depth: int) -> tuple[list[Any], str]:
    """Consumes parts up to an ``end`` or ``else`` that closes the block, which is returned."""
    nodes: list[Any] = []
    while parts:
        part = parts.pop(0)
        if isinstance(part, _Text):
            nodes.append(part)
            continue
        word, _, rest = part.pipeline.partition(" ")
        if word in ("end", "else"):
            if rest or not depth:
                raise TemplateError(f"{part.pipeline!r}")
            return nodes, word
        if word in ("if", "with", "define"):
            body, closing = _parse(parts, depth + 1)
            otherwise: list[Any] = []
            if closing == "else" and word != "define":
                otherwise, closing = _parse(parts, depth + 1)
            if closing != "end":
                raise TemplateError(f"{part.pipeline!r} has no end")
            nodes.append(_Block(word, rest, body, otherwise))
        else:
            nodes.append(part)
    return nodes, ""


def _output(nodes: list[Any], dot: Any, top: Mapping[str, Any]) -> str:
    found = []
    for node in nodes:
        if isinstance(node, _Text):
            found.append(node.text)
        elif isinstance(node, _Value):
            found.append(_shown(_evaluate(node.pipeline, dot, top)))
        elif node.kind == "define":
            raise TemplateError(f"define {node.pipeline} outside of {_HELPERS}")
        else:
            value = _evaluate(node.pipeline, dot, top)
            inner = value if node.kind == "with" else dot
            found.append(_output(node.body, inner, top) if value else _output(node.otherwise, dot, top))
    return "".join(found)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    raise TemplateError(f"{value!r} is not a string")


def _evaluate(pipeline: str, dot: Any, top: Mapping[str, Any]) -> Any:
    commands: list[list[str]] = [[]]
    for word in _WORD.findall(pipeline):
        if word == "|":
            commands.append([])
        else:
            commands[-1].append(word)
    value: Any = None
    for i, command in enumerate(commands):
        if not command:
            raise TemplateError(f"{pipeline!r}: an empty command")
        name, *words = command
        if i == 0 and len(command) == 1:
            value = _operand(name, dot, top)
        else:
            arguments = [_operand(word, dot, top) for word in words]
            value = _call(name, arguments if i == 0 else [*arguments, value], top)
    return value


def _operand(word: str, dot: Any, top: Mapping[str, Any]) -> Any:
    if word.startswith('"'):
        return word[1:-1]
    if word.isdigit():
        return int(word)
    if not word or not _PATH.fullmatch(word):
        raise TemplateError(f"{word!r} is not a value")
    value = top if word.startswith("$") else dot
    for part in filter(None, word.lstrip("$").split(".")):
        if not isinstance(value, Mapping) or part not in value:
            raise TemplateError(f"{word} is not defined")
        value = value[part]
    return value


@cache
def _defined() -> Mapping[str, list[Any]]:
    """Returns the templates of ``deploy/chart/templates/_helpers.tpl`` by name."""
    nodes, _ = _parse(_split((CHART / "templates" / _HELPERS).read_text()), 0)
    return {_operand(each.pipeline, None, {}): each.body for each in nodes if isinstance(each, _Block)}


def _call(name: str, arguments: list[Any], top: Mapping[str, Any]) -> Any:
    match name, arguments:
        case "include", [str(defined), dot] if defined in (helpers := _defined()):
            return _output(helpers[defined], dot, top)
        case "index", [Mapping() as value, str(key)]:
            return value.get(key)
        case "regexFind", [str(expression), str(value)]:
            found = re.search(expression, value)
            return found[0] if found is not None else ""
        case "trimPrefix", [str(prefix), str(value)]:
            return value.removeprefix(prefix)
        case "trimAll", [str(characters), str(value)]:
            return value.strip(characters)
        case "toYaml", [value]:
            return yaml.safe_dump(value, default_flow_style=False).removesuffix("\n").removesuffix("\n...")
        case "nindent", [int(width), str(text)]:
            return "\n" + "\n".join(" " * width + line for line in text.split("\n"))
        case "quote", [str() | int() as value]:
            return json.dumps(_shown(value))
        case "default", [otherwise, value]:
            return value or otherwise
        case "not", [value]:
            return not value
    raise TemplateError(f"{name} with {arguments!r}")
