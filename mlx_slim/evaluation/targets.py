"""A row's choices and its right answers, read in one way for all tasks.

Invariant: every choice has a visible character; the right answer is unambiguous, or the row is
refused. Of a list of right answers any counts, as in lm-evaluation-harness 0.4 (there:
``multiple_target``), and the first is the answer of a solved example. Try it:
``mlx-slim tasks mine.yaml``.

    multiple choice   an integer is a place among the choices, from 0; a text is a choice
                      digits ("2") are a place where no choice is a number; beside choices that are
                      numbers they are refused, unless text and place name the same choice
    generation        a text or a number

The harness reads digits as a place if a template gives them and as a text if a bare field does: one
row can mean two answers, so such a row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"\s*[-+]?[\d.,]*\d\s*")


def read_choices(values: Sequence[Any]) -> list[str]:
    """Return the choices of a row as texts.

    Raises:
        ValueError: If one is empty (white space and characters that print nothing count as empty),
            or neither a text nor a number.
    """
    choices = []
    for number, value in enumerate(values, 1):
        which = f"choice {number} of {len(values)}"
        if not isinstance(value, (str, int, float)):
            raise ValueError(f"{which} is {value!r:.60}: expected a text or a number")
        text = str(value)
        if not any(character.isprintable() and not character.isspace() for character in text):
            raise ValueError(f"{which} is empty ({text!r:.60}): every choice needs some text")
        choices.append(text)
    return choices


def right_places(value: Any, choices: Sequence[str]) -> tuple[int, ...]:
    """Return the places of the right choices, each once.

    Args:
        value: The target: a choice's text or place, or a list of them.
        choices: From ``read_choices``.

    Raises:
        ValueError: If one is no choice or could mean two, or the list is empty.
    """
    return tuple(dict.fromkeys(_place(one, choices) for one in _several(value)))


def _place(value: Any, choices: Sequence[str]) -> int:
    if isinstance(value, str):
        place = {str(number): number for number in range(len(choices))}.get(value)
        text = choices.index(value) if value in choices else None
        digits = value.isascii() and value.isdecimal()
        if digits and place != text and any(map(_NUMBER.fullmatch, choices)):
            raise ValueError(
                f"the target {value!r:.60} is ambiguous: the choices {', '.join(choices):.60} are "
                "numbers, so it may be one of them or a place; write place_in for the choice "
                "({{ answer | place_in(choices) }}), int for the place ({{ answer | int }})"
            )
        if (index := place if text is None else text) is not None:
            return index
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise ValueError(
        f"the target is {value!r:.60}: expected a choice, or its place from 0 to "
        f"{len(choices) - 1}, or a list of them"
    )


def right_texts(value: Any, *, as_json: bool = False) -> tuple[str, ...]:
    """Return the right texts of a generated answer, each once.

    Args:
        value: The target: a text or a number, or a list of them.
        as_json: Answers are compared as JSON: a list of anything but texts is more likely a value.

    Raises:
        ValueError: If it is, or holds, anything else, or the list is empty.
    """
    listed = as_json and isinstance(value, list | tuple)
    for one in _several(value):
        if not isinstance(one, str if listed else (str, int, float)):
            raise ValueError(
                f"the target is {value!r:.60}: expected a text, or a list of texts (a value is "
                "written as JSON with {{ field | tojson }})"
            )
    return tuple(dict.fromkeys(map(str, _several(value))))


def _several(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        return [value]
    if not value:
        raise ValueError("the target is an empty list: expected at least one right answer")
    return value
