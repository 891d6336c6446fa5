"""Which layers can be quantized.

Invariant: a layer that stock mlx-lm cannot quantize is none. Try it:
``mlx-slim quantize MODEL -o DIR``.
"""

from __future__ import annotations

import inspect
from functools import lru_cache

import mlx.nn as nn


def has_quantized_form(module: nn.Module) -> bool:
    """Return whether ``module`` is a dense layer that can be quantized in any mode.

    A model class may have a layer whose ``to_quantized`` takes no mode (afm7); stock mlx-lm cannot
    quantize such a model at all, and here that layer is left out.
    """
    return "weight" in module and _quantizes_in_any_mode(type(module))


@lru_cache(maxsize=256)
def _quantizes_in_any_mode(layer: type[nn.Module]) -> bool:
    if not hasattr(layer, "to_quantized"):
        return False
    parameters = inspect.signature(layer.to_quantized).parameters.values()  # type: ignore[attr-defined]
    return any(one.name == "mode" or one.kind is one.VAR_KEYWORD for one in parameters)
