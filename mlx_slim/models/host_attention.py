"""Attention and SwiGLU with their backward passes in NumPy, for a CPU.

An exponential takes MLX 10 to 19 ns on x86 and NumPy 1. Queries are computed in tiles, without the
keys behind a tile, and weights are computed again in the backward pass, from the log-sum-exp of
each query (arXiv 2205.14135). Invariant: the values and gradients of MLX's operations to float32
rounding. Inputs are float32 and are not written to. Try it:
``python -m pytest tests/models/test_host_attention.py``.

Legend: B rows, H heads, K heads of keys, G = H / K, T queries, S keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_slim.models.host_exponentials import BLOCK
from mlx_slim.models.prefix_attention import PathNode, merged_spans

_TILE = 128  # queries whose scores exist at one time
_LEAST = np.float32(np.finfo(np.float32).min)
# What is not finite comes out so, and training says it of the loss; NumPy need not warn.
_SILENT = np.errstate(invalid="ignore", over="ignore")


class _Tile(NamedTuple):
    """Queries of a row, and the keys that they may see.

    ``spans``: of the keys, in order. ``causal``: how many of the last keys are causal among
    themselves: query i of the tile sees all keys but the last ``causal - 1 - i``.
    """

    row: int
    begin: int
    end: int
    spans: tuple[tuple[int, int], ...]
    causal: int


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees.

    Attributes:
        causal: Those up to its position, else all.
        mask: (B or 1, H or 1, T, S), true where it sees, or numbers that are added to the scores.
        nodes: A list of positions that rows share (``prefix_attention``), causal along each path.
    """

    causal: bool = False
    mask: np.ndarray | None = None
    nodes: Sequence[PathNode] | None = None

    def tiles(self, rows: int, queries: int, keys: int) -> Iterator[_Tile]:
        """Yield what is computed at a time."""
        if self.nodes is not None:
            for node in self.nodes:
                for begin in range(node.begin, node.end, _TILE):
                    end = min(begin + _TILE, node.end)
                    spans = merged_spans((*node.path, (node.begin, end)))
                    yield _Tile(0, begin, end, spans, end - begin)
            return
        for row in range(rows):
            for begin in range(0, queries, _TILE):
                end = min(begin + _TILE, queries)
                seen = keys - queries + end if self.causal else keys
                yield _Tile(row, begin, end, ((0, seen),), end - begin if self.causal else 0)


def _gathered(x_BKSD: np.ndarray, tile: _Tile, head: int) -> np.ndarray:
    """Return the keys or values of a tile (S, D)."""
    pieces = [x_BKSD[tile.row, head, begin:end] for begin, end in tile.spans]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _scattered(total_BKSD: np.ndarray, tile: _Tile, head: int, values_SD: np.ndarray) -> None:
    """Add the gradient of a tile's keys or values to that of all."""
    at = 0
    for begin, end in tile.spans:
        total_BKSD[tile.row, head, begin:end] += values_SD[at : at + end - begin]
        at += end - begin


def _scores(
    q_GTD: np.ndarray, k_SD: np.ndarray, scale: float, visible: Visible, tile: _Tile, heads: slice
) -> np.ndarray:
    """Return the scores (G, T, S) of a tile, masked."""
    groups, length, width = q_GTD.shape
    scores = (q_GTD.reshape(-1, width) @ k_SD.T).reshape(groups, length, -1)
    scores *= np.float32(scale)
    if visible.mask is not None:
        mask = visible.mask
        rows = mask[tile.row if len(mask) > 1 else 0]
        rows = rows[heads if len(rows) > 1 else slice(0, 1), tile.begin : tile.end]
        if mask.dtype == bool:
            np.copyto(scores, _LEAST, where=~rows)
        else:
            scores += rows
    elif tile.causal > 1:
        later = np.triu(np.ones((length, tile.causal), dtype=bool), 1)
        np.copyto(scores[..., -tile.causal :], _LEAST, where=later)
    return scores


