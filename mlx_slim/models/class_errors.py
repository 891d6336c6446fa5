"""Errors of mlx-lm's model classes: what a class cannot do, in one line.

Invariant: only what a class raises counts as such, or MLX about an operation without a gradient;
our own errors, and memory that runs out, pass as they are. Try it:
``mlx-slim bench models --column full``.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from mlx_slim.errors import SlimError
from mlx_slim.reading import one_line

_NO_GRADIENT = re.compile(r"\bVJP\b|\bvjp\b|no gradient")
_NO_MEMORY = re.compile(r"allocate|insufficient memory|out of memory", re.I)


@contextlib.contextmanager
def class_errors(what: str, hint: str = "a newer mlx-lm may support it") -> Iterator[None]:
    """Turn an error of a model class into one line.

    Args:
        what: What cannot be done with which model type: the message up to the class's own words.
        hint: What to do.

    Raises:
        SlimError: If a class of mlx-lm failed, or has an operation without a gradient.
    """
    try:
        yield
    except SlimError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        inside = any("mlx_lm/models/" in Path(frame.filename).as_posix() for frame in frames)
        if not inside and not _NO_GRADIENT.search(str(error)):
            raise
        raise SlimError(f"{what}: {one_line(error)}", hint) from error
