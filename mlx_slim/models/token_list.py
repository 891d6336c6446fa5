"""Attention and rotary positions of a list of token runs, where a CPU computes without a gradient.

Runs that share what they begin with stand one behind the other in one list (1, P), as in training
(``models/prefix_attention.py``): all else in a model is computed position by position, so nothing
is padded, and its matrix products have as many rows as the list has tokens. Here NumPy computes
attention, a few runs at a time, for any number of threads, each with another list; positions
before the whole list may have been computed earlier. Invariant: a position gets the hidden state
that it has in a row alone, to float32 rounding, whatever other runs the list holds. Nothing of
it is for a GPU. Try it: ``python -m pytest tests/models/test_token_list.py``.

Legend: P positions of the list, B positions before it, K heads of keys, G heads of queries a head
of keys, H = K · G, T queries of a tile, S keys, D width of a head.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.models.attention import UNBOUNDED, attention_of
from mlx_slim.models.prefix_attention import PathNode, merged_spans, why_not
from mlx_slim.models.replacement import Functions, Replacement
from mlx_slim.threads import check_awaited

Before = list[tuple[np.ndarray, np.ndarray]]  # of each layer: keys and values (K, B, D)
TILE = 128  # queries whose scores exist at one time
BLOCK = 1 << 17  # scores at a time, where heads are enough: what a core's cache holds
_LEAST = np.float32(np.finfo(np.float32).min)
_lists = threading.local()  # the list that a thread computes


class _ListTile(NamedTuple):
    """Queries ``begin`` to ``end``, the ``spans`` of keys they see, what is added to the last."""

    begin: int
    end: int
    spans: tuple[tuple[int, int], ...]
    hidden_TT: np.ndarray


class TokenList:
    """A list of token runs on its way through a model.

    Args:
        nodes: Its runs, parents before children and siblings in a row.
        before: Keys and values of the positions before the list, which all of it sees.
        keep: Whether to note keys and values of the list, in ``pairs``.

    Attributes:
        pairs: Keys and values of all positions so far, those of ``before`` included.
    """

    def __init__(
        self, nodes: Sequence[PathNode], before: Before | None = None, *, keep: bool = False
    ) -> None:
        self._before, self._keep = before or [], keep
        self.pairs: Before = []
        self._layer = 0
        self._length = nodes[-1].end
        self._tiles = list(_tiles(nodes))
        first = self._before[0][0].shape[1] if self._before else 0
        depths = [np.arange(node.depth, node.depth + node.end - node.begin) for node in nodes]
        self._depths_P = mx.array((np.concatenate(depths) + first).astype(np.int32))

    @contextlib.contextmanager
    def computed(self) -> Iterator[None]:
        """Let what this thread computes inside, in ``token_lists``, be this list; once."""
        _lists.current = self
        try:
            yield
        finally:
            _lists.current = None

    def rotated(
        self, rope: Any, x: mx.array, *arguments: Any, offset: Any = 0, **named: Any
    ) -> Any:
        """Return ``x`` (1, H, P, D) at its rotary positions: its tokens as rows of one position."""
        self._check(x)
        tokens_P1 = mx.swapaxes(x, 0, 2)
        return mx.swapaxes(
            rope(tokens_P1, *arguments, offset=self._depths_P + offset, **named), 0, 2
        )

    def attended(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **named: Any
    ) -> mx.array:
        """Return causal attention (1, H, P, D) of each position to those before it on its path."""
        check_awaited()
        for x in (q, k, v):
            self._check(x)
        if (mask is None and self._length > 1) or named.get("sinks") is not None:
            raise ValueError("attention that is not causal, or has sinks")
        mx.eval(q, k, v)
        q_HPD, k_KPD, v_KPD = (np.asarray(x)[0] for x in (q, k, v))
        k_KBD, v_KBD = self._before[self._layer] if self._before else (k_KPD[:, :0], v_KPD[:, :0])
        self._layer += 1
        if self._keep:
            pairs = ((k_KBD, k_KPD), (v_KBD, v_KPD))
            self.pairs.append(tuple(np.concatenate(pair, axis=1) for pair in pairs))  # type: ignore[arg-type]
        q_KGPD = q_HPD.reshape(len(k_KPD), -1, *q_HPD.shape[1:])
        out_HPD = np.empty((*q_HPD.shape[:2], v_KPD.shape[-1]), np.float32)
        out_KGPD = out_HPD.reshape(*q_KGPD.shape[:3], -1)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so
            for tile in self._tiles:
                here = slice(tile.begin, tile.end)
                keys, values = (_joined(x, tile.spans) for x in (k_KPD, v_KPD))
                out_KGPD[:, :, here] = _attention(
                    q_KGPD[:, :, here] * np.float32(scale),
                    (k_KBD, keys),
                    (v_KBD, values),
                    tile.hidden_TT,
                )
        return mx.array(out_HPD[None])

    def _check(self, x: mx.array) -> None:
        if x.shape[0] != 1 or x.shape[-2] != self._length or x.dtype != mx.float32:
            raise ValueError(f"not a list of {self._length} positions in float32: {x.shape}")


def _current() -> TokenList | None:
    return getattr(_lists, "current", None)


def _around(rope: Callable[..., Any], attention: Callable[..., Any]) -> Functions:
    """Return rotary positions and attention of a thread's list; those of MLX where it has none."""

    def rotated(x: mx.array, *arguments: Any, **named: Any) -> Any:
        if (current := _current()) is None:
            return rope(x, *arguments, **named)
        return current.rotated(rope, x, *arguments, **named)

    def attended(*qkv: mx.array, **named: Any) -> mx.array:
        current = _current()
        return attention(*qkv, **named) if current is None else current.attended(*qkv, **named)

    return rotated, attended


