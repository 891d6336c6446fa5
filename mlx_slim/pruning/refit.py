"""Refits the columns that stay when others are pruned: least squares, no adapter, no bytes.

Invariant: for W x of a layer that reads pruned groups, the columns W_k of those that stay become
W_k + W_r C_rk (C_kk + εI)⁻¹, where C = E[x xᵀ], r are the columns to go and ε is a share of the
mean diagonal of C_kk: the least mean square of W x − W_k x_k, with a ridge that keeps W_k where the
text says nothing. The share is the one that leaves the least error on half of the rows when the
other half is fitted; where each makes it worse the layer stays as it is. Blocks are passed in
order, the inputs x come from pruned and refitted ones; one block's second moments, of each half,
are in memory. Try it:
``mlx-slim prune MODEL -o DIR --ratio 0.2 --compensate``.

Shapes: N rows, T tokens a row, I inputs, O outputs, K columns that stay.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.models import structure
from mlx_slim.models.load import Loaded
from mlx_slim.models.route import FromBlock
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.streamed import Unread
from mlx_slim.progress import tracked
from mlx_slim.pruning.options import FORWARD_ROWS, PruneOptions
from mlx_slim.pruning.width import RetainedGroups
from mlx_slim.quantization.calibration import DEFAULT_SOURCE, read_calibration

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal of C_kk


def refitted(
    weight_OI: np.ndarray, moment_II: np.ndarray, stays_K: np.ndarray, ridge: float = _RIDGES[0]
) -> tuple[np.ndarray, float]:
    """Return the columns that stay (O, K), float64, and the fraction of the error that is left.

    Args:
        weight_OI: Of the layer.
        moment_II: C = E[x xᵀ] of its inputs.
        stays_K: Numbers of the columns that stay.
        ridge: Share of the mean diagonal of C_kk.
    """
    change_OK = _change(weight_OI, moment_II, stays_K, ridge)
    columns_OK = weight_OI[:, stays_K].astype(np.float64) + change_OK
    return columns_OK, _left(weight_OI, moment_II, stays_K, change_OK)


def best_ridge(
    weight_OI: np.ndarray, fitted_II: np.ndarray, judged_II: np.ndarray, stays_K: np.ndarray
) -> tuple[float | None, float]:
    """Return the ridge that generalizes best, and the fraction of the error that it leaves.

    Args:
        weight_OI: Of the layer.
        fitted_II: Second moments that are fitted.
        judged_II: Those of other tokens, on which the error is measured.
        stays_K: Numbers of the columns that stay.

    Returns:
        None and 1 where each ridge leaves more than no change at all.
    """
    best: tuple[float | None, float] = None, 1.0
    for ridge in _RIDGES:
        left = _left(weight_OI, judged_II, stays_K, _change(weight_OI, fitted_II, stays_K, ridge))
        if left < best[1]:
            best = ridge, left
    return best


def _change(
    weight_OI: np.ndarray, moment_II: np.ndarray, stays_K: np.ndarray, ridge: float
) -> np.ndarray:
    """Return what is added to the columns that stay, Δ (O, K), float64."""
    goes = _others(weight_OI, stays_K)
    moment_II = moment_II.astype(np.float64)
    among_KK = moment_II[np.ix_(stays_K, stays_K)]
    mean = float(np.diag(among_KK).mean()) or 1.0  # inputs may be zero
    among_KK[np.diag_indices_from(among_KK)] += ridge * mean
    across_OK = weight_OI[:, goes].astype(np.float64) @ moment_II[np.ix_(goes, stays_K)]
    return np.linalg.solve(among_KK, across_OK.T).T


def _left(
    weight_OI: np.ndarray, moment_II: np.ndarray, stays_K: np.ndarray, change_OK: np.ndarray
) -> float:
    """Return E‖W_r x_r − Δ x_k‖² as a fraction of E‖W_r x_r‖²; 0 where that is 0."""
    goes = _others(weight_OI, stays_K)
    lost_OR, moment_II = weight_OI[:, goes].astype(np.float64), moment_II.astype(np.float64)
    before = float(np.sum((lost_OR @ moment_II[np.ix_(goes, goes)]) * lost_OR))
    across_OK = lost_OR @ moment_II[np.ix_(goes, stays_K)]
    among_KK = moment_II[np.ix_(stays_K, stays_K)]
    after = before - 2 * np.sum(change_OK * across_OK) + np.sum((change_OK @ among_KK) * change_OK)
    return float(max(after, 0.0)) / before if before > 0 else 0.0


def _others(weight_OI: np.ndarray, stays_K: np.ndarray) -> np.ndarray:
    return np.setdiff1d(np.arange(weight_OI.shape[1]), stays_K)


def refit(model: nn.Module, retained: RetainedGroups, rows_NT: mx.array) -> list[float]:
    """Refit every layer of ``model`` that reads groups that go; it reads zeros of them afterwards.

    Args:
        model: The original.
        retained: Kind -> numbers of the groups that stay, by layer.
        rows_NT: Calibration token ids.

    Returns:
        For each layer that reads groups that go the fraction of the mean square error that is left
        on the half of the rows that was not fitted; 1 where the layer stays as it is.
    """
    halves = [range(first, len(rows_NT), 2) for first in range(min(2, len(rows_NT)))]
    blocks = structure.blocks(model)
    passing = FromBlock(model, rows_NT)
    left = []
    for number in tracked(range(len(blocks)), "refitting what reads pruned groups", "blocks"):
        families = [
            family
            for kind, family in structure.coupled(blocks[number]).items()
            if kind in retained and len(retained[kind][number]) < family.count
        ]
        outputs = [family.output for family in families]
        moments = [passing.second_moments(number, outputs, half) for half in halves]
        for family in families:
            layer: Any = blocks[number]
            for name in family.output.split("."):
                layer = layer[name]
            groups = retained[family.kind][number]
            stays_K = (groups[:, None] * family.width + np.arange(family.width)).reshape(-1)
            weight = layer["weight"]
            weight_OI = np.array(weight.astype(mx.float32))
            of_half = [np.array(one.pop(family.output)) for one in moments]
            ridge, remaining = best_ridge(weight_OI, of_half[0], of_half[-1], stays_K)
            columns_OK = weight_OI[:, stays_K]
            if ridge is not None:
                moment_II = np.average(of_half, axis=0, weights=[len(half) for half in halves])
                columns_OK = refitted(weight_OI, moment_II, stays_K, ridge)[0]
            weight_OI[:] = 0  # as if pruned already, for the blocks behind
            weight_OI[:, stays_K] = columns_OK
            layer["weight"] = mx.array(weight_OI).astype(weight.dtype)
            mx.eval(layer["weight"])
            left.append(remaining)
        if number + 1 < len(blocks):
            passing.advance(number + 1)
    return left


def refit_rows(loaded: Loaded | Unread, options: PruneOptions, validation: int) -> mx.array:
    """Return calibration rows (N, T), of the text behind what the result is compared on.

    Args:
        loaded: The original.
        options: Text, rows and their tokens; by default those of a method without gradients.
        validation: Tokens that the result is compared on.

    Raises:
        SlimError: If there is no such text.
    """
    limit = row_limit(loaded.config)
    samples, length = FORWARD_ROWS
    length = options.length or (min(length, limit.tokens) if limit else length)
    return read_calibration(
        options.calibration or DEFAULT_SOURCE,
        loaded.tokenizer,
        length=length,
        seen=options.samples or samples,
        validation=max(1, -(-max(validation, options.held_out) // length)),
        limit=limit,
    ).seen_NT
