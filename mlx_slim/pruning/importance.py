"""Importance of each group of coupled weights, computed a layer at a time.

Invariant: gradients and their squares exist for one block's weights at a time: a forward pass
stores the input of each block, then the loss is differentiated block by block from last to first.
Only the activations of the calibration rows grow with depth. Sums are float32. Try it:
``mlx-slim prune MODEL -o DIR --method taylor --ratio 0.2``.

Legend: N rows, B rows of a batch, T tokens a row, D width, G groups of a family in one block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.kinds import HIDDEN
from mlx_slim.models.mixtures import Mixture
from mlx_slim.models.residual import residual
from mlx_slim.models.route import Forward, routed, watched
from mlx_slim.models.streamed import Walk, Weights, tensors_of
from mlx_slim.models.structure import Coupled
from mlx_slim.progress import tracked
from mlx_slim.pruning.families import families_of
from mlx_slim.pruning.methods import GRADIENT
from mlx_slim.pruning.reap import reap
from mlx_slim.pruning.scores import Scores, batches_of, name_of
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.objective import Arrays
from mlx_slim.units import human_bytes

STREAMED = ("activation", "l2", "random")  # a block at a time


def group_importance(
    model: Weights,
    method: str,
    kinds: tuple[str, ...],
    rows_NT: mx.array | None,
    *,
    seed: int = 0,
    budget: int | None = None,
    mixture: Mixture | None = None,
) -> Scores:
    """Score every group of ``kinds`` in every block, and every channel of the residual stream.

    * ``taylor``: Σ |w · g| over the weights of a group, g the gradient of the mean loss
      (arXiv 2305.11627, element-wise first order);
    * ``taylor2``: Σ |w · g − ½ w² F|, F the mean of the squared gradients of single rows (the
      diagonal of the empirical Fisher matrix);
    * ``vector``: |Σ w · g|: the first-order change of the loss when the group is scaled;
    * ``activation``: L2 over the rows, mean over the positions, of the group's input to the output
      layer; of a channel, of what the norms send to attention and MLP, summed over the blocks
      (arXiv 2407.14679, 2408.11796; forward only);
    * ``reap``, of experts: mean over the tokens that the router sends to it of the router's weight
      times the L2 of the expert's output (arXiv 2510.13999, forward only);
    * ``l2``: √Σ w²; ``random``: seeded; both controls.

    Args:
        model: In memory, or what opens it (only for ``STREAMED``).
        method: One of ``methods.OF_WIDTH``.
        kinds: Families: ``heads``, ``mlp``, ``hidden`` (not by a gradient); or ``experts``.
        rows_NT: Calibration token ids; None for ``l2`` and ``random``.
        seed: Of ``random``.
        budget: Bytes that activations may take; None does not check.
        mixture: The experts of ``model``.

    Raises:
        SlimError: If the activations exceed the budget, or a score is not finite.
    """
    if method in GRADIENT:
        assert rows_NT is not None and isinstance(model, nn.Module)
        scores = _by_gradient(model, method, kinds, rows_NT, budget)
    elif method == "activation":
        assert rows_NT is not None
        scores = _by_activation(model, kinds, rows_NT)
    elif method == "reap":
        assert rows_NT is not None and mixture is not None and isinstance(model, nn.Module)
        scores = reap(model, mixture, rows_NT)
    else:
        scores = {}
        shapes = model if isinstance(model, nn.Module) else model()
        prefix, tensors = structure.blocks_path(shapes), tensors_of(model)
        for layer, of_block in enumerate(families_of(shapes, mixture)):
            for kind, family in of_block.items():
                if kind not in kinds or kind == HIDDEN:
                    continue
                if method == "random":
                    stream = np.random.default_rng([seed, layer, kinds.index(kind)])
                    values = stream.random(family.count, np.float32)
                else:
                    values = _l2(tensors, family, f"{prefix}.{layer}.")
                scores[name_of(layer, kind)] = values
        if HIDDEN in kinds:
            channels = residual(shapes).channels
            if method == "random":
                stream = np.random.default_rng([seed, len(structure.blocks(shapes))])
                scores[HIDDEN] = stream.random(channels.count, np.float32)
            else:
                scores[HIDDEN] = _l2(tensors_of(model), channels, "")
    wrong = [name for name, values in scores.items() if not np.isfinite(values).all()]
    if wrong:
        raise SlimError(
            f"the importance scores of {len(wrong)} layers are not finite, the first is {wrong[0]}",
            "the weights are damaged, or overflow their dtype",
        )
    return scores


def _families(block: nn.Module, kinds: tuple[str, ...]) -> dict[str, Coupled]:
    return {kind: family for kind, family in structure.coupled(block).items() if kind in kinds}


def _members(block: nn.Module, family: Coupled) -> dict[str, mx.array]:
    parameters = dict(tree_flatten(block.parameters()))
    return {path: parameters[path].astype(mx.float32) for path, _ in family.members}  # pyright: ignore


def _sums(values: dict[str, mx.array], family: Coupled) -> np.ndarray:
    """Return Σ of ``values`` (shaped like the members) over each group (G,), float32."""
    total_G = mx.zeros(family.count)
    for path, axis in family.members:
        total_G = total_G + _by_group(values[path], axis, family.count)
    return np.array(total_G)


def _by_group(value: mx.array, axis: int, count: int) -> mx.array:
    """Return Σ of ``value`` over each of the ``count`` equal slices along ``axis``, (G,)."""
    grouped = value.reshape(*value.shape[:axis], count, -1, *value.shape[axis + 1 :])
    return grouped.sum(axis=[i for i in range(grouped.ndim) if i != axis])


def _l2(tensors: dict[str, mx.array], family: Coupled, prefix: str) -> np.ndarray:
    """Return √Σ w² of each group (G,), float32; one of ``tensors`` is taken at a time."""
    total_G = mx.zeros(family.count)
    for path, axis in family.members:
        square = mx.square(tensors.pop(prefix + path).astype(mx.float32))
        total_G = total_G + _by_group(square, axis, family.count)
        mx.eval(total_G)
    return np.array(mx.sqrt(total_G))


@contextlib.contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters, so that no gradient of the head is computed."""
    model.freeze()
    try:
        yield
    finally:
        model.unfreeze()


