"""The tests mirror the package.

``mlx_slim`` comes first: its import puts the fast BLAS under ``mlx.core``, too late once a test
module has imported MLX itself.
"""

import mlx_slim  # noqa: F401
