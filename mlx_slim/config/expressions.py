"""Jinja templates of task files: sandboxed, strict about names, compiled once.

Invariant: a template reads the fields of one row and nothing else; a name that the row does not
have is an error, never an empty text; a template cannot change the row or reach Python. Try it:
``mlx-slim tasks hellaswag`` shows templates and what they give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, meta, nodes
from jinja2.filters import do_tojson

from mlx_slim.config.patterns import compile_pattern
from mlx_slim.config.sandbox import BoundedEnvironment, BoundedTemplate, guarded
from mlx_slim.config.sandbox_budget import budget
from mlx_slim.config.sandbox_calls import bounded, tojson

Row = Mapping[str, Any]


def _regex_replace(text: Any, pattern: str, replacement: str = "") -> str:
    """Replace every match of a regular expression."""

    def one(match: Any) -> str:
        copies = replacement.count("\\") * len(match[0])  # each may be a reference to the match
        budget().reserve(len(replacement) + copies, "a text")
        return budget().count_value(match.expand(replacement))

    return compile_pattern(pattern).replace(str(text), one)


def _place_in(answer: Any, labels: Sequence[Any]) -> int:
    """Return the place of an answer among its labels; "2" is "B" where labels are letters."""
    label, allowed = str(answer).strip(), [str(label).strip() for label in labels]
    if label not in allowed:
        if label.isdecimal() and 0 < int(label) <= 26:
            label = chr(ord("A") + int(label) - 1)
        elif len(label) == 1 and "A" <= label <= "Z":
            label = str(ord(label) - ord("A") + 1)
    if label not in allowed:
        raise ValueError(f"the answer {answer!r} is not one of the labels {', '.join(allowed)}")
    return allowed.index(label)


def _places_of(values: Sequence[Any], value: Any) -> list[int]:
    """Return the places at which a list holds a value."""
    return [place for place, one in enumerate(values) if one == value]


@lru_cache(maxsize=1)
def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = bounded("regex_replace", _regex_replace)
    environment.filters["place_in"] = bounded("place_in", _place_in)
    environment.filters["places_of"] = bounded("places_of", _places_of)
    environment.filters["tojson"] = bounded("tojson", do_tojson)  # as the harness has it
    environment.policies["json.dumps_function"] = partial(tojson, ensure_ascii=True)
    return environment


def compile_text(source: str) -> Callable[[Row], str]:
    """Return the template as a function: row -> text.

    Raises:
        ValueError: If ``source`` is not a Jinja template.
    """
    if not any(mark in source for mark in ("{{", "{%", "{#")):
        return lambda _: source
    try:
        return BoundedTemplate(_environment(), source).render
    except TemplateError as error:
        raise ValueError(f"not a Jinja template: {error.message}") from error


def compile_value(source: str) -> Callable[[Row], Any]:
    """Return the template as a function: row -> value.

    One ``{{ expression }}`` gives its value (a list, a number); anything else gives text.

    Raises:
        ValueError: If ``source`` is not a Jinja template.
    """
    text = source.strip()
    try:
        body = _parsed(text).body
    except TemplateError as error:
        raise ValueError(f"not a Jinja template: {error.message}") from error
    alone = len(body) == 1 and isinstance(body[0], nodes.Output) and len(body[0].nodes) == 1
    if not alone or not text.startswith("{{"):
        return compile_text(source)
    inner = re.sub(r"^\{\{[-+]?|-?\}\}$", "", text)  # a minus apart from the braces is a sign
    compiled = partial(_environment().compile_expression, inner, undefined_to_none=False)
    try:
        expression = guarded(compiled, inner)
    except TemplateError as error:  # a filter that does not exist
        raise ValueError(f"not a Jinja template: {error.message}") from error

    def value(row: Row) -> Any:
        def run() -> Any:
            result = expression(row)
            if isinstance(result, Undefined):
                str(result)  # raises, naming what is missing
            # A generator would run outside of its bounds.
            return list(result) if isinstance(result, Iterator) else result

        return guarded(run, "", row.values())

    return value


def names_in(source: str) -> set[str]:
    """Return the names of the row's fields that a template reads.

    Raises:
        ValueError: If ``source`` is not a Jinja template.
    """
    try:
        return meta.find_undeclared_variables(_parsed(source))
    except TemplateError as error:
        raise ValueError(f"not a Jinja template: {error.message}") from error


def _parsed(source: str) -> nodes.Template:
    return guarded(lambda: _environment().parse(source), source)
