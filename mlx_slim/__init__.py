"""Make a language model smaller and better at your task on one laptop, and know what it cost.

``from mlx_slim import finetune, evaluate, quantize, prune, distill, plan`` are the commands as
functions (``mlx_slim/api.py``). Invariant: importing this package does one thing besides defining
names: on Linux it puts a fast BLAS under ``mlx.core`` (see ``mlx_slim.blas``), which works only
before ``mlx.core`` is imported. It stands here so that the command line, the Python API and the
tests all get it; opt out with ``MLX_SLIM_BLAS=off``. Try it: ``python -m mlx_slim doctor``.
"""

import signal
import sys

if (
    sys.argv[0].endswith("/mlx-slim") or sys.orig_argv[1:3] == ["-m", "mlx_slim"]
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The command line is being loaded: Ctrl-C ends it without a traceback, until ``interrupts``.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib
import types
from typing import TYPE_CHECKING, Any

from mlx_slim import blas

if TYPE_CHECKING:
    from mlx_slim.api import distill, evaluate, finetune, plan, prune, quantize

__all__ = ["__version__", "distill", "evaluate", "finetune", "plan", "prune", "quantize"]
__version__ = "0.1.0"

_FUNCTIONS = ("finetune", "plan")
# Folders of that name too: both are what the name means.
_PACKAGES = ("distill", "evaluate", "prune", "quantize")


class _CallablePackage(types.ModuleType):
    """A package that, when called, is the function of its name in ``mlx_slim.api``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module("mlx_slim.api"), self.__name__.rpartition(".")[2])(
            *args, **kwargs
        )


class _ThisPackage(types.ModuleType):
    """Makes those packages callable when Python binds them to this one."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PACKAGES and isinstance(value, types.ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _FUNCTIONS:
            return getattr(importlib.import_module("mlx_slim.api"), name)
        if name in _PACKAGES:
            return importlib.import_module(f"mlx_slim.{name}")
        raise AttributeError(f"module 'mlx_slim' has no attribute {name!r}")


sys.modules[__name__].__class__ = _ThisPackage
blas.activate()