# Models computed in this context, in any thread, compute that thread's list.
token_lists = Replacement([(mx.fast, "rope"), (mx.fast, "scaled_dot_product_attention")], _around)


def _tiles(nodes: Sequence[PathNode]) -> Iterator[_ListTile]:
    """Yield what is computed at a time: a run, or its pieces, or short siblings with one path."""
    for path, siblings in itertools.groupby(nodes, key=lambda node: tuple(node.path)):
        group: list[PathNode] = []
        for node in siblings:
            if group and (node.begin != group[-1].end or node.end - group[0].begin > TILE):
                yield _several(path, group)
                group = []
            if node.end - node.begin <= TILE:
                group.append(node)
                continue
            for begin in range(node.begin, node.end, TILE):
                end = min(begin + TILE, node.end)
                spans = merged_spans((*path, (node.begin, end)))
                yield _ListTile(begin, end, spans, _causal(end - begin))
        if group:
            yield _several(path, group)


def _several(path: tuple[tuple[int, int], ...], group: list[PathNode]) -> _ListTile:
    """Return the tile of neighbours behind one path, which do not see each other."""
    begin, end = group[0].begin, group[-1].end
    hidden = _causal(end - begin)
    if len(group) > 1:
        hidden = hidden.copy()
        for node in group[1:]:
            hidden[node.begin - begin :, : node.begin - begin] = _LEAST
    return _ListTile(begin, end, merged_spans((*path, (begin, end))), hidden)


@functools.lru_cache(TILE)
def _causal(length: int) -> np.ndarray:
    return np.triu(np.full((length, length), _LEAST), 1)


def _joined(x_KPD: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    pieces = [x_KPD[:, begin:end] for begin, end in spans]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def _attention(
    q_KGTD: np.ndarray,
    keys: tuple[np.ndarray, np.ndarray],
    values: tuple[np.ndarray, np.ndarray],
    hidden_TT: np.ndarray,
) -> np.ndarray:
    """Return softmax(q · kᵀ) · v (K, G, T, D) over (K, B, D) keys before, and (K, S, D) others."""
    K, G, T, D = q_KGTD.shape
    q_KMD = q_KGTD.reshape(K, G * T, D)
    first = keys[0].shape[1]
    total = first + keys[1].shape[1]
    result_KMD = np.empty((K, G * T, values[1].shape[-1]), np.float32)
    step = max(1, BLOCK // (G * T * total))
    for begin in range(0, K, step):
        heads = slice(begin, begin + step)
        scores = np.empty((len(q_KMD[heads]), G * T, total), np.float32)
        np.matmul(q_KMD[heads], keys[1][heads].swapaxes(1, 2), out=scores[..., first:])
        if first:
            np.matmul(q_KMD[heads], keys[0][heads].swapaxes(1, 2), out=scores[..., :first])
        scores.reshape(-1, G, T, total)[..., -T:] += hidden_TT
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        result = np.matmul(scores[..., first:], values[1][heads], out=result_KMD[heads])
        if first:
            result += scores[..., :first] @ values[0][heads]
        result /= scores.sum(axis=-1, keepdims=True)
    return result_KMD.reshape(K, G, T, -1)


def longest_row(model: nn.Module) -> int:
    """Return how many tokens rows may have for ``model`` to compute lists of them; 0 for none."""
    windows = [layer.window for layer in attention_of(model) or () if layer.window]
    longest = min(windows, default=UNBOUNDED)
    return 0 if why_not(model, longest, _computed) else longest


@contextlib.contextmanager
def _computed(nodes: Sequence[PathNode]) -> Iterator[None]:
    with token_lists(), TokenList(nodes).computed():
        yield
