"""The block formats Q4_K, Q5_K and Q6_K of llama.cpp, which the ``gguf`` package only reads.

A block holds 256 weights of a row. Q4_K and Q5_K: 8 groups of 32, w = d·s·q - e·m with codes q, a
scale s and an offset m of 6 bits a group, and float16 d and e a block. Q6_K: 16 groups of 16,
w = d·s·q with signed codes of 6 bits and signed scales of 8. Invariant: ``gguf.dequantize`` of
what is returned gives exactly these products; the result depends on the weights alone, not on the
number of threads. Codes, scales and offsets of a group minimize its squared error, each weight
counted |w| + RMS of its group: over a grid of scales, by alternating least squares, and over the
neighbours of what six bits round to. Try it:
``mlx-slim export MODEL --to gguf --type q4_k -o DIR``.

Shapes: N blocks, S groups, L weights of a group, J groups of a block. Groups stand side by side in
(L, S), so that every operation runs along contiguous memory.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK = 256
_CHUNK = 1024  # blocks that a thread works on at once: a megabyte an array
# By how much the largest code of a group is raised before the grid rounds; clipping pays off.
_GRID = np.linspace(-1, 3, 9, dtype=np.float32)
_ROUNDS = 2  # of least squares after the grid
_LEVELS = {"Q4_K": 15, "Q5_K": 31}


def quantize_k(weight_RC: np.ndarray, kind: str) -> np.ndarray:
    """Return the blocks (R, bytes) of ``weight_RC``.

    Args:
        weight_RC: float32, finite; C is a multiple of 256.
        kind: ``Q4_K``, ``Q5_K`` or ``Q6_K``: 144, 176 or 210 bytes a block.
    """
    rows = len(weight_RC)
    blocks = weight_RC.reshape(-1, BLOCK)
    chunks = [blocks[start : start + _CHUNK] for start in range(0, len(blocks), _CHUNK)]

    def encode(chunk: np.ndarray) -> np.ndarray:
        return _q6_k(chunk) if kind == "Q6_K" else _q45_k(chunk, _LEVELS[kind])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(encode, chunks))).reshape(rows, -1)


def _q45_k(block_N256: np.ndarray, levels: int) -> np.ndarray:
    x_LS = np.ascontiguousarray(block_N256.reshape(-1, 32).T)
    w_LS = _importance(x_LS)
    scale_S, offset_S = _fit_affine(x_LS, w_LS, levels)
    d_N, s_NJ = _six_bits(scale_S.reshape(-1, 8))
    e_N, m_NJ = _six_bits(offset_S.reshape(-1, 8))

    def rounded(s_NJ: np.ndarray, m_NJ: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the codes and the weights that they stand for."""
        scale_S = (_float(d_N)[:, None] * s_NJ).reshape(-1)
        offset_S = (_float(e_N)[:, None] * m_NJ).reshape(-1)
        q_LS = (x_LS + offset_S) * _inverse(scale_S)
        np.clip(np.rint(q_LS, out=q_LS), 0, levels, out=q_LS)
        return q_LS, q_LS * scale_S - offset_S

    # Six bits round scale and offset each by itself; a neighbour of the pair may fit better.
    best = s_NJ, m_NJ, np.full_like(s_NJ, np.inf)
    for s_step, m_step in itertools.product((0, -1, 1), repeat=2):
        near = np.clip(s_NJ + s_step, 0, 63), np.clip(m_NJ + m_step, 0, 63)
        error_LS = rounded(*near)[1] - x_LS
        error_NJ = np.einsum("ls,ls,ls->s", w_LS, error_LS, error_LS).reshape(-1, 8)
        won = error_NJ < best[2]
        best = tuple(np.where(won, a, b) for a, b in zip((*near, error_NJ), best, strict=True))
    s_NJ, m_NJ = best[:2]
    q_LS = rounded(s_NJ, m_NJ)[0].astype(np.uint8)
    q_NJL = np.ascontiguousarray(q_LS.T).reshape(-1, 8, 32)
    return pack_q45_k(d_N, e_N, s_NJ.astype(np.uint8), m_NJ.astype(np.uint8), q_NJL, levels)