class BlockInputs:
    """The input of each block for one batch, and the forward pass from there.

    Attributes:
        entering: hidden_BTD by block, and the output of the last one.
        forwards: Each block with its weights mask.
    """

    def __init__(self, model: nn.Module, tokens_BT: mx.array) -> None:
        self.entering: list[Any] = []
        self.forwards: list[Forward] = []

        def route(index: int, forward: Forward, hidden_BTD: mx.array) -> mx.array:
            if not index:
                self.entering.append(hidden_BTD)
            self.forwards.append(forward)
            self.entering.append(forward(hidden_BTD))
            mx.eval(self.entering[-1])
            return self.entering[-1]

        with routed(structure.blocks(model), route):
            model(tokens_BT)  # the logits are never computed


def _by_gradient(
    model: nn.Module,
    method: str,
    kinds: tuple[str, ...],
    rows_NT: mx.array,
    budget: int | None,
) -> Scores:
    blocks = structure.blocks(model)
    with _frozen_parameters(model):
        objective = CrossEntropy(model)
        batches = batches_of(rows_NT, single=method == "taylor2")
        inputs: list[BlockInputs] = []
        for batch in tracked(batches, "reading the calibration rows", "batches"):
            inputs.append(BlockInputs(model, mx.array(batch.tokens_BT)))
            _check_budget(inputs, len(batches), budget)
        upstream = []  # d loss / d output of the block, by batch
        scale = len(batches) if method == "taylor2" else 1
        targets = rows_NT.shape[0] * (rows_NT.shape[1] - 1) / scale
        for block_inputs, batch in zip(inputs, batches, strict=True):
            arrays = objective.arrays(batch)
            upstream_BTD = _head_gradient(
                model, objective, arrays, block_inputs.entering.pop(), 1 / targets
            )
            mx.eval(upstream_BTD)
            upstream.append(upstream_BTD)
        scores: Scores = {}
        backwards = list(reversed(range(len(blocks))))
        for layer in tracked(backwards, f"measuring {method}", "layers"):
            families = _families(blocks[layer], kinds)
            sums, squares = _block_gradients(
                blocks[layer], layer, families, inputs, upstream, method == "taylor2"
            )
            for kind, family in families.items():
                weights = _members(blocks[layer], family)
                terms = {}
                for path, weight in weights.items():
                    term = weight * sums[path] / scale
                    if squares:
                        term = term - 0.5 * mx.square(weight) * squares[path] / scale
                    terms[path] = term if method == "vector" else mx.abs(term)
                values = _sums(terms, family)
                scores[name_of(layer, kind)] = np.abs(values)
    return scores


