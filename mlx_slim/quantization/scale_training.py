"""The second phase of block-wise training: all scales and biases learn from the whole model.

Invariant: one block's activations and dense weights are in memory at a time: hidden states between
blocks are kept, and gradients go back through one block after the other. They are those of the
whole model. Scales and biases are rounded in the loop to the dtype that they are stored in. Try it:
``mlx-slim quantize MODEL -o DIR --method blockwise --bits 2``.

Source: EfficientQAT, arXiv 2407.11062; here the loss is the KL divergence from the original.
Shapes: B rows of a batch, T tokens a row, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.models import structure
from mlx_slim.models.logits import kl_divergence
from mlx_slim.models.quantized import as_stored
from mlx_slim.models.route import Forward, enter, leave
from mlx_slim.progress import Stage, stage
from mlx_slim.quantization.block_rows import BlockBatch, Outside, Training, adam, orders
from mlx_slim.quantization.fake import CONSTANTS, Values
from mlx_slim.quantization.policy import leaves


class Constants:
    """Scales and biases of some quantized layers in training, in units of their layer."""

    def __init__(
        self, owner: nn.Module, stored: mx.Dtype, training: Training, steps: int, inside: bool
    ) -> None:
        prefix = structure.blocks_path(owner) + "." if not inside else None
        self.layers = {
            path: module
            for path, module in leaves(owner)
            if "scales" in module and not (prefix and path.startswith(prefix))
        }
        self.stored = stored
        self.dtypes = {path: layer["scales"].dtype for path, layer in self.layers.items()}
        self.units = {
            path: mx.maximum(mx.abs(layer["scales"].astype(mx.float32)).mean(), 1e-7)
            for path, layer in self.layers.items()
        }
        self.values: dict[str, Values] = {
            path: {name: layer[name].astype(mx.float32) / self.units[path] for name in CONSTANTS}
            for path, layer in self.layers.items()
        }
        mx.eval(self.units, self.values)
        self.optimizer = adam(training.end_rate, steps)

    def put(self, values: dict[str, Values]) -> None:
        """Let the layers compute with ``values``."""
        for path, layer in self.layers.items():
            layer.unfreeze(keys=list(CONSTANTS), recurse=False)
            for name in CONSTANTS:
                value = as_stored(values[path][name] * self.units[path], self.stored)
                layer[name] = value.astype(self.dtypes[path])

    def step(self, gradients: dict[str, Values]) -> None:
        """Take a step of Adam, and let the layers compute with what it gives."""
        if not self.layers:
            return
        learned: Any = self.optimizer.apply_gradients(gradients, self.values)
        self.values = learned
        self.put(self.values)
        mx.eval(
            self.values, self.optimizer.state, [one.parameters() for one in self.layers.values()]
        )


class EndToEnd:
    """The second phase: gradients go from the logits back through one block after the other."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[BlockBatch],
        floats: list[BlockBatch],
        outside: Outside,
        stored: mx.Dtype,
        training: Training,
    ) -> None:
        self.model, self.batches, self.floats = model, batches, floats
        self.outside, self.training = outside, training
        steps = training.end_epochs * len(batches)
        self.around = Constants(model, stored, training, steps, inside=False)
        self.blocks = [
            Constants(block, stored, training, steps, inside=True)
            for block in structure.blocks(model)
        ]

    def run(self) -> None:
        """Train, and leave the quantized model with what was learned."""
        epochs = self.training.end_epochs
        with stage("training scales", epochs * len(self.batches), "batches") as opened:
            for number in orders(len(self.batches), epochs, self.training.seed):
                self._step(self.batches[number], self.floats[number].hidden_BTD, opened)

    def _step(self, batch: BlockBatch, whole_BTD: mx.array, opened: Stage) -> None:
        entering = [enter(self.model, batch.tokens_BT)[0]]
        for forward in batch.forwards:
            entering.append(forward(entering[-1]))
            mx.eval(entering[-1])
        upstream_BTD, around = self._head(batch.tokens_BT, whole_BTD, entering.pop())
        for index in reversed(range(len(self.blocks))):
            forward = batch.forwards[index]
            gradients, upstream_BTD = _backward(
                self.blocks[index], forward, entering.pop(), upstream_BTD
            )
            self.blocks[index].step(gradients)
            mx.eval(upstream_BTD)

        def embedded(values: dict[str, Values]) -> mx.array:
            self.around.put(values)
            hidden_BTD = enter(self.model, batch.tokens_BT)[0]
            return (hidden_BTD.astype(mx.float32) * upstream_BTD).sum()

        if self.around.layers:
            below = mx.grad(embedded)(self.around.values)
            self.around.step(_sum(around, below))
        opened.advance()

    def _head(
        self, tokens_BT: mx.array, whole_BTD: mx.array, last_BTD: mx.array
    ) -> tuple[mx.array, dict[str, Values]]:
        """Return the gradient of Σ KL by the last block's output, and by what is around the blocks.

        A row at a time: logits of all rows would be the largest array there is.
        """

        def loss(last_1TD: mx.array, values: dict[str, Values], row: int) -> mx.array:
            self.around.put(values)
            model_TV = leave(self.model, tokens_BT[row : row + 1], last_1TD)[0]
            return kl_divergence(target_TV, model_TV).sum()

        upstream: list[mx.array] = []
        total: dict[str, Values] = {}
        for row in range(len(tokens_BT)):
            with self.outside.as_it_was(self.model):
                target_TV = leave(self.model, tokens_BT[row : row + 1], whole_BTD[row : row + 1])[0]
                mx.eval(target_TV)
            upstream_1TD, gradients = mx.grad(loss, argnums=(0, 1))(
                last_BTD[row : row + 1], self.around.values, row
            )
            total = _sum(total, gradients) if total else gradients
            upstream.append(upstream_1TD.astype(mx.float32))
            mx.eval(upstream, total)
        return mx.concatenate(upstream), total


def _backward(
    block: Constants, forward: Forward, entering_BTD: mx.array, upstream_BTD: mx.array
) -> tuple[dict[str, Values], mx.array]:
    """Return the gradients by a block's scales and biases, and by its input, float32."""

    def through(values: dict[str, Values], hidden_BTD: mx.array) -> mx.array:
        block.put(values)
        return (forward(hidden_BTD).astype(mx.float32) * upstream_BTD).sum()

    gradients, below_BTD = mx.grad(through, argnums=(0, 1))(block.values, entering_BTD)
    return gradients, below_BTD.astype(mx.float32)


def _sum(one: dict[str, Values], other: dict[str, Values]) -> dict[str, Values]:
    return {path: {name: one[path][name] + other[path][name] for name in CONSTANTS} for path in one}