def _q6_k(block_N256: np.ndarray) -> np.ndarray:
    x_LS = np.ascontiguousarray(block_N256.reshape(-1, 16).T)
    scale_NJ = _fit_symmetric(x_LS).reshape(-1, 16)
    # The largest scale becomes -128, the longer side of eight bits.
    largest_N = np.take_along_axis(scale_NJ, np.abs(scale_NJ).argmax(1)[:, None], 1)[:, 0]
    d_N = (largest_N / -128).astype(np.float16)
    s_NJ = np.clip(np.rint(scale_NJ * _inverse(_float(d_N))[:, None]), -128, 127)
    scale_S = (_float(d_N)[:, None] * s_NJ).reshape(-1)
    q_LS = np.clip(np.rint(x_LS * _inverse(scale_S)), -32, 31).astype(np.int8)
    q_NJL = np.ascontiguousarray(q_LS.T).reshape(-1, 16, 16)
    return pack_q6_k(d_N, s_NJ.astype(np.int8), q_NJL)


def pack_q45_k(
    d_N: np.ndarray,
    e_N: np.ndarray,
    s_NJ: np.ndarray,
    m_NJ: np.ndarray,
    q_NJL: np.ndarray,
    levels: int,
) -> np.ndarray:
    """Return blocks (N, 144 or 176): d, e, twelve bytes of scales and offsets, codes.

    Args:
        d_N: float16, what a scale is a multiple of.
        e_N: float16, what an offset is a multiple of.
        s_NJ: uint8 below 64, the scales of 8 groups.
        m_NJ: uint8 below 64, their offsets.
        q_NJL: uint8, codes (N, 8, 32) up to ``levels``.
        levels: 15 of Q4_K, 31 of Q5_K, whose fifth bits stand before the other four.
    """
    # Six bits of groups 0 to 3; above them the two high bits of groups 4 to 7; their low four last.
    high_s, high_m = s_NJ[:, 4:] >> 4, m_NJ[:, 4:] >> 4
    fields = [
        d_N[:, None].view(np.uint8),
        e_N[:, None].view(np.uint8),
        s_NJ[:, :4] | high_s << 6,
        m_NJ[:, :4] | high_m << 6,
        s_NJ[:, 4:] & 15 | (m_NJ[:, 4:] & 15) << 4,
    ]
    if levels == _LEVELS["Q5_K"]:
        fields.append(np.packbits(q_NJL >> 4, axis=1, bitorder="little").reshape(-1, 32))
    low = q_NJL & 15
    fields.append((low[:, 0::2] | low[:, 1::2] << 4).reshape(-1, 128))
    return np.concatenate(fields, axis=1)


