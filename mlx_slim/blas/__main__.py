"""Print the BLAS that mlx-slim uses, for tools that know nothing of it.

Invariant: standard output holds a path to preload, or nothing. Try it:
``LD_PRELOAD=$(python -m mlx_slim.blas) mlx_lm.lora …``.
"""

from __future__ import annotations

import sys

from mlx_slim import blas


def main() -> int:
    """Print the path; return 1 if there is none."""
    status = blas.activate()
    if status.path is None:
        print(status.note or "this system needs no other BLAS", file=sys.stderr)
        return 0 if status.source == "platform" else 1
    print(status.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
