"""Errors that a user can act on.

Invariant: every failure that the user's input or machine can cause leaves the program as a
``SlimError``: one line that says the value seen, the value expected and what to do. The command
line prints it without a traceback and exits with ``exit_code``; anything else is our bug
(``cli/crash.py``). Try it: ``mlx-slim train no-such-recipe -o /tmp/run``.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # as C++ looks for them
_LONGEST = 2000  # characters of a message
_SECRETS = re.compile(
    r"\b(?:hf|sk|gh[opsu]|github_pat)[_-][\w-]{8,}|(?i:bearer)\s+\S+|(?<=://)[^/\s@]+(?=@)"
)
_SECRET_NAMES = re.compile(r"(?i)token|key|secret|passw|credential")


def without_secrets(text: str) -> str:
    """Return ``text`` without tokens: those of known forms, and the environment's own."""
    values = (v for name, v in os.environ.items() if len(v) >= 6 and _SECRET_NAMES.search(name))
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "(secret)")
    return _SECRETS.sub("(secret)", text)


def printable(text: str) -> str:
    r"""Return ``text`` with what a terminal would obey, or not show, as escapes: ``\x1b``.

    File names and values of others may hold line feeds, cursor movements, reversed text.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class SlimError(Exception):
    """The user's input cannot be used: nothing was written.

    Args:
        message: One line: the value seen and the value expected.
        hint: What to do about it, one line; empty when the message already says it.
        details: All that is wrong, one line each, where ``message`` counts several problems.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "", details: Iterable[str] = ()) -> None:
        message = _bounded(message)
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = list(details)

    def __str__(self) -> str:
        """Return message and hint in one line, then the details."""
        first = f"{self.message} ({self.hint})" if self.hint else self.message
        return "\n  ".join([first, *self.details])


class TimeLimitError(SlimError):
    """The time that was given is too short for anything useful: raised before anything starts."""


class DivergedError(SlimError):
    """Training met a loss or a gradient that is not finite; nothing was updated with it."""


class ResourceError(SlimError):
    """Not enough memory or disk: raised before anything starts."""

    exit_code = 3


def disk_full(number: int | None, place: str = "", hint: str = "") -> ResourceError | None:
    """Return the refusal of a file that has no room; None for an error of another kind.

    Args:
        number: ``errno`` of the error.
        place: What was written: `` while writing FILE``.
        hint: What else holds, after the advice.
    """
    advice = "free some space"
    if number == errno.EFBIG:
        limit = file_size_limit()
        text = "the file system takes no larger file"
        if limit is not None:
            text = f"a file may have at most {limit:,} bytes in this shell"
        advice = "raise it with ulimit -f" if limit is not None else "choose another disk"
    elif number in (errno.ENOSPC, errno.EDQUOT):
        text = "the disk is full" if number == errno.ENOSPC else "the quota of the disk is used up"
    else:
        return None
    return ResourceError(f"{text}{place}", f"{advice}; {hint}" if hint else advice)


def refuse_full_disk(error: OSError, place: str, hint: str) -> None:
    """Raise what ``disk_full`` says of an error, if it is one of its kind.

    A variable that held the refusal would form a circle with its traceback, and what the frames
    have open would stay open until the garbage collector comes.

    Raises:
        ResourceError: The disk is full, or the file may not be as large.
    """
    refusal = disk_full(error.errno, place, hint)
    if refusal is None:
        return
    try:
        raise refusal from error
    finally:
        del refusal


def file_size_limit() -> int | None:
    """Return the most bytes that this process may write to a file (``ulimit -f``), if limited."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


class Interrupted(SlimError):
    """The user stopped the run; its state is saved and ``hint`` is the command that resumes it."""

    exit_code = 130


class Complete(SlimError):
    """The output is there already, made by the same command from the same inputs: nothing to do.

    Args:
        message: One line.
        path: The output.
    """

    exit_code = 0

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


def _bounded(text: str) -> str:
    """Return a message that can be read: a name of 5,000 characters is none."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 4 :]}"


def check_working_folder() -> None:
    """Refuse a working folder that is no more.

    Raises:
        SlimError: Relative paths mean nothing there.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise SlimError(
            "the working directory was removed", "change to another directory"
        ) from error


def check_temporary_folder() -> None:
    """Refuse a temporary folder that is none: MLX compiles kernels in it.

    Raises:
        SlimError: Names the variable and what it says.
    """
    name = next((name for name in _TEMPORARY if os.environ.get(name)), None)
    if name and not (Path(os.environ[name]).is_dir() and os.access(os.environ[name], os.W_OK)):
        raise SlimError(
            f"{name} is {os.environ[name]!r}, expected a folder that can be written",
            f"create it, or unset {name}",
        )


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return a hint for a mistyped ``word``: the closest of ``choices``, else all of them."""
    names = list(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(names))}"


@dataclass(frozen=True)
class RowLimit:
    """The longest row that a model computes as it was trained; see ``models/row_limits.py``.

    Attributes:
        tokens: Of the row.
        why: What goes wrong beyond, as a clause.
    """

    tokens: int
    why: str

    def check(self, tokens: int, what: str, hint: str = "") -> None:
        """Refuse a row that is too long.

        Args:
            tokens: Of the row.
            what: Names the row.
            hint: What to do; a default is added.

        Raises:
            SlimError: With the row and the limit.
        """
        if tokens > self.tokens:
            raise SlimError(
                f"{what}: {tokens:,} tokens, and {self.why}",
                hint or f"give it at most {self.tokens:,} tokens",
            )
