"""Depth pruning: choosing the layers to remove.

Invariant: protected layers are never chosen, and at least one layer remains; similarities are
float32 and exclude the first position of a row and special tokens, whose huge activations do not
depend on the layer. Try it: ``mlx-slim prune MODEL -o DIR --method block-influence --ratio 0.1``.

Legend: N rows, B rows of a batch, T tokens a row, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.route import Forward, routed
from mlx_slim.models.streamed import Walk, Weights, count_of_blocks
from mlx_slim.progress import tracked
from mlx_slim.pruning.importance import BlockInputs
from mlx_slim.pruning.methods import BLOCK_INFLUENCE
from mlx_slim.pruning.scores import batches_of
from mlx_slim.runtime import to_float
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.objective import Arrays

STREAMED = (BLOCK_INFLUENCE, "angular", "random")  # a block at a time


@dataclass(frozen=True)
class Removal:
    """Layers to remove, and why.

    Attributes:
        layers: Numbers from 0, ascending.
        scores: Layer -> score of ``meaning``; for ``angular``, first layer of a block -> score.
        meaning: Of the scores.
        steps: (layer, loss without it and those before it) in the order of ``perplexity``.
    """

    layers: list[int]
    scores: dict[int, float]
    meaning: str
    steps: list[tuple[int, float]]


def choose_layers(
    model: Weights,
    method: str,
    count: int,
    allowed: list[int],
    rows_NT: mx.array | None,
    *,
    seed: int = 0,
    special: Collection[int] = (),
) -> Removal:
    """Choose ``count`` of the ``allowed`` layers.

    * ``block-influence``: the lowest 1 − mean cos(input, output) (arXiv 2403.03853);
    * ``angular``: the ``count`` consecutive layers with the smallest angle arccos(cos)/π between
      input and output at the last position (arXiv 2403.17887);
    * ``perplexity``: one by one, each time the layer whose removal gives the lowest loss;
    * ``random``: a seeded control.

    Args:
        model: In memory, or what opens it (not for ``perplexity``).
        method: One of ``methods.OF_DEPTH``.
        count: Layers to remove.
        allowed: Layers that may be removed, ascending.
        rows_NT: Calibration token ids; None for ``random``.
        seed: Of ``random``.
        special: Token ids whose positions similarities leave out.

    Raises:
        SlimError: If no such layers exist.
    """
    if count > len(allowed):
        raise SlimError(
            f"{count} layers cannot be removed: {len(allowed)} of "
            f"{count_of_blocks(model)} are not protected",
            "remove fewer, or protect fewer with --protect-first and --protect-last",
        )
    if method == "random":
        chosen = np.random.default_rng([seed, len(allowed)]).permutation(allowed)[:count]
        return Removal(sorted(int(i) for i in chosen), {}, "chosen at random", [])
    assert rows_NT is not None
    if method == BLOCK_INFLUENCE:
        scores = block_influence(model, rows_NT, special)
        layers = least_influential(scores, count, allowed)
        return Removal(layers, dict(enumerate(scores)), "block influence", [])
    if method == "angular":
        distances = angular_distance(model, rows_NT, count)
        starts = [i for i in allowed if all(i + k in allowed for k in range(count))]
        first = min(starts, key=lambda i: distances[i])
        meaning = f"angle over {count} layers, of π"
        return Removal(list(range(first, first + count)), dict(enumerate(distances)), meaning, [])
    assert isinstance(model, nn.Module)
    return _by_perplexity(model, count, allowed, rows_NT)


def least_influential(
    scores: Sequence[float] | np.ndarray, count: int, allowed: list[int]
) -> list[int]:
    """Return the ``count`` of the ``allowed`` layers with the lowest ``scores``, ascending."""
    return sorted(sorted(allowed, key=lambda layer: scores[layer])[:count])


def _cosine(a: mx.array, b: mx.array) -> mx.array:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    lengths = mx.sqrt(mx.square(a).sum(-1) * mx.square(b).sum(-1))
    return (a * b).sum(-1) / mx.maximum(lengths, 1e-30)


def block_influence(model: Weights, rows_NT: mx.array, special: Collection[int]) -> list[float]:
    """Return 1 − mean cos(input, output) of each layer; 0 is the identity."""
    batches = batches_of(rows_NT)
    totals, positions = np.zeros(count_of_blocks(model)), 0
    excluded = np.array(sorted(special), np.int64)
    counted: list[mx.array] = []
    for batch in batches:
        counts = ~np.isin(batch.tokens_BT, excluded)
        counts[:, 0] = False
        counted.append(mx.array(counts))  # pyright: ignore[reportArgumentType]
        positions += int(counts.sum())
    walk = Walk(model, [mx.array(batch.tokens_BT) for batch in batches])
    for index, _ in walk.blocks("measuring block influence"):
        for counted_BT, (entering, leaving) in zip(counted, walk.passed(index), strict=True):
            cosines_BT = mx.where(counted_BT, _cosine(entering, leaving), 0.0)
            totals[index] += to_float(cosines_BT.sum())
    if not positions:
        raise SlimError(
            "the calibration text has only special tokens", "set another --calibration text"
        )
    return [float(1.0 - total / positions) for total in totals]


def angular_distance(model: Weights, rows_NT: mx.array, count: int) -> list[float]:
    """Return the mean angle / π at the last position over layers i … i + count − 1, for each i."""
    totals = np.zeros(count_of_blocks(model) - count + 1)
    batches = batches_of(rows_NT)
    lasts: list[list[mx.array]] = [[] for _ in batches]
    walk = Walk(model, [mx.array(batch.tokens_BT) for batch in batches])
    for index, _ in walk.blocks("measuring angles"):
        for last, (entering, leaving) in zip(lasts, walk.passed(index), strict=True):
            if not index:
                last.append(mx.contiguous(entering[:, -1]))
            last.append(mx.contiguous(leaving[:, -1]))
            mx.eval(last)  # a view would hold all positions
    for last in lasts:
        for first in range(len(totals)):
            cosine_B = mx.clip(_cosine(last[first], last[first + count]), -1.0, 1.0)
            totals[first] += to_float(mx.arccos(cosine_B).sum()) / np.pi
    return [float(total / len(rows_NT)) for total in totals]


def _by_perplexity(model: nn.Module, count: int, allowed: list[int], rows_NT: mx.array) -> Removal:
    objective = CrossEntropy(model)
    batches = batches_of(rows_NT)
    targets = rows_NT.shape[0] * (rows_NT.shape[1] - 1)
    removed: list[int] = []
    steps: list[tuple[int, float]] = []
    first: dict[int, float] = {}
    for _ in tracked(range(count), "choosing layers by perplexity", "layers"):
        losses = dict.fromkeys((i for i in allowed if i not in removed), 0.0)
        for batch in tracked(batches, "measuring perplexity", "batches"):
            arrays = objective.arrays(batch)
            entering = _inputs_without(model, mx.array(batch.tokens_BT), removed)
            for layer in losses:
                losses[layer] += _loss_without(
                    model, objective, arrays, entering, {*removed, layer}, layer
                )
        losses = {layer: nll / targets for layer, nll in losses.items()}
        first = first or losses
        best = min(losses, key=lambda layer: losses[layer])
        removed.append(best)
        steps.append((best, losses[best]))
    return Removal(sorted(removed), first, "loss without it, nats a token", steps)


def _inputs_without(model: nn.Module, tokens_BT: mx.array, removed: list[int]) -> list[mx.array]:
    """Return the input of each block when ``removed`` are skipped."""
    if not removed:
        return BlockInputs(model, tokens_BT).entering
    entering: list[mx.array] = []

    def route(index: int, forward: Forward, hidden: mx.array) -> mx.array:
        entering.append(hidden)
        out = hidden if index in removed else forward(hidden)
        mx.eval(out)
        return out

    with routed(structure.blocks(model), route):
        model(tokens_BT)
    return entering


def _loss_without(
    model: nn.Module,
    objective: CrossEntropy,
    arrays: Arrays,
    entering: list[mx.array],
    skipped: set[int],
    start: int,
) -> float:
    """Return Σ loss with ``skipped`` left out, computed from block ``start`` on."""

    def route(index: int, forward: Forward, hidden: mx.array) -> mx.array:
        if index < start:
            return hidden
        if index == start:
            return entering[start]
        return hidden if index in skipped else forward(hidden)

    with routed(structure.blocks(model), route):
        return to_float(objective(model, arrays, gradient=False))
