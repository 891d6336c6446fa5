"""Bytes of the key-value caches of answers, from shapes: how many fit, and what one needs.

Invariant: nothing is loaded, and for the models of the shipped recipes mlx-lm is not imported, so
that their plans are quick; caches grow by the steps of mlx-lm's, which a test compares. Try it:
``mlx-slim eval MODEL --task gsm8k --limit 16 -o DIR``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_slim.reading import ModelConfig

STEP = 256  # positions by which a cache grows
_GROWING = 1.5  # while a cache grows, a layer's old and new keys are both in memory
# Model types whose caches are whole keys and values of every layer, unless such a key is there.
_PLAIN = {"llama", "mistral", "phi", "qwen2"}
_NOT_PLAIN = {"head_dim", "layer_types"}
_LOGIT_BYTES = 16  # logits, their logarithms, the step before: float32 each


@dataclass(frozen=True)
class Footprint:
    """Memory of one answer's cache.

    Attributes:
        layers: (bytes of a position, most positions or None) of each layer.
        fixed: Bytes that do not grow.
        vocabulary: Logits of a position.
    """

    layers: tuple[tuple[int, int | None], ...]
    fixed: int
    vocabulary: int

    def cache_bytes(self, positions: int) -> int:
        """Return the bytes of keys and values of so many positions, in steps of 256."""
        whole = -(-positions // STEP) * STEP
        return self.fixed + sum(
            size * (whole if window is None else min(whole, window)) for size, window in self.layers
        )

    def least(self, positions: int) -> int:
        """Return the bytes that one request of ``positions`` needs in addition to the weights."""
        return self.cache_bytes(positions) + _LOGIT_BYTES * self.vocabulary

    def answers(self, budget: int, behind: int, before: int, shared: bool) -> int:
        """Return the largest batch of answers that fits into ``budget`` bytes, at least one.

        Args:
            budget: For caches and logits.
            behind: Positions after the prefix of the longest prompt and its answer.
            before: Positions of the prefix.
            shared: Whether the prefix is stored once.
        """
        once = self.cache_bytes(before) * (1 if shared else 2)
        each = self._each(behind if shared else before + behind)
        return max(1, int((budget - once) / each))

    def batch_bytes(self, count: int, positions: int) -> int:
        """Return the bytes for which ``answers`` gives ``count``, nothing before them shared."""
        return 2 * self.cache_bytes(0) + math.ceil(count * self._each(positions))

    def _each(self, positions: int) -> float:
        return self.cache_bytes(positions + STEP) * _GROWING + _LOGIT_BYTES * self.vocabulary


def planned_footprint(config: ModelConfig, itemsize: int) -> Footprint:
    """Return what the caches of a model will hold, from its ``config.json``.

    Latent attention, windows and recurrent state are what its class makes of them; plain attention
    is counted from the keys, as that needs no mlx-lm, and so is a class that the model brings.

    Args:
        config: Of the model.
        itemsize: Bytes of an element of the compute dtype.

    Raises:
        SlimError: If mlx-lm does not know the model type, or the config does not fit it.
    """
    text = {**config, **(config.get("text_config") or {})}

    def first(*keys: str, default: int = 0) -> int:
        return next((int(text[key]) for key in keys if text.get(key)), default)

    vocabulary = first("vocab_size")
    plain = config.get("model_type") in _PLAIN and not _NOT_PLAIN & config.keys()
    if plain or config.get("model_file"):
        width, heads = first("hidden_size"), first("num_attention_heads", default=1)
        pairs = 2 * first("num_key_value_heads", default=heads)
        size = pairs * first("head_dim", default=width // heads) * itemsize
        return Footprint(((size, None),) * first("num_hidden_layers"), 0, vocabulary)
    from mlx_slim.models.build import build
    from mlx_slim.models.kv_cache import cache_widths

    widths, fixed = cache_widths(build(config))
    layers = tuple((width * itemsize, window) for width, window in widths)
    return Footprint(layers, fixed * itemsize, vocabulary)
