"""Key-value caches for batches whose rows continue different prefixes.

Models ask a key-value cache for a mask, for an offset and for the keys to attend to; the caches
here answer per row, so one batch may hold continuations of many prefixes of different lengths.
Invariant: a row attends to its own path only, at the positions it would have alone. Keys and values
are stored once, in a pool of positions; the mask implements rotating windows.
Legend: R rows, T positions of a row, L positions before it, P positions of the pool, H heads, D
width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.agreement import gather
from mlx_slim.models.kv_cache import KVFormat
from mlx_slim.models.logits_close import Change, logits_close
from mlx_slim.models.parallel import divided_by, largest
from mlx_slim.runtime import on_gpu

Pool = list[tuple[mx.array, mx.array]]  # of each layer: keys and values (P, H, D)
_PROBE = (7, 4)  # lengths of two prefixes
_MORE = (5, 1)  # of what follows each: some attention computes one position in another way
_PROBE_TOKENS = ((5, 3, 1, 2, 6, 4, 0, 2, 1, 5, 3, 6), (1, 4, 6, 3, 3, 0, 5, 2, 4, 6, 1, 2))


class _PathMasks:
    """The mask of a batch, computed once for all layers of one window size."""

    def __init__(self, offsets_R: np.ndarray, length: int, dtype: mx.Dtype, additive: bool) -> None:
        self._offsets_R, self._length, self._dtype = offsets_R, length, dtype
        self._additive = additive
        self._masks: dict[int | None, mx.array] = {}

    def __call__(self, window: int | None) -> mx.array:
        if window not in self._masks:
            self._masks[window] = self._make(window)
        return self._masks[window]

    def _make(self, window: int | None) -> mx.array:
        """Return (R, 1, T, L + T): the columns are the padded path, then the row itself."""
        before = int(self._offsets_R.max(initial=0))
        columns = np.arange(self._length)
        queries_RT = self._offsets_R[:, None] + columns
        path_RL = np.broadcast_to(np.arange(before), (len(self._offsets_R), before))
        keys_RS = np.concatenate([path_RL, queries_RT], axis=1)
        real_RS = np.concatenate(
            [path_RL < self._offsets_R[:, None], np.ones_like(queries_RT, dtype=bool)], axis=1
        )
        distance_RTS = queries_RT[:, :, None] - keys_RS[:, None, :]
        seen_RTS = (distance_RTS >= 0) & real_RS[:, None, :]
        if window is not None:
            seen_RTS &= distance_RTS < window
        mask = mx.array(seen_RTS[:, None].view(np.uint8)).astype(mx.bool_)
        if not self._additive:
            return mask
        return mx.where(mask, 0.0, mx.finfo(self._dtype).min).astype(self._dtype)


class BranchCache:
    """One layer's keys and values for a batch of continuations, with the interface of a KV cache.

    Args:
        past: Pool of this layer and the (R, L) places of each row's path in it; None for roots.
        offset: Positions before each row: an array (R,), or one number if all are the same.
        masks: The mask of the batch.
        kv_format: What keys and values are rounded to; None leaves them.
    """

    def __init__(
        self,
        past: tuple[mx.array, mx.array, mx.array] | None,
        offset: mx.array | int,
        masks: _PathMasks,
        kv_format: KVFormat | None,
    ) -> None:
        self.offset = offset
        self._kv_format = kv_format
        self._past, self._masks = past, masks
        self.keys: mx.array | None = None  # of the batch itself (R, H, T, D), after the forward
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values (R, H, L + T, D) that the rows may attend to."""
        if self._kv_format is not None:
            keys, values = self._kv_format.round(keys), self._kv_format.round(values)
        self.keys, self.values = keys, values
        if self._past is not None:
            keys_PHD, values_PHD, path_RL = self._past
            keys, values = _behind(keys_PHD, path_RL, keys), _behind(values_PHD, path_RL, values)
        self._latest = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return the same to a layer that reads what the layer of this cache wrote."""
        return self._latest

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> mx.array:
        """Return the mask (R, 1, T, L + T): causal, within the row's path and the window."""
        return self._masks(window_size)


def _behind(pool_PHD: mx.array, path_RL: mx.array, new_RHTD: mx.array) -> mx.array:
    past_RLHD = mx.take(pool_PHD, path_RL, axis=0)
    return mx.concatenate([past_RLHD.transpose(0, 2, 1, 3), new_RHTD], axis=2)


def branch_caches(
    layers: int,
    paths: Sequence[np.ndarray],
    length: int,
    pool: Pool,
    dtype: mx.Dtype,
    *,
    additive: bool,
    kv_format: KVFormat | None = None,
) -> list[BranchCache]:
    """Return the caches of a batch, one a layer.

    Args:
        layers: Caches that the model expects.
        paths: For each row the places in ``pool`` of the positions before it.
        length: T, positions of a row, padding included.
        pool: Keys and values computed so far; empty if no row has a path.
        dtype: What attention computes in.
        additive: Whether masks are 0 and -inf, to be added; else booleans.
        kv_format: What keys and values are rounded to; None leaves them.
    """
    offsets_R = np.array([len(path) for path in paths])
    masks = _PathMasks(offsets_R, length, dtype, additive)
    same = bool((offsets_R == offsets_R[0]).all())
    offset = int(offsets_R[0]) if same else mx.array(offsets_R.astype(np.int32))
    before = int(offsets_R.max())
    if not before:
        return [BranchCache(None, 0, masks, kv_format) for _ in range(layers)]
    path_RL = np.zeros((len(paths), before), dtype=np.int32)
    for row, path in enumerate(paths):
        path_RL[row, : len(path)] = path
    places = mx.array(path_RL)
    return [BranchCache((*pair, places), offset, masks, kv_format) for pair in pool]


