"""Key-value caches of answers generated in one batch: their common prefix is stored once.

Invariant: every answer attends to the prefix and its own tokens with one softmax over both, as
if it had a copy of the prefix. The prefix's keys and values (1, H, P, D) are shared where a layer
keeps all its keys and values and attends through mlx-lm's function, checked on a probe; layers with
a window or a recurrent state get copies. The batch size is computed from bytes beforehand.
Try it: ``mlx-slim bench eval MODEL --task gsm8k --limit 16``.
Legend: B answers, G query heads of a key-value head, H key-value heads, T new positions, P
positions of the prefix, L positions after the prefix, D width of a head.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlx_slim.agreement import gather
from mlx_slim.evaluation.scoring.footprint import Footprint
from mlx_slim.models import host_exponentials
from mlx_slim.models.kv_cache import KVFormat
from mlx_slim.models.logits_close import Change, logits_close
from mlx_slim.models.parallel import divided_by

PREFILL_TOKENS = 512  # tokens of a prompt per forward pass
_ATTENTION = "scaled_dot_product_attention"
_MANY = 1 << 14  # scores: for fewer, MLX's exponentials take no longer than evaluating them
_LEAST = np.float32(np.finfo(np.float32).min)
_PROBE = (5, 3, 1, 2, 6, 4, 0, 2, 1, 5, 3, 6)


class Prefix:
    """One layer's keys and values after the prefix, evaluated; replaces a prompt's cache.

    Args:
        cache: The layer's own cache after the prefix.
        shared: Whether answers share it; else each batch of prompts gets copies.
    """

    def __init__(self, cache: Any, shared: bool) -> None:
        self.cache = cache
        if shared:
            self.keys = mx.contiguous(cache.keys[..., : cache.offset, :])
            self.values = mx.contiguous(cache.values[..., : cache.offset, :])
            mx.eval(self.keys, self.values)
            self.length = cache.offset
        self.shared = shared

    def __deepcopy__(self, memo: dict[int, Any]) -> Prefix:
        return self

    def merge(self, prompts: Sequence[Prefix]) -> Any:
        """Return the cache of a batch of prompts that begin so (what mlx-lm's batches ask for)."""
        if self.shared:
            return SuffixCache([0] * len(prompts), self)
        return self.cache.merge([prompt.cache for prompt in prompts])


class SuffixCache(BatchKVCache):
    """Keys and values of a batch of answers, without those of their common prefix.

    Args:
        left_padding: Of each row.
        prefix: Of this layer.
    """

    def __init__(self, left_padding: list[int], prefix: Prefix) -> None:
        super().__init__(left_padding)
        self.prefix = prefix
        self.offset = self.offset + prefix.length
        self._kv_format: KVFormat | None = getattr(prefix.cache, "format", None)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values after the prefix, rounded as those of the prefix are."""
        if self._kv_format is not None:
            keys, values = self._kv_format.round(keys), self._kv_format.round(values)
        return super().update_and_fetch(keys, values)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> mx.array:
        """Return the mask (B, 1, T, L) of the positions after the prefix."""
        if window_size is not None:
            raise ValueError("a window may end inside the prefix")
        return super().make_mask(N)


class _NewPositions(NamedTuple):
    """One of each answer: q (B, H·G, 1, D), keys and values behind the prefix, and their mask."""

    queries: mx.array
    keys: mx.array
    values: mx.array
    prefix: Prefix
    scale: float
    mask: mx.array


def _attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's attention, over a shared prefix and the later positions where ``cache`` has one."""
    if not isinstance(cache, SuffixCache):
        return base.scaled_dot_product_attention(
            queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks
        )
    if sinks is not None or not isinstance(mask, mx.array):
        raise ValueError("a shared prefix has no attention sinks, and needs a mask")
    prefix = cache.prefix
    rows, _, new, _ = queries.shape
    mask = mx.broadcast_to(mask, (rows, 1, new, keys.shape[2]))
    if new > 1:  # prefill of a few prompts: copies of one layer at a time
        shape = (rows, *prefix.keys.shape[1:3])
        before = [mx.broadcast_to(x, (*shape, x.shape[-1])) for x in (prefix.keys, prefix.values)]
        seen = mx.ones((rows, 1, new, prefix.length), dtype=mx.bool_)
        return mx.fast.scaled_dot_product_attention(
            queries,
            mx.concatenate([before[0], keys], axis=2),
            mx.concatenate([before[1], values], axis=2),
            scale=scale,
            mask=mx.concatenate([seen, mask], axis=-1),
        )
    new_positions = _NewPositions(queries, keys, values, prefix, scale, mask)
    scores = rows * queries.shape[1] * (prefix.length + keys.shape[2])
    if scores >= _MANY and host_exponentials.in_use(keys, values, queries):
        return _one_each_by_numpy(new_positions)
    return _one_each(new_positions)


def _one_each(new: _NewPositions) -> mx.array:
    """Return attention (B, H·G, 1, D) of one new position of each answer.

    The queries of all answers are multiplied with the prefix's keys as one matrix, read once.
    """
    queries, keys, values, prefix, scale, mask = new
    rows, heads, _, width = queries.shape
    groups = keys.shape[1]
    queries_BHGD = (queries * scale).reshape(rows, groups, heads // groups, width)

    def folded(x_BHGN: mx.array) -> mx.array:  # (H, B·G, N)
        return x_BHGN.transpose(1, 0, 2, 3).reshape(groups, -1, x_BHGN.shape[-1])

    def unfolded(x: mx.array) -> mx.array:  # (B, H, G, N)
        return x.reshape(groups, rows, heads // groups, -1).transpose(1, 0, 2, 3)

    before_BHGP = unfolded(folded(queries_BHGD) @ prefix.keys[0].swapaxes(-1, -2))
    suffix_BHGL = queries_BHGD @ keys.swapaxes(-1, -2)
    suffix_BHGL = mx.where(mask, suffix_BHGL, mx.finfo(suffix_BHGL.dtype).min)
    weights = mx.softmax(mx.concatenate([before_BHGP, suffix_BHGL], axis=-1), axis=-1, precise=True)
    before_BHGP, suffix_BHGL = mx.split(weights, [prefix.length], axis=-1)
    result = unfolded(folded(before_BHGP) @ prefix.values[0]) + suffix_BHGL @ values
    return result.reshape(rows, heads, 1, values.shape[-1])


def _one_each_by_numpy(new: _NewPositions) -> mx.array:
    """Return the same, evaluated: MLX's exponential takes ten times as long on a CPU."""
    queries, keys, values, prefix, scale, mask = new
    mx.eval(queries, keys, values, mask)
    keys_BHLD, values_BHLD = np.asarray(keys), np.asarray(values)
    rows, heads, _, width = queries.shape
    groups, length = keys_BHLD.shape[1:3]
    queries_BHGD = np.asarray(queries).reshape(rows, groups, -1, width) * np.float32(scale)
    queries_HND = queries_BHGD.transpose(1, 0, 2, 3).reshape(groups, -1, width)  # N = B·G
    before_HNP = queries_HND @ np.asarray(prefix.keys)[0].swapaxes(1, 2)
    suffix_BHGL = queries_BHGD @ keys_BHLD.swapaxes(2, 3)
    np.copyto(suffix_BHGL, _LEAST, where=~np.asarray(mask))
    suffix_HNL = suffix_BHGL.transpose(1, 0, 2, 3).reshape(groups, -1, length)
    peaks = np.maximum(before_HNP.max(-1, keepdims=True), suffix_HNL.max(-1, keepdims=True))
    for scores in (before_HNP, suffix_HNL):
        scores -= peaks
        np.exp(scores, out=scores)
    totals = before_HNP.sum(-1, keepdims=True) + suffix_HNL.sum(-1, keepdims=True)
    weights_BHGL = suffix_HNL.reshape(groups, rows, -1, length).transpose(1, 0, 2, 3)
    result_HND = before_HNP @ np.asarray(prefix.values)[0]
    result_BHGD = result_HND.reshape(groups, rows, -1, result_HND.shape[-1]).transpose(1, 0, 2, 3)
    result_BHGD += weights_BHGL @ values_BHLD
    result_BHGD /= totals.reshape(groups, rows, -1, 1).transpose(1, 0, 2, 3)
    return mx.array(result_BHGD.reshape(rows, heads, 1, -1))


@contextlib.contextmanager
def shared_attention(model: nn.Module) -> Iterator[None]:
    """Let the model's own modules attend through ``_attend``; other models see no difference."""
    owners = {sys.modules[type(module).__module__] for module in model.modules()}
    ours = [m for m in owners if getattr(m, _ATTENTION, None) is base.scaled_dot_product_attention]
    try:
        for module in ours:
            setattr(module, _ATTENTION, _attend)
        yield
    finally:
        for module in ours:
            setattr(module, _ATTENTION, base.scaled_dot_product_attention)


def supports_shared_prefix(model: Any) -> bool:
    """Return whether answers of ``model`` can share a prefix: checked against a plain pass."""
    caches = make_prompt_cache(model)
    if not all(type(cache) is KVCache for cache in caches):
        return False
    tokens = mx.array([_PROBE, (*_PROBE[:6], *_PROBE[:6])])  # two rows with a common prefix
    expected = model(tokens)
    model(tokens[:1, :6], cache=caches)
    try:
        with shared_attention(model):
            joint: list[Any] = [SuffixCache([0, 0], Prefix(cache, True)) for cache in caches]
            logits = [model(tokens[:, 6:10], cache=joint)]
            logits += [model(tokens[:, i : i + 1], cache=joint) for i in (10, 11)]
    except (TypeError, ValueError, AttributeError):
        return False
    return logits_close(mx.concatenate(logits, axis=1), expected[:, 6:], Change.SHAPES).close


def joins(model: Any) -> bool:
    """Return whether prompts of different lengths can be answered in one batch.

    Checked against each prompt alone: recurrent layers may take padding into their state, and
    attention may not support a mask per row.
    """
    from mlx_lm.generate import PromptProcessingBatch

    prompts = [list(_PROBE[:9]), list(_PROBE[2:6])]
    alone = mx.stack([model(mx.array([prompt]))[0, -2:] for prompt in prompts])
    try:
        batch = PromptProcessingBatch(model, [0, 1], [make_prompt_cache(model) for _ in prompts])
        batch.prompt([prompt[:-2] for prompt in prompts])
        last_RT = mx.array([prompt[-2:] for prompt in prompts])
        logits = [model(last_RT[:, i : i + 1], cache=batch.prompt_cache) for i in (0, 1)]
    except (TypeError, ValueError, AttributeError, IndexError):
        return False
    return logits_close(mx.concatenate(logits, axis=1), alone, Change.SHAPES).close


def footprint(model: Any) -> Footprint:
    """Return what the caches of ``model`` hold, from one pass over one token."""
    caches = make_prompt_cache(model)
    logits = model(mx.array([[0]]), cache=caches)
    mx.eval([cache.state for cache in caches])
    layers: list[tuple[int, int | None]] = []
    fixed = 0
    for cache in caches:
        if isinstance(cache, (KVCache, RotatingKVCache)) and cache.keys is not None:
            pair: tuple[Any, Any] = (cache.keys, cache.values)
            size = sum(x.shape[1] * x.shape[3] * x.itemsize for x in pair)
            layers.append((size, getattr(cache, "max_size", None)))
        elif isinstance(cache, QuantizedKVCache) and cache.keys is not None:
            codes: tuple[Any, ...] = (*cache.keys, *cache.values)  # type: ignore[misc]
            layers.append((sum(x.shape[1] * x.shape[3] * x.itemsize for x in codes), None))
        else:
            fixed += int(cache.nbytes or 0)
    if divided_by(model) is not None:  # the ranks plan alike, for the one with the largest caches
        every = gather([sum(size for size, _ in layers), fixed, layers])
        _, fixed, most = max(every, key=lambda one: one[:2])
        layers = [(size, window) for size, window in most]
    return Footprint(tuple(layers), fixed, logits.shape[-1])
