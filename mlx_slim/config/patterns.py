"""Regular expressions of users: Python's syntax and meaning, bounded in time and memory.

Invariant: a pattern means what Python's ``re`` makes of it (tested over the shipped tasks and the
harness's filters), but the search runs in the ``regex`` package, whose timeout also works in a
worker thread. Length, repetition and the product of pattern and text are bounded before a search,
for what the timeout does not reach. Try it: ``mlx-slim tasks gsm8k``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import regex

from mlx_slim.errors import SlimError

SECONDS = 1.0  # CPU time of one search
_LONGEST = 4_000  # characters of a pattern
_MOST_SETS = 100  # ``re`` takes 5 ms for a wide one
_MOST_COPIES = 20_000  # atoms once every {n} is written out: ``regex`` does write it out
_MOST_WORK = 1 << 27  # characters of the pattern times those of the text: a second of comparing
# The escapes whose characters differ between the two packages, as sets of ``regex``.
_SETS = {"w": r"\p{L}\p{N}_", "s": r"\s\x1c-\x1f", "d": r"\p{Nd}"}
_WORD = f"[{_SETS['w']}]"
_BORDER = f"(?:(?<={_WORD})(?!{_WORD})|(?<!{_WORD})(?={_WORD}))"
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


class Pattern:
    """A compiled regular expression.

    Args:
        source: In Python's syntax.

    Raises:
        ValueError: If it is not a valid regular expression, or too large.
    """

    def __init__(self, source: str) -> None:
        if len(source) > _LONGEST:
            raise ValueError(
                f"the pattern has {len(source)} characters, expected at most {_LONGEST}"
            )
        if source.count("[") > _MOST_SETS:
            raise ValueError(f"{_short(source)} has more than {_MOST_SETS} sets [...]")
        try:
            flags = re.compile(source).flags
            self._compiled = regex.compile(_Translation(source, flags).text, regex.V0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise ValueError(
                f"{_short(source)} is not a valid regular expression: {reason}"
            ) from error
        self.source = source

    def matches(self, text: str) -> list[Any]:
        """Return the matches in ``text``, in order (``re.finditer``).

        Raises:
            SlimError: If the search takes longer than ``SECONDS``.
        """
        return self._bounded(text, lambda: list(self._compiled.finditer(text, timeout=SECONDS)))

    def fullmatch(self, text: str) -> bool:
        """Return whether the whole of ``text`` matches (``re.fullmatch``).

        Raises:
            SlimError: If the search takes longer than ``SECONDS``.
        """
        return self._bounded(
            text, lambda: self._compiled.fullmatch(text, timeout=SECONDS) is not None
        )

    def replace(self, text: str, by: str | Callable[[Any], str]) -> str:
        """Return ``text`` with every match replaced (``re.sub``).

        Raises:
            SlimError: If the search takes longer than ``SECONDS``.
        """
        return self._bounded(text, lambda: self._compiled.sub(by, text, timeout=SECONDS))

    def _bounded(self, text: str, search: Callable[[], Any]) -> Any:
        if len(text) * len(self.source) > _MOST_WORK:
            raise SlimError(
                f"the pattern {_short(self.source)} has {len(self.source)} characters, the text "
                f"{len(text)}: too many to search",
                "shorten the pattern",
            )
        try:
            return search()
        except TimeoutError as error:
            raise SlimError(
                f"the pattern {_short(self.source)} takes more than {SECONDS:g} s on a text of "
                f"{len(text)} characters",
                "avoid repetitions inside repetitions, as in (a+)+",
            ) from error


@lru_cache(maxsize=256)
def compile_pattern(source: str) -> Pattern:
    """Return the pattern, compiled once.

    Raises:
        ValueError: If ``source`` is not a valid regular expression, or too large.
    """
    return Pattern(source)


def _short(source: str) -> str:
    return repr(source if len(source) <= 60 else f"{source[:59]}…")


class _Translation:
    """A pattern of ``re`` as one of ``regex`` that matches the same, its size counted.

    ``re`` has accepted the pattern, so brackets close and escapes are whole. What ``regex`` reads
    differently is rewritten: a brace that is no repetition (``regex`` has fuzzy matches there), a
    bracket inside a set (POSIX classes), and word and space characters and their borders.
    """

    def __init__(self, source: str, flags: int) -> None:
        self.source, self.at = source, 0
        self.ascii, self.verbose = bool(flags & re.ASCII), bool(flags & re.VERBOSE)
        self.sizes, self.last = [0], 0  # atoms of each open group, and of the last atom
        pieces: list[str] = []
        while self.at < len(source):
            pieces.append(self._next())
        self.text = "".join(pieces)

    def _next(self) -> str:
        source, start = self.source, self.at
        character = source[start]
        self.at += 1
        if character == "\\":
            return self._atom(self._escape())
        if character == "[":
            return self._atom(self._set())
        if self.verbose and character == "#":
            end = source.find("\n", start)
            self.at = len(source) if end < 0 else end
            return ""
        if source.startswith("(?#", start):
            self.at = source.index(")", start) + 1
            return ""
        if character == "(":
            self.sizes.append(0)
            return character
        if character == ")":
            inner = self.sizes.pop()
            self._count(inner)
            return character
        if character == "{":
            repeat = _REPEAT.match(source, start)
            if repeat is None or repeat[0] == "{}":
                return self._atom(r"\{")
            self._repeat(int(repeat[1] or 0))
            self.at = repeat.end()
            return repeat[0]
        return self._atom(character)

    def _atom(self, text: str) -> str:
        self._count(1)
        return text

    def _count(self, size: int) -> None:
        self.last = size
        self.sizes[-1] += size
        if self.sizes[-1] > _MOST_COPIES:
            raise ValueError(f"{_short(self.source)} repeats groups more than {_MOST_COPIES} times")

    def _repeat(self, least: int) -> None:
        self._count(self.last * max(least - 1, 0))

    def _escape(self) -> str:
        character = self.source[self.at]
        self.at += 1
        if character == "N":
            end = self.source.index("}", self.at) + 1
            name, self.at = self.source[self.at : end], end
            return f"\\N{name}"
        if self.ascii:
            return f"\\{character}"
        if character.lower() in _SETS:
            return f"[{'^' if character.isupper() else ''}{_SETS[character.lower()]}]"
        if character == "b":
            return _BORDER
        return f"(?!{_BORDER})" if character == "B" else f"\\{character}"

    def _set(self) -> str:
        """A set: what it holds, and the complements among that as sets of their own."""
        source = self.source
        negated = source.startswith("^", self.at)
        self.at += negated
        inside, outside, first = "", [], True
        while first or source[self.at] != "]":
            character, first = source[self.at], False
            self.at += 1
            if character == "\\":
                character = source[self.at]
                self.at += 1
                if character == "N":
                    end = source.index("}", self.at) + 1
                    inside, self.at = f"{inside}\\N{source[self.at : end]}", end
                elif self.ascii or character.lower() not in _SETS:
                    inside += f"\\{character}"
                elif character.islower():
                    inside += _SETS[character]
                else:
                    outside.append(_SETS[character.lower()])
            else:
                inside += f"\\{character}" if character in "[]&~|" else character
        self.at += 1
        if not outside:
            return f"[{'^' if negated else ''}{inside}]"
        if negated:  # none of ``inside``, and in each of the sets
            none = f"(?![{inside}])" if inside else ""
            return f"(?:{none}{''.join(f'(?=[{one}])' for one in outside)}(?s:.))"
        sets = [f"[{inside}]"] if inside else []
        return f"(?:{'|'.join([*sets, *(f'[^{one}]' for one in outside)])})"
