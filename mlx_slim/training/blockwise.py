"""Loss and gradient on a CPU, a block at a time, with exponentials by NumPy.

Half of a step that MLX computes as one graph is waiting for scalar exponentials. NumPy's take a
tenth, but need arrays that are computed; and what is computed while MLX traces a gradient stays,
with all that it came from. So blocks are computed outside of a trace (``block_pieces.py``).

Invariant: loss and gradients are those of the one graph to float32 rounding, dropout masks the same
bits; models whose blocks are no plain pre-norm blocks, and GPUs, keep the graph (``why_not``).
Try it: ``python -m pytest tests/training/test_blockwise.py``.
Legend: B sequences, T positions, N supervised positions, D width.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.models import structure
from mlx_slim.models.attention import attention_of
from mlx_slim.models.dropout import drawn_for
from mlx_slim.models.logits_close import Change, logits_close
from mlx_slim.models.prefix_attention import prefix_attention
from mlx_slim.runtime import on_gpu
from mlx_slim.training.block_pieces import (
    BlockPieces,
    Building,
    Call,
    Gradients,
    Residuals,
    backward,
    forward,
    intercepted_blocks,
)
from mlx_slim.training.chunks import Chunk
from mlx_slim.training.cross_entropy import CrossEntropy, supervised_rows
from mlx_slim.training.objective import Arrays
from mlx_slim.training.optim import set_trainable, trainable

_CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROBE = 8  # tokens


class Blockwise:
    """Computes loss and gradient of chunks, a block at a time.

    Args:
        model: Its trainable parameters are differentiated.
        objective: Summed loss of a batch.
        building: Held while a graph is built: threads compute chunks of one model.
    """

    def __init__(self, model: nn.Module, objective: CrossEntropy, building: threading.Lock) -> None:
        self._model, self._objective, self._building = model, objective, building
        self._path = ""
        self._fits: tuple[list[type], bool] = [], False

    def fits(self) -> bool:
        """Return whether the model is computed so; recomputed blocks are not."""
        if on_gpu():
            return False
        with self._building:
            classes = [type(block) for block in structure.blocks(self._model)]
            if classes != self._fits[0]:
                self._fits = classes, not why_not(self._model, self._objective.split)
                self._path = structure.blocks_path(self._model)
        return self._fits[1]

    def sums_of(self, chunk: Chunk) -> tuple[mx.array, Gradients]:
        """Return the sums of a chunk and the gradient of its loss, evaluated."""
        batch = chunk.batch
        if chunk.seed is not None:
            mx.random.seed(chunk.seed)  # of this thread
        with self._building:  # objectives read their files at the first batch
            arrays = self._objective.arrays(batch)
        rows = batch.drawn and (mx.array(batch.drawn.rows_B), batch.drawn.batch, batch.drawn.width)

        @contextlib.contextmanager
        def build() -> Iterator[None]:
            with (
                self._building,
                drawn_for(*rows) if rows else contextlib.nullcontext(),
                prefix_attention(batch.nodes),
            ):
                yield

        with build():
            parameters = trainable(self._model)
            blocks = structure.blocks(self._model)
            calls = self._calls(arrays)
        outer = {k: v for k, v in parameters.items() if not k.startswith(f"{self._path}.")}
        first = 0 if outer else _first_trained(blocks)
        x_BTD = calls[0].x_BTD
        mx.eval(x_BTD)
        residuals: list[Residuals] = []
        for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
            x_BTD, one = forward(BlockPieces(block, call), x_BTD, batch.nodes, build)
            if index >= first:
                residuals.append(one)
        sums, by_x_BTD, gradients = self._end(arrays, parameters, outer, x_BTD, build)
        for index in reversed(range(first, len(blocks))):
            by_x_BTD, by_parameters = backward(residuals.pop(), by_x_BTD, build)
            gradients |= {
                f"{self._path}.{index}.{name}": value for name, value in by_parameters.items()
            }
        if outer:
            self._add_beginning(arrays, parameters, outer, by_x_BTD, gradients, build)
        return sums, {path: gradients[path] for path in parameters}

    def _calls(self, arrays: Arrays) -> list[Call]:
        """Return how the body calls its blocks."""
        calls: list[Call] = []
        with intercepted_blocks(self._model, calls):
            self._objective(self._model, arrays, gradient=True)
        return calls

    def _end(
        self,
        arrays: Arrays,
        parameters: Gradients,
        outer: Gradients,
        x_BTD: mx.array,
        build: Building,
    ) -> tuple[mx.array, mx.array, Gradients]:
        """Return the sums, the gradient by what comes out of the last block, and by the rest."""
        if not outer:
            tokens_BT, positions_N, _, segments_BT, *_ = arrays
            split = self._objective.split

            def rows(x_BTD: mx.array) -> mx.array:
                with intercepted_blocks(self._model, [], x_BTD):
                    return supervised_rows(self._model, split, tokens_BT, positions_N, segments_BT)

            with build():
                rows_ND = rows(x_BTD)
            mx.eval(rows_ND)
            direct = self._objective.rows_gradient(rows_ND, arrays)
            if direct is not None:
                sums, by_rows_ND = direct
                with build():
                    _, (by_x_BTD,) = mx.vjp(rows, [x_BTD], [by_rows_ND])
                mx.eval(by_x_BTD)
                return sums, by_x_BTD, {}

        def end(x_BTD: mx.array, outer: Gradients) -> tuple[mx.array, mx.array]:
            set_trainable(self._model, outer)
            with intercepted_blocks(self._model, [], x_BTD):
                sums = self._objective(self._model, arrays, gradient=True)
            return (sums[0] if sums.ndim else sums), sums

        with build():
            (_, sums), (by_x_BTD, gradients) = mx.value_and_grad(end, argnums=(0, 1))(x_BTD, outer)
            set_trainable(self._model, parameters)
        mx.eval(sums, by_x_BTD, gradients)
        return sums, by_x_BTD, dict(gradients)

    def _add_beginning(
        self,
        arrays: Arrays,
        parameters: Gradients,
        outer: Gradients,
        by_x_BTD: mx.array,
        gradients: Gradients,
        build: Building,
    ) -> None:
        """Add the gradient through what is before the first block: of embeddings."""
        names = list(outer)

        def begin(*values: mx.array) -> mx.array:
            set_trainable(self._model, dict(zip(names, values, strict=True)))
            return self._calls(arrays)[0].x_BTD

        with build():
            _, by_parameters = mx.vjp(begin, [outer[name] for name in names], [by_x_BTD])
            set_trainable(self._model, parameters)
        for name, value in zip(names, by_parameters, strict=True):
            gradients[name] = gradients[name] + value
        mx.eval(gradients)


def _first_trained(blocks: list[nn.Module]) -> int:
    """Return the number of the first block that is trained, or of all."""
    trained = (i for i, block in enumerate(blocks) if tree_flatten(block.trainable_parameters()))
    return next(trained, len(blocks))


def why_not(model: nn.Module, split: structure.Split | None) -> str:
    """Return why ``model`` is not computed a block at a time; empty where it is."""
    if on_gpu():
        return "a GPU computes one graph"
    if split is None:
        return "it does not split into body and head"
    for block in structure.blocks(model):
        children = {name for name, child in block.items() if isinstance(child, nn.Module)}
        if children != _CHILDREN:
            return "its blocks are others"
        if getattr(block, "recomputed", False):
            return "its blocks are recomputed"
        if not getattr(block.mlp, "fast_swiglu", False):
            return "its MLP is no SwiGLU"
    training = model.training
    model.eval()  # no dropout, and nothing random is drawn
    try:
        layers = attention_of(model)
        if layers is None or any(not layer.heads or layer.sinks for layer in layers):
            return "its attention is not MLX's, or has sinks"
        return _difference(model, split)
    finally:
        model.train(training)


def _difference(model: nn.Module, split: structure.Split) -> str:
    """Return what tells the pieces of ``model`` from the whole, on a few tokens."""
    tokens_BT = mx.arange(_PROBE)[None] % max(2, min(_PROBE, split.head.vocabulary))
    expected = split.body(tokens_BT, cache=None)
    calls: list[Call] = []
    with intercepted_blocks(model, calls):
        split.body(tokens_BT, cache=None)
    x_BTD = calls[0].x_BTD
    mx.eval(expected, x_BTD)
    if x_BTD.dtype != mx.float32:
        return f"it computes in {str(x_BTD.dtype).removeprefix('mlx.core.')}"
    for block, call in zip(structure.blocks(model), calls, strict=True):
        x_BTD, _ = forward(BlockPieces(block, call), x_BTD, None, contextlib.nullcontext)
    with intercepted_blocks(model, [], x_BTD):
        ours = split.body(tokens_BT, cache=None)
    same = logits_close(ours, expected, Change.FORWARD).close
    return "" if same else "its blocks in pieces compute something else"