def batch_pool(caches: Sequence[BranchCache], real: np.ndarray) -> Pool:
    """Return the keys and values of a batch, padding removed, as new positions of the pool.

    Args:
        caches: After the forward pass.
        real: Flat indices into (R, T) of the positions to keep, in order.
    """
    places = mx.array(real.astype(np.int32))

    def flat(new_RHTD: mx.array | None) -> mx.array:
        assert new_RHTD is not None
        R, H, T, D = new_RHTD.shape
        return mx.take(new_RHTD.transpose(0, 2, 1, 3).reshape(R * T, H, D), places, axis=0)

    return [(flat(cache.keys), flat(cache.values)) for cache in caches]


def grown(pool: Pool, additions: Sequence[Pool]) -> Pool:
    """Return ``pool`` with ``additions`` behind it, evaluated layer by layer."""
    sources = [source for source in (pool, *additions) if source]
    if len(sources) == 1:
        return sources[0]
    result: Pool = []
    for layer in zip(*sources, strict=True):
        keys = mx.concatenate([keys for keys, _ in layer])
        values = mx.concatenate([values for _, values in layer])
        mx.eval(keys, values)
        result.append((keys, values))
    return result


@dataclass(frozen=True)
class Sharing:
    """Whether and how a model's prefixes can be shared.

    Attributes:
        reason: Why they cannot; empty if they can.
        layers: Caches that the model expects.
        position_bytes: Bytes of keys and values of one position.
        dtype: What the hidden states and the masks are in.
        additive: Whether masks are added; some attention only takes booleans.
    """

    reason: str
    layers: int
    position_bytes: int
    dtype: mx.Dtype
    additive: bool


def probe(model: nn.Module, body: Callable[..., mx.array]) -> Sharing:
    """Check that two rows with prefixes of different lengths get the states they have alone.

    Args:
        model: Its caches must be plain or rotating keys and values to be shared.
        body: tokens (R, T), caches -> hidden states or logits (R, T, …).
    """
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    tokens_RT = mx.array(_PROBE_TOKENS)
    alone = body(tokens_RT, cache=None)
    # The fused kernel of a GPU is fastest with booleans; on a CPU adding is cheaper.
    first, *others = [False] if on_gpu() else [True, False]
    sharing = Sharing("", len(caches), 0, alone.dtype, first)
    names = sorted({type(cache).__name__ for cache in caches})
    plain = all(isinstance(cache, (KVCache, RotatingKVCache)) for cache in caches)
    if divided_by(model) is not None:  # into blocks, of which other ranks have others
        kinds = gather([plain, names])
        plain = all(one[0] for one in kinds)
        names = sorted({name for one in kinds for name in one[1]})
    if not plain:
        return replace(sharing, reason=f"its cache is a {' and a '.join(names)}")
    sharing = _tried(sharing, body, alone)
    for additive in others if sharing.reason else ():
        sharing = _tried(replace(sharing, reason="", additive=additive), body, alone)
    return replace(sharing, position_bytes=largest(model, sharing.position_bytes))


def _tried(sharing: Sharing, body: Callable[..., mx.array], alone: mx.array) -> Sharing:
    """Return ``sharing`` with the bytes of a position, or with the reason why it cannot be."""
    first, second = _PROBE
    tokens_RT = mx.array(_PROBE_TOKENS)

    def caches(paths: Sequence[np.ndarray], length: int, pool: Pool) -> list[BranchCache]:
        layers, dtype = sharing.layers, sharing.dtype
        return branch_caches(layers, paths, length, pool, dtype, additive=sharing.additive)

    try:
        empty = np.zeros(0, dtype=np.int32)
        roots = caches([empty, empty], first, [])
        body(tokens_RT[:, :first], cache=roots)
        pool = batch_pool(roots, np.arange(2 * first))
        paths = [np.arange(first), first + np.arange(second)]
        pairs = []
        for more in _MORE:
            spans = [(0, first, first + more), (1, second, second + more)]
            rows = mx.stack([tokens_RT[row, begin:end] for row, begin, end in spans])
            expected = mx.stack([alone[row, begin:end] for row, begin, end in spans])
            pairs.append((body(rows, cache=caches(paths, more, pool)), expected))
    except (TypeError, ValueError, AttributeError, AssertionError) as error:
        reason = f"it does not accept a shared cache ({' '.join(str(error).split())[:120]})"
        return replace(sharing, reason=reason)
    if not all(logits_close(one, other, Change.SHAPES).close for one, other in pairs):
        return replace(sharing, reason="with a shared cache its hidden states differ")
    size = sum(keys.nbytes + values.nbytes for keys, values in pool) // (2 * first)
    return replace(sharing, position_bytes=size)
