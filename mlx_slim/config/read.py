"""YAML in, plain values and line numbers out.

Invariant: the reader depends on no global state (other packages add resolvers to
``yaml.SafeLoader``), knows the scalars of YAML 1.2 (``1e-5`` is a number, ``no`` and ``2024-01-01``
are text), and refuses a key given twice. Try it: ``mlx-slim recipes tinyllama-lora``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mlx_slim.errors import SlimError

Lines = dict[tuple[str, ...], int]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (the parent's own shape)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first)


def parse_scalar(text: str) -> Any:
    """Return the value of an override's right-hand side (``3``, ``1e-4``, ``[a, b]``, text).

    Raises:
        SlimError: If brackets or quotes do not close.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SlimError(f"{text!r} is no YAML value: {_where(error)}") from error


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error).replace("\n", " ")
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _build(
    loader: _Loader, node: yaml.Node, path: tuple[str, ...], lines: Lines, file: Path
) -> Any:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(loader, child, (*path, str(index)), lines, file)
            for index, child in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    result: dict[str, Any] = {}
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise SlimError(f"{file}, line {line}: a key must be a plain word")
        key = str(key_node.value)
        if key in result:
            first = lines[(*path, key)]
            raise SlimError(
                f"{file}, line {line}: key {'.'.join((*path, key))} is given twice "
                f"(first on line {first})",
                "keep one of them",
            )
        result[key] = _build(loader, child, (*path, key), lines, file)
        lines[(*path, key)] = line
    return result


def read_mapping(file: Path) -> tuple[dict[str, Any], Lines]:
    """Return the mapping in ``file`` and the line of every key path.

    Raises:
        SlimError: Unreadable, not UTF-8, no YAML (line and column), empty, no mapping, or a key
            given twice.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SlimError(
            f"{file} is not UTF-8 (byte {error.start})", "save it as UTF-8 text"
        ) from error
    except FileNotFoundError as error:
        raise SlimError(f"{file} does not exist", "check the path") from error
    except OSError as error:
        raise SlimError(f"{file} cannot be read: {error.strerror}") from error
    lines: Lines = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else _build(loader, node, (), lines, file)
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        reason = _where(error) if isinstance(error, yaml.YAMLError) else "an alias contains itself"
        raise SlimError(f"{file} is no valid YAML: {reason}") from error
    if value is None:
        raise SlimError(f"{file} is empty", "it should hold `key: value` lines")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise SlimError(
            f"{file} holds {kind}, not `key: value` lines",
            "see mlx-slim recipes NAME, mlx-slim tasks NAME",
        )
    return value, lines
