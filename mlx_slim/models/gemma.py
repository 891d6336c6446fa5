"""What mlx-lm's Gemma 2, 3 and 3n compute otherwise than they should, put right.

Gemma 3: mlx-lm rounds the scale √D of the embeddings to bfloat16 in every dtype (25.298 becomes
25.25 at 640), which shifts log-likelihoods by up to 0.09 nats. transformers rounds it to the dtype
of the weights, so bfloat16 agrees as it is. A model whose width was pruned has the ratio of both
rounded roots in its embedding: its rounding error is still that of the width that it had.

Gemma 2: mlx-lm adds masks (B, 1, T, S) to scores (B, key-value heads, queries of each, T, S). The
mask of row b then falls on the b-th key-value head of every row where there are as many rows as
heads, and fits nothing where there are not.

Gemma 3n: its last layers attend to keys and values that an earlier layer wrote. mlx-lm finds these
in a cache only, and without one lets them compute their own, from weights that were never trained.
And its forward pass clips weights by writing them: no two threads can compute it.

Invariant: parameters and base classes stay.
Try it: ``python -m pytest tests/models/test_gemma.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.reading import ModelConfig

EMBEDDING_SIZE = "mlx_slim_embedding_size"


def correct_gemma(model: nn.Module, config: ModelConfig) -> None:
    """Correct all of the above in ``model``, of ``config``, in place; other models stay."""
    use_exact_scale(model, config)
    use_row_masks(model)
    use_shared_keys(model)


def use_exact_scale(model: nn.Module, config: ModelConfig) -> bool:
    """Let a Gemma 3 in float32 scale its embeddings exactly, in place.

    Args:
        model: Any.
        config: Its config; ``mlx_slim_embedding_size`` is the width that its embedding was made
            for.

    Returns:
        Whether ``model`` holds such a body that was not changed before.
    """
    from mlx_lm.models.gemma3_text import Gemma3Model

    width = config.get("text_config", config).get(EMBEDDING_SIZE)
    return _replace_classes(model, {Gemma3Model: partial(_exact, width)})


def _exact(width: int | None, kind: type) -> type:
    def call(
        self: Any,
        inputs: mx.array,
        cache: Any = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        hidden = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if hidden.dtype == mx.float32:  # mlx-lm multiplies by the rounded root afterwards
            root = math.sqrt(width or self.args.hidden_size)
            rounded = cast(float, mx.array(root, mx.bfloat16).astype(mx.float32).item())
            hidden = hidden * (root / rounded)
        return kind.__call__(self, inputs, cache, hidden)  # type: ignore[operator]

    return type(f"Exact{kind.__name__}", (kind,), {"__call__": call})


def use_shared_keys(model: nn.Module) -> bool:
    """Let a Gemma 3n share keys and values without a cache too, and leave its weights, in place.

    Returns:
        Whether ``model`` holds such a body that was not changed before.
    """
    from mlx_lm.models.gemma3n import Gemma3nAltUp, LanguageModel

    return _replace_classes(model, {LanguageModel: _shared, Gemma3nAltUp: _unwritten})


def _replace_classes(model: nn.Module, subclasses: dict[type, Callable[[type], type]]) -> bool:
    """Give modules of exactly these classes a subclass, in place; return whether one had it."""
    changed = False
    for module in model.modules():
        if subclass := subclasses.get(type(module)):
            module.__class__ = subclass(type(module))
            changed = True
    return changed


def _unwritten(kind: type) -> type:
    def borrowed(module: Any) -> Any:
        """Return a module with the weights of ``module``, and places of its own to write them."""
        twin = copy.copy(module)
        for name in ("prediction_coefs", "correction_coefs"):
            twin[name] = copy.copy(module[name])
        return twin

    def predict(self: Any, x: mx.array) -> mx.array:
        return kind.predict(borrowed(self), x)  # type: ignore[attr-defined]

    def correct(self: Any, predictions: mx.array, activated: mx.array) -> mx.array:
        return kind.correct(borrowed(self), predictions, activated)  # type: ignore[attr-defined]

    return type(f"Unwritten{kind.__name__}", (kind,), {"predict": predict, "correct": correct})


def _shared(kind: type) -> type:
    def call(
        self: Any,
        inputs: mx.array,
        cache: Any = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        from mlx_lm.models.cache import ConcatenateKVCache

        if cache is None:
            cache = [ConcatenateKVCache() for _ in self.make_cache()]
        return kind.__call__(self, inputs, cache, input_embeddings)  # type: ignore[operator]

    return type(f"Shared{kind.__name__}", (kind,), {"__call__": call})


def use_row_masks(model: nn.Module) -> bool:
    """Let a Gemma 2 keep to a mask of each row, in place.

    Returns:
        Whether ``model`` holds such attention that was not changed before.
    """
    from mlx_lm.models.gemma2 import Attention

    attentions = [module for module in model.modules() if type(module) is Attention]
    kind = _by_row(Attention)
    for module in attentions:
        module.__class__ = kind
    return bool(attentions)


def _by_row(kind: type) -> type:
    def call(self: Any, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        if mask is not None and mask.ndim == 4 and self.repeats > 1:
            mask = mask[:, :, None]
        return kind.__call__(self, x, mask, cache)  # type: ignore[operator]

    return type(f"ByRow{kind.__name__}", (kind,), {"__call__": call})
