"""Make a language model smaller and better at your task on one laptop, and know what it cost.

Invariant: importing this package does one thing besides defining names: on Linux it puts a fast
BLAS under ``mlx.core`` (see ``mlx_slim.blas``), which works only before ``mlx.core`` is imported.
It stands here so that the command line, the Python API and the tests all get it; opt out with
``MLX_SLIM_BLAS=off``. Try it: ``python -m mlx_slim doctor``.
"""

from mlx_slim import blas

__version__ = "0.1.0"

blas.activate()
