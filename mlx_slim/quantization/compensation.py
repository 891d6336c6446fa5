"""An adapter that makes up for the error of quantization, without training (EoRA, 2410.21271).

Invariant: for each linear layer of the blocks the adapter is the best of its rank: with E the error
of its weight and C the second moment of its inputs, E[x xᵀ], no other makes (E − BA) x smaller in
the mean square. Blocks are passed in order, each sees what the compensated ones before it compute;
one block's second moments and one dense weight are in memory. Try it:
``mlx-slim quantize MODEL -o DIR --bits 3 --compensate 16``.

Shapes: N rows, T tokens a row, I inputs, O outputs, R rank, K directions that the inputs have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.adapters.inject import Injected, Site, place, sites, summary
from mlx_slim.adapters.lora import Adapter, dimensions
from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.quantized import dequantize_weight
from mlx_slim.models.route import FromBlock, splits_at_blocks
from mlx_slim.progress import tracked

_NONE = 1e-12  # of the largest eigenvalue: a direction that the inputs do not have


@dataclass(frozen=True)
class Factors:
    """The best update of a rank.

    Attributes:
        a_RI: A, float64.
        b_OR: B, float64; columns as long as the rows of A.
        before: Mean square of E x.
        after: Mean square of (E − BA) x: the squared singular values that were dropped.
    """

    a_RI: np.ndarray
    b_OR: np.ndarray
    before: float
    after: float


def best_factors(error_OI: np.ndarray, moment_II: np.ndarray, rank: int) -> Factors:
    """Return A and B of rank R with the least mean square of (E − BA) x.

    With C = QΛQᵀ it is the SVD of E Q Λ^½, cut to R: B = U, A = Uᵀ E, where U holds the R strongest
    directions of E C Eᵀ. arXiv 2410.21271 has A = Uᵀ E Q Λ^½ (Λ^½)⁺ Qᵀ, which differs from it only
    for inputs that the calibration never had, where it corrects nothing; ‖(1 − UUᵀ) E x‖ is at most
    ‖E x‖ for every x, so the whole of Uᵀ E is taken. The smaller Gram matrix is decomposed.

    Args:
        error_OI: E = W − quantized W.
        moment_II: C = E[x xᵀ], singular where the text has fewer tokens than I.
        rank: R, at most the smaller of O and I.
    """
    error_OI, moment_II = error_OI.astype(np.float64), moment_II.astype(np.float64)
    outputs, inputs = error_OI.shape
    if outputs <= inputs:
        squares_K, directions_OK = np.linalg.eigh(error_OI @ moment_II @ error_OI.T)
        u_OR = directions_OK[:, ::-1][:, :rank]
    else:
        values_I, q_II = np.linalg.eigh(moment_II)
        present = values_I > _NONE * max(values_I[-1], 0.0)
        scaled_OK = error_OI @ (q_II[:, present] * np.sqrt(values_I[present]))
        squares_K, right_KK = np.linalg.eigh(scaled_OK.T @ scaled_OK)
        u_OR = np.linalg.qr(_padded(scaled_OK @ right_KK[:, ::-1][:, :rank], rank))[0]
    a_RI = u_OR.T @ error_OI
    lengths_R = np.linalg.norm(a_RI, axis=1)
    root_R = np.sqrt(np.where(lengths_R > 0, lengths_R, 1.0))  # both factors fit into 16 bits
    descending_K = np.maximum(squares_K[::-1], 0.0)
    return Factors(
        a_RI / root_R[:, None],
        u_OR * root_R,
        float(descending_K.sum()),
        float(descending_K[rank:].sum()),
    )


def _padded(columns_OK: np.ndarray, rank: int) -> np.ndarray:
    """Return R columns, the last ones zero where the inputs have fewer directions."""
    return np.pad(columns_OK, ((0, 0), (0, rank - columns_OK.shape[1])))


@dataclass(frozen=True)
class Compensated:
    """What the adapters make up for.

    Attributes:
        injected: The adapters, which are on the model.
        remaining: Mean over layers of the fraction of the mean square error of the outputs that is
            left, on calibration text.
        left_out: Quantized layers of the blocks without an adapter: experts of a mixture, and
            layers smaller than the rank.
    """

    injected: Injected
    remaining: float
    left_out: list[str]


def compensate(
    model: nn.Module,
    originals: Mapping[str, nn.Module],
    rows_NT: mx.array,
    rank: int,
    stored: mx.Dtype,
) -> Compensated:
    """Put adapters on the quantized linear layers of the blocks of ``model``.

    Args:
        model: Quantized, without adapters.
        originals: Path -> dense module with the weight that was quantized; opened, not read: each
            is dropped once it was used.
        rows_NT: Calibration token ids.
        rank: R.
        stored: Dtype of the factors.

    Raises:
        SlimError: If no layer takes an adapter of that rank.
    """
    quantized = [s for s in sites(model) if s.block is not None and "scales" in s.module]
    chosen = [
        site
        for site in quantized
        if structure.is_linear(site.module) and min(dimensions(site.module)) >= rank
    ]
    if not chosen:
        raise SlimError(
            f"no quantized linear layer of the blocks is {rank} wide: none takes that rank",
            "set a smaller --compensate",
        )
    placed = dict(place(model, chosen, rank, 1.0, 0.0, dora=False))
    for adapter in placed.values():
        adapter.lora_a = mx.zeros_like(adapter.lora_a)
    by_block: dict[int, list[Site]] = {}
    for site in chosen:
        assert site.block is not None
        by_block.setdefault(site.block, []).append(site)
    apart = splits_at_blocks(model, rows_NT[:1])
    passing = FromBlock(model, rows_NT)
    remaining: list[float] = []
    for block in tracked(sorted(by_block), "compensating for the error of each block", "blocks"):
        if apart:
            passing.advance(block)
        moments = passing.second_moments(block, [site.inside for site in by_block[block]])
        for site in by_block[block]:
            original: Any = originals[site.path]
            error = original["weight"].astype(mx.float32) - dequantize_weight(site.module)
            factors = best_factors(np.array(error), np.array(moments[site.inside]), rank)
            original["weight"] = mx.array([])
            _set(placed[site.path], factors, stored)
            remaining.append(factors.after / factors.before if factors.before else 0.0)
    taken = {site.path for site in chosen}
    return Compensated(
        summary(model, list(placed.items()), 1.0, float(rank)),
        sum(remaining) / len(remaining),
        [site.path for site in quantized if site.path not in taken],
    )


def _set(adapter: Adapter, factors: Factors, stored: mx.Dtype) -> None:
    adapter.lora_a = mx.array(factors.a_RI.T.astype(np.float32)).astype(stored)
    adapter.lora_b = mx.array(factors.b_OR.T.astype(np.float32)).astype(stored)
    mx.eval(adapter.lora_a, adapter.lora_b)
