"""Gemma 3's embeddings scaled by √D exactly, where it computes in float32.

mlx-lm's ``gemma3_text`` rounds √D to bfloat16 in every dtype (25.298 becomes 25.25 at 640), which
shifts log-likelihoods by up to 0.09 nats. transformers rounds it to the dtype of the weights, so
bfloat16 agrees as it is. Invariant: parameters and base classes stay. Try it:
``python -m pytest tests/models/test_gemma.py``.
"""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn


def use_exact_scale(model: nn.Module) -> bool:
    """Let a Gemma 3 in float32 scale its embeddings exactly, in place.

    Returns:
        Whether ``model`` holds such a body that was not changed before.
    """
    from mlx_lm.models.gemma3_text import Gemma3Model

    changed = False
    for module in model.modules():
        if type(module) is Gemma3Model:
            module.__class__ = _exact(Gemma3Model)
            changed = True
    return changed


def _exact(kind: type) -> type:
    def call(
        self: Any,
        inputs: mx.array,
        cache: Any = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        hidden = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if hidden.dtype == mx.float32:  # mlx-lm multiplies by the rounded root afterwards
            root = math.sqrt(self.args.hidden_size)
            rounded = cast(float, mx.array(root, mx.bfloat16).astype(mx.float32).item())
            hidden = hidden * (root / rounded)
        return kind.__call__(self, inputs, cache, hidden)  # type: ignore[operator]

    return type(f"Exact{kind.__name__}", (kind,), {"__call__": call})
