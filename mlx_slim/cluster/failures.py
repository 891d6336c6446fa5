"""Why a job failed, in the file that its coordinator reads (``Job.note``).

Invariant: an interrupt is no failure and leaves no file; what the file says has no secret in it.
Used by ``cli/compare.py`` and ``cli/slim.py``. Try it: ``mlx-slim compare matrix-tiny -o runs/tiny
--only CELL``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mlx_slim.artifacts import write_json
from mlx_slim.errors import Interrupted, SlimError, without_secrets


@contextlib.contextmanager
def failure_in(file: Path, **about: str) -> Iterator[None]:
    """Write into ``file`` why the block failed, and raise it again.

    Args:
        file: JSON, with ``reason`` and ``exit_code``.
        about: Further keys of it.
    """
    try:
        yield
    except Interrupted:
        raise
    except SlimError as error:
        reason = "; ".join([error.message, *error.details])
        reason += f" ({error.hint})" if error.hint else ""
        write_json(file, {**about, "reason": reason, "exit_code": error.exit_code})
        raise
    except Exception as error:  # a bug of mlx-slim: who started the job names it
        reason = " ".join(f"internal error: {type(error).__name__}: {error}".split())
        write_json(file, {**about, "reason": without_secrets(reason), "exit_code": 1})
        raise
