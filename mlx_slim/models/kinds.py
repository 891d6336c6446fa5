"""What of a model can be removed: the names, without MLX.

Invariant: importing this imports nothing. Try it: ``mlx-slim prune --help``.
"""

from __future__ import annotations

HEADS, MLP, HIDDEN, EXPERTS = "heads", "mlp", "hidden", "experts"
