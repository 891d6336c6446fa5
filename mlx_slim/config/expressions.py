"""Jinja templates of task files: sandboxed, strict about names, compiled once.

Invariant: a template reads the fields of one row and nothing else; a name that the row does not
have is an error, never an empty text; a template cannot change the row or reach Python. Try it:
``mlx-slim tasks hellaswag`` shows templates and what they give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

Row = Mapping[str, Any]


def _regex_replace(text: Any, pattern: str, replacement: str = "") -> str:
    """Replace every match of a regular expression."""
    return re.sub(pattern, replacement, str(text))


def _place_in(answer: Any, labels: Sequence[Any]) -> int:
    """Return the place of an answer among its labels; "2" is "B" where labels are letters."""
    wanted, known = str(answer).strip(), [str(label).strip() for label in labels]
    if wanted not in known:
        if wanted.isdecimal() and 0 < int(wanted) <= 26:
            wanted = chr(ord("A") + int(wanted) - 1)
        elif len(wanted) == 1 and "A" <= wanted <= "Z":
            wanted = str(ord(wanted) - ord("A") + 1)
    if wanted not in known:
        raise ValueError(f"the answer {answer!r} is none of the labels {', '.join(known)}")
    return known.index(wanted)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["regex_replace"] = _regex_replace
    environment.filters["place_in"] = _place_in
    return environment


def compile_text(source: str) -> Callable[[Row], str]:
    """Return the template as a function: row -> text.

    Raises:
        ValueError: If ``source`` is no Jinja template.
    """
    if not any(mark in source for mark in ("{{", "{%", "{#")):
        return lambda _: source
    try:
        return _environment().from_string(source).render
    except TemplateSyntaxError as error:
        raise ValueError(f"no Jinja template: {error.message}") from error


def compile_value(source: str) -> Callable[[Row], Any]:
    """Return the template as a function: row -> value.

    One ``{{ expression }}`` gives its value (a list, a number); anything else gives text.

    Raises:
        ValueError: If ``source`` is no Jinja template.
    """
    text = source.strip()
    try:
        body = _environment().parse(text).body
    except TemplateSyntaxError as error:
        raise ValueError(f"no Jinja template: {error.message}") from error
    alone = len(body) == 1 and isinstance(body[0], nodes.Output) and len(body[0].nodes) == 1
    if not alone or not text.startswith("{{"):
        return compile_text(source)
    inner = re.sub(r"^\{\{[-+]?|-?\}\}$", "", text)  # a minus apart from the braces is a sign
    expression = _environment().compile_expression(inner, undefined_to_none=False)

    def value(row: Row) -> Any:
        result = expression(row)
        if isinstance(result, Undefined):
            str(result)  # raises, naming what is missing
        return result

    return value


def names_in(source: str) -> set[str]:
    """Return the names of the row's fields that a template reads.

    Raises:
        ValueError: If ``source`` is no Jinja template.
    """
    try:
        return meta.find_undeclared_variables(_environment().parse(source))
    except TemplateSyntaxError as error:
        raise ValueError(f"no Jinja template: {error.message}") from error
