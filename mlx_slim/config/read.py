"""YAML in, plain values and line numbers out.

Invariant: the reader depends on no global state (other packages add resolvers to
``yaml.SafeLoader``), knows the scalars of YAML 1.2 (``1e-5`` is a number, ``no`` and ``2024-01-01``
are text), refuses a key given twice and tags that mean another type, and is bounded: in events, in
depth, and in values, those behind an alias counted each time. Try it: ``mlx-slim recipes
tinyllama-lora``.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import Resolver
from yaml.scanner import Scanner

from mlx_slim.errors import SlimError
from mlx_slim.reading import MAX_DEPTH, MAX_DIGITS, JsonObject, read_bytes, short, shown

Lines = dict[tuple[str, ...], int]
_MAX_BYTES = 1 << 20  # of a file; a shipped one has 4,000
_MAX_EVENTS = 20_000  # of a file: a value, a key, the beginning or end of a list or mapping
_MAX_VALUES = 20_000
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}


class _Loader(Composer, SafeConstructor, Resolver):
    """Nodes of a parser's events: libyaml's, or PyYAML's own, which takes ten times as long."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (the parent's own shape)
    _events = 0

    def get_event(self) -> Any:
        """Return the next event, if the text has not had its share of them."""
        self._events += 1
        if self._events > _MAX_EVENTS:
            raise yaml.YAMLError(f"more than {_MAX_EVENTS:,} values and marks")
        return super().get_event()  # pyright: ignore (of the parser)


class _PlainLoader(_Loader, Reader, Scanner, Parser):
    def __init__(self, text: str) -> None:
        for base in (Reader, Scanner, Parser, Composer, SafeConstructor, Resolver):
            base.__init__(self, *([text] if base is Reader else []))


if yaml.__with_libyaml__:
    from yaml.cyaml import CParser  # pyright: ignore

    class _FastLoader(_Loader, CParser):
        def __init__(self, text: str) -> None:
            CParser.__init__(self, text)
            for base in (Composer, SafeConstructor, Resolver):
                base.__init__(self)


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
        SlimError: If brackets or quotes do not close, or it is too large or too deep.
    """
    try:
        return _parse(text, {}, "")
    except yaml.YAMLError as error:
        raise SlimError(f"{shown(text)} is not a YAML value: {_where(error)}") from error


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error).replace("\n", " ")
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _parse(text: str, lines: Lines, where: str) -> Any:
    """Return the value of a text and the line of every key path in it.

    Raises:
        yaml.YAMLError: If it is none; ``_where`` says why.
        SlimError: A key given twice, or no plain word.
    """
    try:
        loader, node = _composed(text)
        return None if node is None else _Builder(loader, lines, where).build(node, ())
    except RecursionError as error:
        raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels") from error


def _composed(text: str) -> tuple[_Loader, yaml.Node | None]:
    """Return the node of a text; control characters are refused."""
    if yaml.__with_libyaml__:
        # What it refuses, the other one refuses with the words that it saw.
        with contextlib.suppress(yaml.MarkedYAMLError, ReaderError, UnicodeEncodeError):
            fast = _FastLoader(text)
            return fast, fast.get_single_node()
    plain = _PlainLoader(text)
    return plain, plain.get_single_node()


class _Builder:
    """Makes plain values of YAML's nodes, and counts them."""

    def __init__(self, loader: _Loader, lines: Lines, where: str) -> None:
        self._loader, self._lines, self._where = loader, lines, where
        self._values = 0

    def build(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        """Return the value of ``node``; what stands behind an alias is made again each time."""
        self._values += 1
        if self._values > _MAX_VALUES:
            raise yaml.YAMLError(f"more than {_MAX_VALUES} values, those behind aliases included")
        if len(path) > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels, or an alias of itself")
        self._lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, "tag:yaml.org,2002:seq")
            return [
                self.build(child, (*path, str(index))) for index, child in enumerate(node.value)
            ]
        if isinstance(node, yaml.MappingNode):
            self._check_tag(node, "tag:yaml.org,2002:map")
            return self._mapping(node, path)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> JsonObject:
        result: JsonObject = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            place = f"{self._where}line {line}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise SlimError(f"{place}: a key must be a plain word")
            key = str(key_node.value)
            if key in result:
                raise SlimError(
                    f"{place}: key {shown('.'.join((*path, key)))[1:-1]} is given twice "
                    f"(first on line {self._lines[(*path, key)]})",
                    "keep one of them",
                )
            result[key] = self.build(child, (*path, key))
            self._lines[(*path, key)] = line
        return result

    def _scalar(self, node: yaml.Node) -> Any:
        self._check_tag(node, *_PLAIN)
        try:
            value = self._loader.construct_object(node)
        except (ValueError, OverflowError, LookupError) as error:  # "!!int x", "!!bool x"
            self._fail(
                node, f"{shown(node.value)} is not of type {node.tag.rsplit(':', 1)[-1]}", error
            )
        if isinstance(value, int) and value.bit_length() > 4 * MAX_DIGITS:
            self._fail(node, f"an integer of more than {MAX_DIGITS} digits")
        return value

    def _check_tag(self, node: yaml.Node, *tags: str) -> None:
        if node.tag not in tags:
            self._fail(node, f"the tag {shown(node.tag)} is not read here")

    def _fail(self, node: yaml.Node, problem: str, cause: Exception | None = None) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from cause


def read_mapping(file: Path) -> tuple[JsonObject, Lines]:
    """Return the mapping in ``file`` and the line of every key path.

    Raises:
        SlimError: Unreadable, not UTF-8, no YAML (line and column), empty, no mapping, or a key
            given twice.
    """
    where = short(file)
    try:
        text = read_bytes(file, _MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SlimError(
            f"{where} is not UTF-8 (byte {error.start})", "save it as UTF-8 text"
        ) from error
    lines: Lines = {}
    try:
        value = _parse(text, lines, f"{where}, ")
    except yaml.YAMLError as error:
        raise SlimError(f"{where} is not valid YAML: {_where(error)}") from error
    if value is None:
        raise SlimError(f"{where} is empty", "it should hold `key: value` lines")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise SlimError(
            f"{where} holds {kind}, not `key: value` lines",
            "see mlx-slim recipes NAME, mlx-slim tasks NAME",
        )
    return value, lines
