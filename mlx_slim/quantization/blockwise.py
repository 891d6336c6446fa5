"""Quantized weights trained a block at a time, then all scales (EfficientQAT).

First each block in turn learns weights, scales and biases so that, rounded, it returns what the
float block returned; it reads what the quantized blocks before it return. Then the scales and
biases of the whole model learn the original's next-token distribution (KL divergence) on the same
text. Invariant: one block's dense weights are in memory at a time, beside the embedding and the
head, in the second phase too: activations between blocks are kept, and gradients go back block by
block. What is packed is what was trained (``fake.py``). Try it:
``mlx-slim quantize MODEL -o DIR --method blockwise --bits 2``.

Source: arXiv 2407.11062. Shapes: N rows, B rows of a batch, T tokens a row, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.models import structure
from mlx_slim.models.activations import use_fast_swiglu
from mlx_slim.models.logits import row_sums
from mlx_slim.models.quantized import LayerFormat, use_fast_matmul
from mlx_slim.models.route import refuse_entangled
from mlx_slim.models.save import quantization_of
from mlx_slim.models.streamed import BlockBatch, RowLogits
from mlx_slim.progress import tracked
from mlx_slim.quantization.apply import (
    QuantizeReport,
    parameter_bytes,
    quantize_layer,
    report,
)
from mlx_slim.quantization.block_rows import Outside, Training, adam, batches_of, orders
from mlx_slim.quantization.fake import CONSTANTS, FakeQuantized, Values
from mlx_slim.quantization.policy import Policy, embed_formats, leaves, make_policy
from mlx_slim.quantization.scale_training import EndToEnd
from mlx_slim.reading import ModelConfig
from mlx_slim.runtime import device_memory, to_float
from mlx_slim.units import human_bytes

# Bytes of a weight of the block in training, float32: itself, its gradient, two moments of Adam,
# and what the rounding keeps for the backward pass.
_BYTES_TRAINED = 32

Logits = Callable[[mx.array], mx.array]


def quantize_blockwise(
    model: nn.Module,
    config: ModelConfig,
    quantize: QuantizeConfig,
    tokens_NT: mx.array,
    *,
    stored: mx.Dtype,
    embed_bits: int | None = None,
    formats: Mapping[str, LayerFormat | None] | None = None,
    training: Training | None = None,
    judged_NT: mx.array | None = None,
    judge: Callable[[Logits], None] | None = None,
) -> QuantizeReport:
    """Quantize ``model`` in place by training it block by block.

    Args:
        model: Dense, its weights read already or not (``models.opening.open_weights``).
        config: Its ``config.json``.
        quantize: Bits and group size of mode affine.
        tokens_NT: Calibration rows, int32.
        stored: Dtype that scales and biases are stored in.
        embed_bits: Bits of embedding and head; None is those of ``quantize``.
        formats: Layer -> its format, None for full precision, of layers that are decided already.
        training: How long and how fast; None is the default.
        judged_NT: Rows on which the original answers before it is gone.
        judge: Is given the original's logits (1, T, V) as a function of one of these rows (1, T).

    Raises:
        ResourceError: If a block in training does not fit in memory.
        SlimError: If the model's blocks cannot be computed one at a time, or its training diverges.
    """
    training = training or Training()
    policy = make_policy(
        model, quantize, None, {**embed_formats(model, quantize, embed_bits), **(formats or {})}
    )
    check_blocks(model, policy)
    before = parameter_bytes(model)
    model.freeze()
    model.eval()
    use_fast_swiglu(model)
    outside = _replace_outside(model, policy)
    with outside.as_it_was(model):
        floats = batches_of(model, tokens_NT, training.batch)
        judged = [] if judged_NT is None else batches_of(model, judged_NT, 1)
    batches = batches_of(model, tokens_NT, training.batch)
    blocks = structure.blocks(model)
    prefix = structure.blocks_path(model)
    for index, block in enumerate(tracked(blocks, "training blocks", "blocks")):
        for batch in (*floats, *judged):
            batch.pass_block(index)
        chosen = {
            path.removeprefix(f"{prefix}.{index}."): one
            for path, one in policy.chosen.items()
            if path.startswith(f"{prefix}.{index}.")
        }
        if chosen:
            _train_block(block, index, chosen, floats, batches, stored, training)
        for batch in batches:
            batch.pass_block(index)
    if judge is not None:
        with outside.as_it_was(model):
            judge(RowLogits(model, judged))
    if training.end_epochs:
        EndToEnd(model, batches, floats, outside, stored, training).run()
    model.freeze()
    new_config = {**config, "quantization": quantization_of(model)}
    return report(model, new_config, "blockwise", before, policy.skipped)


def check_blocks(model: nn.Module, policy: Policy) -> None:
    """Refuse a model whose blocks cannot be trained one at a time; no weight is read.

    Args:
        model: Dense, its weights read already or not.
        policy: The format of each layer.

    Raises:
        ResourceError: If a block in training does not fit beside embedding and head.
        SlimError: If the blocks cannot be computed one at a time.
    """
    refuse_entangled(model)
    sizes: dict[str, int] = {}
    prefix = structure.blocks_path(model) + "."
    for path, module in leaves(model):
        if path in policy.chosen:
            inside = path.startswith(prefix)
            place = path.removeprefix(prefix).split(".")[0] if inside else ""
            size = module["weight"].size * _BYTES_TRAINED if inside else module["weight"].nbytes
            sizes[place] = sizes.get(place, 0) + size
    needed = sizes.pop("", 0) + max(sizes.values(), default=0)
    if needed > device_memory():
        raise ResourceError(
            f"training one block takes {human_bytes(needed)}, this device holds "
            f"{human_bytes(device_memory())}",
            "use --method gptq or rtn",
        )


def _replace_outside(model: nn.Module, policy: Policy) -> Outside:
    """Quantize what is outside the blocks: embedding and head, by rounding."""
    prefix = structure.blocks_path(model) + "."
    floats, quantized = [], []
    for path, module in leaves(model):
        if path in policy.chosen and not path.startswith(prefix):
            layer = quantize_layer(module, policy.chosen[path])
            use_fast_matmul(layer)
            floats.append((path, module))
            quantized.append((path, layer))
    model.update_modules(tree_unflatten(quantized))
    return Outside(floats, quantized)


def _error(output_BTD: mx.array, target_BTD: mx.array) -> mx.array:
    """Return Σ over tokens of ‖output − target‖² / ‖target‖², float32.

    Relative to each token: the few that carry massive activations would else be all that counts,
    and the norm that reads the sum divides by that length anyway.
    """
    target, output = (
        x.astype(mx.float32).reshape(-1, x.shape[-1]) for x in (target_BTD, output_BTD)
    )
    return (row_sums(mx.square(output - target)) / (row_sums(mx.square(target)) + 1e-12)).sum()


def _train_block(
    block: nn.Module,
    index: int,
    chosen: dict[str, LayerFormat],
    floats: list[BlockBatch],
    batches: list[BlockBatch],
    stored: mx.Dtype,
    training: Training,
) -> None:
    """Replace the ``chosen`` layers of ``block`` by quantized ones that were trained.

    ``batches`` hold the block's input, ``floats`` what the float block returned.
    """
    modules = dict(leaves(block))
    layers = {path: FakeQuantized(modules[path], one, stored) for path, one in chosen.items()}
    values = {path: layer.start for path, layer in layers.items()}

    def loss(values: dict[str, Values], batch: BlockBatch, target_BTD: mx.array) -> mx.array:
        for path, layer in layers.items():
            layer.put(values[path])
        return _error(batch.forwards[index](batch.hidden_BTD), target_BTD)

    steps = training.epochs * len(batches)
    rates = {"weight": training.weight_rate, **dict.fromkeys(CONSTANTS, training.scale_rate)}
    optimizers = {name: adam(rate, steps) for name, rate in rates.items()}
    gradient = mx.value_and_grad(loss)
    for number in orders(len(batches), training.epochs, training.seed):
        error, gradients = gradient(values, batches[number], floats[number].hidden_BTD)
        learned = {
            name: optimizer.apply_gradients(*(_column(x, name) for x in (gradients, values)))
            for name, optimizer in optimizers.items()
        }
        values = {path: {name: learned[name][path] for name in rates} for path in layers}
        mx.eval(values, [optimizer.state for optimizer in optimizers.values()], error)
        if not np.isfinite(to_float(error)):
            raise SlimError(
                f"the error of block {index} is not finite",
                "the weights are damaged or overflow their dtype; use --method gptq or rtn",
            )
    packed = [(path, layer.packed(values[path])) for path, layer in layers.items()]
    block.update_modules(tree_unflatten(packed))


def _column(values: dict[str, Values], name: str) -> Values:
    return {path: one[name] for path, one in values.items()}