def pack_q6_k(d_N: np.ndarray, s_NJ: np.ndarray, q_NJL: np.ndarray) -> np.ndarray:
    """Return blocks (N, 210): low four bits of the codes, high two, scales, d.

    Args:
        d_N: float16, what a scale is a multiple of.
        s_NJ: int8, the scales of 16 groups.
        q_NJL: int8, codes (N, 16, 16) from -32 to 31.
    """
    # Half a block is 4 runs of 32; a low byte holds runs i and i + 2, a high one all four.
    codes = (q_NJL + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = codes[:, :, :2] & 15 | (codes[:, :, 2:] & 15) << 4
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce(codes >> 4 << shifts, axis=2)
    return np.concatenate(
        [
            low.reshape(-1, 128),
            high.reshape(-1, 64),
            s_NJ.view(np.uint8),
            d_N[:, None].view(np.uint8),
        ],
        axis=1,
    )


def _float(half_N: np.ndarray) -> np.ndarray:
    return half_N.astype(np.float32)


def _inverse(value: np.ndarray) -> np.ndarray:
    """Return 1 / value, and 0 for 0."""
    return np.divide(1, value, out=np.zeros_like(value), where=value != 0)


def _six_bits(value_NJ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (float16 unit (N,), multiples from 0 to 63 (N, J)) of values that are not negative."""
    unit_N = (value_NJ.max(1) / 63).astype(np.float16)
    return unit_N, np.clip(np.rint(value_NJ * _inverse(_float(unit_N))[:, None]), 0, 63)


def _importance(x_LS: np.ndarray) -> np.ndarray:
    return np.abs(x_LS) + np.sqrt(np.einsum("ls,ls->s", x_LS, x_LS) / len(x_LS))


def _fit_affine(x_LS: np.ndarray, w_LS: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (scale, offset), neither negative: x ≈ scale · q - offset with q from 0 to levels."""
    w_S, wx_S = w_LS.sum(0), np.einsum("ls,ls->s", w_LS, x_LS)
    low_S = np.minimum(x_LS.min(0), 0)
    unit_S = _inverse(x_LS.max(0) - low_S)
    best = np.zeros_like(low_S), -low_S, np.full_like(low_S, np.inf)

    def better(scale_S: np.ndarray, start_S: np.ndarray) -> tuple[np.ndarray, ...]:
        """Round with 1 / scale from ``start``, fit by least squares; keep what is better."""
        q_LS = (x_LS - start_S) * scale_S
        np.clip(np.rint(q_LS, out=q_LS), 0, levels, out=q_LS)
        wq_LS = w_LS * q_LS
        wq_S, wqq_S = wq_LS.sum(0), np.einsum("ls,ls->s", wq_LS, q_LS)
        wqx_S = np.einsum("ls,ls->s", wq_LS, x_LS)
        scale_S = (w_S * wqx_S - wq_S * wx_S) * _inverse(w_S * wqq_S - wq_S * wq_S)
        offset_S = (scale_S * wq_S - wx_S) * _inverse(w_S)
        scale_S = np.where(offset_S < 0, wqx_S * _inverse(wqq_S), scale_S)
        offset_S = np.maximum(offset_S, 0)
        # Σ w (scale q - offset - x)² without Σ w x², which all candidates share.
        error_S = scale_S * (scale_S * wqq_S - 2 * (wqx_S + offset_S * wq_S))
        error_S += offset_S * (offset_S * w_S + 2 * wx_S)
        won = (error_S < best[2]) & (scale_S >= 0)
        new = scale_S, offset_S, error_S
        return tuple(np.where(won, a, b) for a, b in zip(new, best, strict=True))

    for raised in _GRID:
        best = better((levels + raised) * unit_S, low_S)
    for _ in range(_ROUNDS):
        best = better(_inverse(best[0]), -best[1])
    return best[0], best[1]


def _fit_symmetric(x_LS: np.ndarray) -> np.ndarray:
    """Return the scale of either sign: x ≈ scale · q with q from -32 to 31."""
    w_LS = _importance(x_LS)
    # The longer side of the codes is for the weight that is largest.
    largest_S = np.take_along_axis(x_LS, np.abs(x_LS).argmax(0)[None], 0)[0]
    unit_S = _inverse(-largest_S)
    best = np.zeros_like(unit_S), np.zeros_like(unit_S)

    def better(scale_S: np.ndarray) -> tuple[np.ndarray, ...]:
        q_LS = x_LS * scale_S
        np.clip(np.rint(q_LS, out=q_LS), -32, 31, out=q_LS)
        wq_LS = w_LS * q_LS
        wqx_S = np.einsum("ls,ls->s", wq_LS, x_LS)
        scale_S = wqx_S * _inverse(np.einsum("ls,ls->s", wq_LS, q_LS))
        gain_S = scale_S * wqx_S  # by how much the squared error is less than that of zeros
        won = gain_S > best[1]
        return tuple(np.where(won, a, b) for a, b in zip((scale_S, gain_S), best, strict=True))

    for raised in _GRID:
        best = better((32 + raised) * unit_S)
    for _ in range(_ROUNDS):
        best = better(_inverse(best[0]))
    return best[0]
