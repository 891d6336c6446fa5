"""What a piece of code imports, seen from a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLOW = {"mlx_lm", "transformers", "datasets"}  # seconds each
HEAVY = SLOW | {"mlx.core", "rich", "numpy", "optuna", "jinja2", "pydantic"}


def imported_by(code: str) -> tuple[str, str]:
    """Run ``code``; return its standard output, and the set of ``HEAVY`` modules after it.

    The set is text, ``set()`` and a line feed where there is none, after what else went to
    standard error.
    """
    end = f"\nimport sys; print({HEAVY!r} & set(sys.modules), file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", code + end],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return result.stdout, result.stderr
