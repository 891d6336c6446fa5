"""Keys and values of a cache in 8 or 4 bits: which models can, and caches that hold them.

Generation keeps codes (mlx-lm's ``QuantizedKVCache``, from the first token on). Scoring keeps the
same numbers dequantized, in caches that batches can share, so its figures are those of the codes.
Invariant: both compute from the same rounded keys and values, each rounded once, when it is
written; a model is accepted only if attention over its codes equals attention over the rounded
numbers. Sliding windows, latent attention and other caches that mlx-lm cannot quantize are refused.
Try it: ``mlx-slim generate MODEL --kv-bits 8 --prompt Hello``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    make_prompt_cache,
)

from mlx_slim.errors import SlimError
from mlx_slim.models.logits_close import Change, logits_close

# A scale and a bias for so many numbers of a head: mlx-lm's own size first.
_GROUP_SIZES = (64, 32)
# Tokens of a prompt in one pass: attention over codes stores the scores of every pair of positions.
QUANTIZED_PREFILL = 512
_PROBE = ((5, 3, 1, 2, 6, 4), (0,))  # a prompt, then one more token
_HINT = "leave --kv-bits out"


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are rounded: affine, along a head.

    Attributes:
        bits: Of a number.
        group_size: Numbers that share a scale and a bias.
    """

    bits: int
    group_size: int

    def round(self, x: mx.array) -> mx.array:
        """Return ``x`` (…, D) as its codes give it back, in its own dtype."""
        codes = mx.quantize(x, group_size=self.group_size, bits=self.bits)
        rounded = mx.dequantize(*codes, group_size=self.group_size, bits=self.bits)
        return rounded.astype(x.dtype)

    def bits_per_number(self, itemsize: int) -> float:
        """Return the bits of a number with its part of scale and bias, ``itemsize`` bytes each."""
        return self.bits + 2 * 8 * itemsize / self.group_size


class _Rounding:
    """Rounds keys and values (B, H, T, D) on their way into a cache."""

    format: KVFormat

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return all keys and values so far."""
        parent: Any = super()
        return parent.update_and_fetch(self.format.round(keys), self.format.round(values))


class RoundedKVCache(_Rounding, KVCache):
    """One layer's keys and values, rounded."""

    def __init__(self, format: KVFormat) -> None:
        super().__init__()
        self.format = format

    def merge(self, caches: Sequence[Any]) -> RoundedBatchKVCache:  # pyright: ignore
        """Return the cache of a batch (what mlx-lm's batches ask for)."""
        batch = RoundedBatchKVCache([0] * len(caches), self.format)
        batch.state = BatchKVCache.merge(caches).state
        return batch


class RoundedBatchKVCache(_Rounding, BatchKVCache):
    """One layer's keys and values of several sequences, rounded."""

    def __init__(self, left_padding: list[int], format: KVFormat) -> None:
        super().__init__(left_padding)
        self.format = format


def cache_widths(model: nn.Module) -> tuple[list[tuple[int, int | None]], int]:
    """Return what a prompt cache of ``model`` holds; its graph is built, nothing is computed.

    Latent attention stores less than keys and values of every head, and a class has defaults for
    what a config leaves out: so shapes are read, not the config.

    Args:
        model: Any mlx-lm model, weights or not.

    Returns:
        (numbers of a token, most tokens or None) of each layer that grows, and the numbers of all
        that does not.
    """
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)  # type: ignore[operator]
    growing: list[tuple[int, int | None]] = []
    fixed = 0
    while caches:
        cache: Any = caches.pop()
        caches += getattr(cache, "caches", ())  # of one layer that holds several
        if isinstance(cache, ArraysCache):
            fixed += sum(x.size for x in cache.cache if x is not None)
        elif isinstance(keys := getattr(cache, "keys", None), mx.array):
            width = sum(x.shape[1] * x.shape[-1] for x in (keys, cache.values))
            window = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
            growing.append((width, window))
    return growing[::-1], fixed


def cache_format(model: nn.Module, bits: int, name: str = "the model") -> KVFormat:
    """Return how the cache of ``model`` can be quantized; its graph is built, nothing is computed.

    Args:
        model: Any mlx-lm model, weights or not.
        bits: 8 or 4 (slimming counts others).
        name: Of the model, for the message.

    Raises:
        SlimError: If it cannot be.
    """
    caches = make_prompt_cache(model)
    others = {type(c).__name__ for c in caches if not isinstance(c, (KVCache, ArraysCache))}
    growing = [cache for cache in caches if type(cache) is KVCache]
    if others or not growing:
        kinds = " and ".join(sorted(others)) or "recurrent state, without keys and values"
        raise SlimError(f"{name} cannot keep its cache in {bits} bits: it is a {kinds}", _HINT)
    try:
        _probed(model, caches)
        pairs: list[tuple[Any, Any]] = [(cache.keys, cache.values) for cache in growing]
        widths = {x.shape[-1] for pair in pairs for x in pair}
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise _unsupported(name, bits, error) from error
    group_size = next((g for g in _GROUP_SIZES if all(w % g == 0 for w in widths)), None)
    if group_size is None:
        raise SlimError(
            f"{name} cannot keep its cache in {bits} bits: its heads have "
            f"{' and '.join(map(str, sorted(widths)))} numbers, expected a multiple of "
            f"{_GROUP_SIZES[-1]}",
            _HINT,
        )
    chosen = KVFormat(bits, group_size)
    try:
        _probed(model, _in_codes(make_prompt_cache(model), chosen))
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise _unsupported(name, bits, error) from error
    return chosen


def _in_codes(caches: list[Any], format: KVFormat) -> list[Any]:
    return [
        QuantizedKVCache(format.group_size, format.bits) if type(cache) is KVCache else cache
        for cache in caches
    ]


def quantize_cache(model: Any, bits: int, name: str = "the model") -> KVFormat:
    """Make every prompt cache of ``model`` a quantized one, whoever asks mlx-lm for it.

    Args:
        model: With its weights; changed.
        bits: 8 or 4.
        name: Of the model, for the message.

    Raises:
        SlimError: If its cache cannot be quantized, or attention over codes gives other logits than
            over the numbers they stand for.
    """
    chosen = cache_format(model, bits, name)
    make = getattr(model, "make_cache", None) or (lambda: [KVCache() for _ in model.layers])

    actual, expected = (
        _probed(model, caches)
        for caches in (_in_codes(make(), chosen), rounded_caches(model, chosen))
    )
    if not (close := logits_close(actual, expected, Change.SHAPES)).close:
        raise SlimError(
            f"{name} cannot keep its cache in {bits} bits: {close} over the rounded numbers", _HINT
        )
    model.make_cache = lambda: _in_codes(make(), chosen)
    return chosen


def _probed(model: Any, caches: list[Any]) -> mx.array:
    return mx.concatenate([model(mx.array([part]), cache=caches) for part in _PROBE], axis=1)


def rounded_caches(model: nn.Module, format: KVFormat) -> list[Any]:
    """Return prompt caches that hold rounded keys and values; those without any as they are."""
    return [
        RoundedKVCache(format) if type(cache) is KVCache else cache
        for cache in make_prompt_cache(model)
    ]


def _unsupported(name: str, bits: int, error: Exception) -> SlimError:
    why = " ".join(str(error).split())[:120]
    return SlimError(
        f"{name} cannot keep its cache in {bits} bits: its class refuses ({why})", _HINT
    )