def _check_budget(inputs: list[BlockInputs], count: int, budget: int | None) -> None:
    needed = count * sum(hidden.nbytes for hidden in inputs[0].entering)
    if budget is not None and needed > budget:
        raise SlimError(
            f"the activations of the calibration rows take {human_bytes(needed)}, "
            f"{human_bytes(budget)} are available",
            "set fewer --samples or a smaller --length",
        )


def _head_gradient(
    model: nn.Module, objective: CrossEntropy, arrays: Arrays, last_BTD: mx.array, scale: float
) -> mx.array:
    """Return d(scale · Σ loss) / d(output of the last block)."""
    blocks = structure.blocks(model)

    def tail(hidden_BTD: mx.array) -> mx.array:
        def route(index: int, _: Forward, passed: mx.array) -> mx.array:
            return hidden_BTD if index == len(blocks) - 1 else passed

        with routed(blocks, route):
            return objective(model, arrays, gradient=True) * scale

    return mx.grad(tail)(last_BTD)


def _block_gradients(
    block: nn.Module,
    layer: int,
    families: dict[str, Coupled],
    inputs: list[BlockInputs],
    upstream: list[mx.array],
    squared: bool,
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Return Σ g and Σ g² over the batches for a block's weights.

    ``upstream``, the gradients by the block's output, become those by its input.
    """
    everything = dict(tree_flatten(block.parameters()))
    paths = [path for family in families.values() for path, _ in family.members]
    weights = {path: everything[path] for path in paths}
    sums: dict[str, mx.array] = {}
    squares: dict[str, mx.array] = {}
    for number, block_inputs in enumerate(inputs):
        forward, upstream_BTD = block_inputs.forwards[layer], upstream[number]

        def through(
            parameters: dict[str, mx.array],
            hidden_BTD: mx.array,
            forward: Forward = forward,
            upstream_BTD: mx.array = upstream_BTD,
        ) -> mx.array:
            block.update(tree_unflatten(list(parameters.items())))  # pyright: ignore
            return (forward(hidden_BTD).astype(mx.float32) * upstream_BTD.astype(mx.float32)).sum()

        gradients, upstream[number] = mx.grad(through, argnums=(0, 1))(
            weights, block_inputs.entering.pop()
        )
        block.update(tree_unflatten(list(weights.items())))  # pyright: ignore
        for path, gradient in gradients.items():
            gradient32 = gradient.astype(mx.float32)
            sums[path] = sums[path] + gradient32 if path in sums else gradient32
            if squared:
                square = mx.square(gradient32)
                squares[path] = squares[path] + square if path in squares else square
        mx.eval(sums, squares, upstream[number])
    return sums, squares


def _by_activation(model: Weights, kinds: tuple[str, ...], rows_NT: mx.array) -> Scores:
    scores: Scores = {}
    squares: dict[str, mx.array] = {}  # of a block: Σ over rows of the squared norm, (T, G)
    shapes = model if isinstance(model, nn.Module) else model()
    channels = residual(shapes) if HIDDEN in kinds else None
    walk = Walk(model, [mx.array(batch.tokens_BT) for batch in batches_of(rows_NT)])
    for layer, block in walk.blocks("measuring activation"):
        with contextlib.ExitStack() as stack:

            def watch(path: str, name: str, count: int, block: nn.Module = block) -> None:
                def look(x_BTI: mx.array) -> None:
                    grouped = x_BTI.astype(mx.float32).reshape(*x_BTI.shape[:2], count, -1)
                    total_TG = mx.square(grouped).sum(axis=(0, 3))
                    squares[name] = squares[name] + total_TG if name in squares else total_TG

                stack.enter_context(watched(block, path, look))

            for kind, family in _families(block, kinds).items():
                watch(family.output, name_of(layer, kind), family.count)
            if channels is not None:
                for path in channels.readers[layer]:
                    watch(path, f"{layer}.{path}", channels.channels.count)
            for _ in walk.passed(layer):
                mx.eval(squares)
        for name in list(squares):
            scores[name] = np.array(mx.sqrt(squares.pop(name)).mean(axis=0))
    if channels:
        names = [f"{i}.{path}" for i, paths in enumerate(channels.readers) for path in paths]
        scores[HIDDEN] = np.sum([scores.pop(name) for name in names], axis=0)
    return scores