@_SILENT
def attention(
    q_BHTD: np.ndarray, k_BKSD: np.ndarray, v_BKSD: np.ndarray, scale: float, visible: Visible
) -> tuple[np.ndarray, np.ndarray]:
    """Return softmax(q · kᵀ · scale) · v (B, H, T, Dv), and log Σ exp of the scores (B, H, T)."""
    rows, heads, queries, _ = q_BHTD.shape
    groups = heads // k_BKSD.shape[1]
    output = np.empty((*q_BHTD.shape[:3], v_BKSD.shape[-1]), np.float32)
    sums_BHT = np.empty((rows, heads, queries), np.float32)
    for tile in visible.tiles(rows, queries, k_BKSD.shape[2]):
        for head in range(k_BKSD.shape[1]):
            several = slice(head * groups, (head + 1) * groups)
            at = (tile.row, several, slice(tile.begin, tile.end))
            keys, values = (_gathered(x, tile, head) for x in (k_BKSD, v_BKSD))
            weights = _scores(q_BHTD[at], keys, scale, visible, tile, several)
            peaks = weights.max(axis=-1, keepdims=True)
            weights -= peaks
            np.exp(weights, out=weights)
            totals = weights.sum(axis=-1, keepdims=True)
            result = (weights.reshape(-1, keys.shape[0]) @ values).reshape(*weights.shape[:2], -1)
            np.divide(result, totals, out=output[at])
            sums_BHT[at] = (np.log(totals) + peaks)[..., 0]
    return output, sums_BHT


@_SILENT
def attention_gradients(
    cotangent: np.ndarray,
    output: np.ndarray,
    sums_BHT: np.ndarray,
    q_BHTD: np.ndarray,
    k_BKSD: np.ndarray,
    v_BKSD: np.ndarray,
    scale: float,
    visible: Visible,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients by q, k and v; ``cotangent`` is that by ``output`` of ``attention``."""
    rows, heads, queries, width = q_BHTD.shape
    groups = heads // k_BKSD.shape[1]
    by_q = np.empty(q_BHTD.shape, np.float32)
    by_k, by_v = np.zeros(k_BKSD.shape, np.float32), np.zeros(v_BKSD.shape, np.float32)
    inner_BHT = np.einsum("bhtd,bhtd->bht", cotangent, output)
    for tile in visible.tiles(rows, queries, k_BKSD.shape[2]):
        for head in range(k_BKSD.shape[1]):
            several = slice(head * groups, (head + 1) * groups)
            at = (tile.row, several, slice(tile.begin, tile.end))
            keys, values = (_gathered(x, tile, head) for x in (k_BKSD, v_BKSD))
            q_MD = q_BHTD[at].reshape(-1, width)
            by_output = cotangent[at].reshape(-1, values.shape[-1])
            weights = _scores(q_BHTD[at], keys, scale, visible, tile, several)
            weights -= sums_BHT[at][..., None]
            np.exp(weights, out=weights)
            weights_MS = weights.reshape(-1, keys.shape[0])
            _scattered(by_v, tile, head, weights_MS.T @ by_output)
            by_scores = by_output @ values.T
            by_scores -= inner_BHT[at].reshape(-1, 1)
            by_scores *= weights_MS
            by_scores *= np.float32(scale)
            by_q[at] = (by_scores @ keys).reshape(by_q[at].shape)
            _scattered(by_k, tile, head, by_scores.T @ q_MD)
    return by_q, by_k, by_v


@_SILENT
def swiglu(gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return gate · sigmoid(gate) · up, and sigmoid(gate); arrays of one shape, contiguous."""
    result, sigmoids = np.empty_like(gate), np.empty_like(gate)
    flat = [x.reshape(-1) for x in (gate, up, result, sigmoids)]
    for begin in range(0, gate.size, BLOCK):
        gates, ups, out, sigmoid = (x[begin : begin + BLOCK] for x in flat)
        np.negative(gates, out=sigmoid)
        np.exp(sigmoid, out=sigmoid)  # infinity for x below -88: a sigmoid of 0
        sigmoid += 1.0
        np.reciprocal(sigmoid, out=sigmoid)
        np.multiply(gates, sigmoid, out=out)
        out *= ups
    return result, sigmoids


@_SILENT
def swiglu_gradients(
    cotangent: np.ndarray, gate: np.ndarray, up: np.ndarray, sigmoids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients by gate and up of ``swiglu``, whose sigmoids are given."""
    by_gate, by_up = np.empty_like(gate), np.empty_like(gate)
    flat = [x.reshape(-1) for x in (cotangent, gate, up, sigmoids, by_gate, by_up)]
    for begin in range(0, gate.size, BLOCK):
        factor, gates, ups, sigmoid, out, out_up = (x[begin : begin + BLOCK] for x in flat)
        silu = gates * sigmoid
        np.multiply(factor, silu, out=out_up)
        # d silu = sigmoid + silu · (1 - sigmoid)
        np.subtract(1.0, sigmoid, out=out)
        out *= silu
        out += sigmoid
        out *= ups
        out *= factor
    return by_gate, by_up
