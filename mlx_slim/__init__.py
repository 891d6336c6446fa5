"""Make a language model smaller and better at your task on one laptop, and know what it cost.

``from mlx_slim import finetune, evaluate, quantize, prune, distill, slim, sweep, plan, choose``
are the commands as functions (``mlx_slim/api.py``). Invariant: importing this package does two
things besides defining names, both of which work only before ``mlx.core`` is imported: on Linux
the first import of ``mlx.core`` puts a fast BLAS under it (see ``mlx_slim.blas``; opt out with
``MLX_SLIM_BLAS=off``), and float32 products are computed in float32, not in TF32
(``MLX_ENABLE_TF32=1`` wins). It stands here so that the command line, the Python API and the tests
all get it. Try it: ``python -m mlx_slim doctor``.
"""

import os
import signal
import sys

if (
    sys.argv[0].endswith("/mlx-slim") or sys.orig_argv[1:3] == ["-m", "mlx_slim"]
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The command line is being loaded: Ctrl-C ends it without a traceback, until ``interrupts``.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_slim.api import (
        choose,
        distill,
        evaluate,
        finetune,
        plan,
        prune,
        quantize,
        slim,
        sweep,
    )

__all__ = [
    "__version__",
    "choose",
    "distill",
    "evaluate",
    "finetune",
    "plan",
    "prune",
    "quantize",
    "slim",
    "sweep",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Return a function of ``mlx_slim.api``, which imports MLX: only when it is used."""
    if name in __all__:
        return getattr(import_module("mlx_slim.api"), name)
    raise AttributeError(f"module 'mlx_slim' has no attribute {name!r}")


class _BeforeMlx:
    """Calls ``blas.activate`` when ``mlx.core`` is about to be imported; finds no module itself.

    Commands that compute nothing are spared looking for the library and loading it.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Let the other finders find every module."""
        if name == "mlx.core":
            sys.meta_path.remove(self)
            import_module("mlx_slim.blas").activate()


# MLX rounds float32 factors to 10 bits of mantissa on NVIDIA GPUs and on M5: scores and resumed
# losses that are compared in float32 would differ in the third digit.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
if "mlx.core" in sys.modules:
    import_module("mlx_slim.blas").activate()  # too late, and it says so
elif sys.platform.startswith("linux"):
    sys.meta_path.insert(0, _BeforeMlx())
