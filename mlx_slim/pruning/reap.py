"""Importance of the experts of a mixture (REAP, arXiv 2510.13999).

Invariant: the router's weight is the one that the model applies, renormalised and scaled where it
does that; forward only, one block's outputs at a time. Try it:
``mlx-slim prune MODEL -o DIR --method reap --ratio 0.25``.

Legend: N rows, T tokens a row, K experts of a token, E experts.
"""

from __future__ import annotations

import contextlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.models import structure
from mlx_slim.models.kinds import EXPERTS
from mlx_slim.models.mixtures import Mixture, Report, RouterProbe
from mlx_slim.models.route import Forward, replaced, routed
from mlx_slim.progress import tracked
from mlx_slim.pruning.scores import Scores, batches_of, name_of


def reap(model: nn.Module, mixture: Mixture, rows_NT: mx.array) -> Scores:
    """Score every expert: mean of router weight · L2 of its output over the tokens sent to it.

    An expert that no token was sent to scores 0.

    Args:
        model: Evaluated.
        mixture: Its experts.
        rows_NT: Calibration token ids.
    """
    blocks = structure.blocks(model)
    sums: dict[int, mx.array] = {}  # layer -> Σ weight · norm and tokens of each expert, (2, E)
    with contextlib.ExitStack() as stack:
        for layer, family in enumerate(mixture.families):
            if family is None:
                continue
            sums[layer] = mx.zeros((2, family.count))

            def report(
                indices: mx.array, weights: mx.array, norms: mx.array, layer: int = layer
            ) -> None:
                experts = indices.reshape(-1)
                values = (weights * norms).reshape(-1)
                both = mx.stack([values, mx.ones_like(values)])
                sums[layer] = sums[layer].at[:, experts].add(both)

            def probe(holder: nn.Module, report: Report = report) -> nn.Module:
                return RouterProbe(holder, report)

            stack.enter_context(replaced(blocks[layer], family.output, probe))

        def route(index: int, forward: Forward, hidden_BTD: mx.array) -> mx.array:
            out = forward(hidden_BTD)
            mx.eval(out, sums)
            return out

        stack.enter_context(routed(blocks, route))
        for batch in tracked(batches_of(rows_NT), "measuring the experts", "batches"):
            model(mx.array(batch.tokens_BT))
    return {
        name_of(layer, EXPERTS): np.array(total_2E[0] / mx.maximum(total_2E[1], 1))
        for layer, total_2E in sums.items()
    }
