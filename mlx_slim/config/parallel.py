"""How several ranks work on one model: the values of ``--parallel``.

Invariant: the only home of the default; nothing heavy is imported. Try it:
``mlx-slim eval --help``.
"""

from __future__ import annotations

from typing import Literal

from mlx_slim.config.options import option

Parallel = Literal["auto", "data", "tensor", "pipeline"]
PARALLEL: Parallel = "auto"
PARALLEL_OPTION = option("Over several ranks: whole models, divided heads, or divided blocks.")
