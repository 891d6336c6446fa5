"""Unexpected errors: one line for the user, and the traceback in a file for a bug report.

Invariant: the file holds no token and no argument of the command, and an error here does not hide
the original one. Used by ``cli/main.py``; ``MLX_SLIM_DEBUG=1`` shows the traceback instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_slim.artifacts import provenance
from mlx_slim.errors import (
    ResourceError,
    SlimError,
    check_working_folder,
    disk_full,
    without_secrets,
)
from mlx_slim.reading import no_such_name

_OUTPUTS = ("-o", "--out", "--output")
# MLX on a CPU, on Metal, on CUDA.
_NO_MEMORY = re.compile(
    r"unable to allocate|insufficient memory|out of memory|\[metal::malloc\]", re.I
)


def explained(error: BaseException, words: Sequence[str]) -> SlimError:
    """Return the error as one line: a resource error if it is one, else an internal error.

    Args:
        error: The exception that left the command.
        words: The command line.
    """
    if isinstance(error, OSError) and (refusal := no_such_name(error)):
        return refusal
    reason = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
    if isinstance(error, OSError):
        place = f" while writing {error.filename}" if error.filename else ""
        if full := disk_full(error.errno, place):
            return full
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    ):
        hint = "close other programs; mlx-slim plan RECIPE says what a run needs and what fits"
        return ResourceError(f"not enough memory: {reason}", hint)
    try:
        check_working_folder()
    except SlimError as gone:
        return gone
    file = _write(error, words)
    hint = "MLX_SLIM_DEBUG=1 prints the traceback, which could not be written to a file"
    return InternalError(
        f"internal error: {reason}",
        f"please report it, with the traceback in {file}" if file else f"please report it; {hint}",
    )


class InternalError(SlimError):
    """A bug of mlx-slim."""

    exit_code = 1


def _write(error: BaseException, words: Sequence[str]) -> Path | None:
    """Write the traceback beside the output, or to the temporary folder; None if neither works."""
    lines = [f"{key}: {value}" for key, value in provenance().items()]
    lines += ["", *traceback.format_exception(type(error), error, error.__traceback__)]
    for folder, name in _places(words):
        with contextlib.suppress(OSError, ValueError):
            descriptor, file = tempfile.mkstemp(".txt", f"{name}.error-", folder)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as handle:
                    handle.write(without_secrets("\n".join(map(str.rstrip, lines))) + "\n")
            except OSError:  # incomplete
                Path(file).unlink(missing_ok=True)
                raise
            return Path(file)
    return None


def _places(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (folder, beginning of a name): beside the output, if one is given, then temporary."""
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        value = value if equals else "".join(words[index + 1 : index + 2])
        if option in _OUTPUTS and value:
            out = Path(value)
            if out.name and out.parent.is_dir():
                yield str(out.parent), out.name
    with contextlib.suppress(OSError):  # there is none
        yield tempfile.gettempdir(), "mlx-slim"
