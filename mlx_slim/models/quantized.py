"""Quantized layers that are fast on a CPU.

Without a GPU, ``mx.quantized_matmul`` runs at 1.6 GFLOP/s where float32 BLAS reaches 100 and more.
``use_fast_matmul`` gives each quantized layer a forward that rebuilds its weight in float32, uses
BLAS and forgets it. Invariant: the parameter tree, the attributes and the base classes stay those
of ``nn.QuantizedLinear`` and ``nn.QuantizedEmbedding``, and a dense weight never outlives the
matmul it was made for: the backward pass makes it again. Nothing changes on a GPU. Try it:
``mlx-slim bench train smollm2-qlora``.

Shapes: M rows, I input width, O output width, Q packed input width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slim.errors import SlimError
from mlx_slim.models.dequantize import dequantize
from mlx_slim.runtime import device_memory, on_gpu


@dataclass(frozen=True)
class LayerFormat:
    """How a layer's weight is rounded; the defaults are those of ``mx.quantize``.

    Attributes:
        group_size: Weights that share a scale.
        bits: Of a code.
        mode: ``affine``, or a float format.
    """

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __str__(self) -> str:
        """Return the format in words."""
        return f"{self.bits}-bit {self.mode}, group {self.group_size}"


# Rows from which rebuilding the weight pays. Measured on two cores: 2 rows for 576 x 1536 affine,
# 4 for mxfp4 and nvfp4 (whose quantized matmul is twice as fast), 5 for 4096 x 4096.
MIN_ROWS = 4
DENSE_FRACTION = 0.5  # of the memory, that a dequantized model may take
PIECE_BYTES = 1 << 23  # of a float32 weight that is rebuilt at one time in a forward pass


def as_stored(value: mx.array, stored: mx.Dtype) -> mx.array:
    """Return float32 ``value`` rounded to ``stored``, in float32; its gradient is 1.

    The sum is exact: a float and its rounding are so near that their difference is a float too.
    """
    return value + mx.stop_gradient(value.astype(stored).astype(mx.float32) - value)


def dequantize_weight(module: nn.Module) -> mx.array:
    """Return the dense weight (out, in) of a linear layer or embedding, quantized or not.

    Args:
        module: ``nn.QuantizedLinear``, ``nn.QuantizedEmbedding``, mlx-lm's
            ``QuantizedSwitchLinear`` or their dense counterparts.

    Returns:
        The weight (O, I), of experts (E, O, I): float32, unrounded; a dense module's own weight as
        it is.

    Raises:
        SlimError: If experts have an nvfp4 scale each beside their groups'.
    """
    if "scales" not in module:
        return module["weight"]
    if module.get("global_scale") is not None and module["weight"].ndim == 3:
        raise SlimError(
            "these experts have a tensor scale each (nvfp4), which is not dequantized here",
            "take a copy of the model in another format",
        )
    return _dense(module, module["weight"])


def dequantize_rows(module: nn.Module, rows: slice) -> mx.array:
    """Return some rows of what ``dequantize_weight`` returns, without making the others.

    Args:
        module: A linear layer or embedding, quantized or not.
        rows: Of its matrix (O, I).
    """
    rows_OI = module["weight"][rows]
    return _dense(module, rows_OI, rows) if "scales" in module else rows_OI


@dataclass(frozen=True)
class DenseWeight:
    """The matrix W (O, I) of a linear map."""

    weight_OI: mx.array

    def logits(self, x_MI: mx.array) -> mx.array:
        """Return x Wᵀ (M, O)."""
        return x_MI @ self.weight_OI.T

    def back(self, y_MO: mx.array) -> mx.array:
        """Return y W (M, I), in the dtype of W."""
        return y_MO.astype(self.weight_OI.dtype) @ self.weight_OI

    def rows(self, ids_M: mx.array) -> mx.array:
        """Return W[ids] (M, I)."""
        return self.weight_OI[ids_M]


@dataclass(frozen=True)
class QuantizedWeight:
    """The same of a quantized layer, whose dense W is never made: for a GPU."""

    module: nn.Module

    def _multiply(self, x: mx.array, transpose: bool) -> mx.array:
        module = self.module
        return mx.quantized_matmul(
            x,
            module["weight"],
            module["scales"],
            module.get("biases"),
            transpose=transpose,
            **vars(format_of(module)),
        )

    def logits(self, x_MI: mx.array) -> mx.array:
        """Return x Wᵀ (M, O)."""
        return self._multiply(x_MI, transpose=True)

    def back(self, y_MO: mx.array) -> mx.array:
        """Return y W (M, I), in the dtype that the layer computes in."""
        floats = self.module.mode == "affine"
        return self._multiply(
            y_MO.astype(self.module["scales"].dtype if floats else mx.bfloat16), transpose=False
        )

    def rows(self, ids_M: mx.array) -> mx.array:
        """Return W[ids] (M, I)."""
        biases = self.module.get("biases")
        return mx.dequantize(
            self.module["weight"][ids_M],
            self.module["scales"][ids_M],
            None if biases is None else biases[ids_M],
            **vars(format_of(self.module)),
        )


HeadWeight = DenseWeight | QuantizedWeight


def _dense(module: nn.Module, weight_OQ: mx.array, rows: slice = slice(None)) -> mx.array:
    """Return ``rows`` of the float32 weight of a quantized ``module``, packed in ``weight_OQ``."""
    biases = module.get("biases")
    biases = None if biases is None else biases[rows]
    return dequantize(weight_OQ, module["scales"][rows], biases, **vars(format_of(module)))


def format_of(module: nn.Module) -> LayerFormat:
    """Return the format of a quantized ``module``."""
    layer = cast(Any, module)
    return LayerFormat(layer.group_size, layer.bits, getattr(layer, "mode", "affine"))


def _matmul(module: nn.Module, x_MI: mx.array) -> mx.array:
    """Return x Wᵀ (M, O) through a float32 weight that lives for one matmul.

    Gradients flow to x, and to scales and biases that are unfrozen.
    """
    dtype = x_MI.dtype
    if module.mode == "affine":
        dtype = mx.result_type(dtype, module["scales"].dtype)

    if "scales" not in module._no_grad:  # scales that learn: plain autodiff keeps the weight
        dense_OI = _dense(module, module["weight"])
        return (x_MI.astype(mx.float32) @ dense_OI.T).astype(dtype)

    def forward(x_MI: mx.array) -> mx.array:
        pieces: list[mx.array] = []
        for rows in _pieces(module, x_MI):  # in turn: a head is larger than a block
            weight_OI = _dense_after(module, pieces[-1] if pieces else x_MI, rows)
            pieces.append(x_MI @ weight_OI.T)
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)

    def backward(_x: mx.array, cotangent_MO: mx.array, _y: mx.array) -> mx.array:
        return cotangent_MO @ _dense_after(module, cotangent_MO)

    multiply = mx.custom_function(forward)
    multiply.vjp(backward)
    return cast(mx.array, multiply(x_MI.astype(mx.float32))).astype(dtype)


def _pieces(module: nn.Module, x_MI: mx.array) -> list[slice]:
    """Return rows of the weight, ``PIECE_BYTES`` of float32 each."""
    outputs, width = module["weight"].shape[0], x_MI.shape[-1]
    if 4 * x_MI.size > width * width:  # to join the pieces would take more than they save
        return [slice(outputs)]
    # Whole tiles of a BLAS kernel: then most kernels give the bits of the whole product.
    step = max(PIECE_BYTES // (4 * width) // 64 * 64, 64)
    return [slice(start, start + step) for start in range(0, outputs, step)]


def _dense_after(module: nn.Module, x: mx.array, rows: slice = slice(None)) -> mx.array:
    """Return ``rows`` of the dense weight, made only once ``x`` is known.

    Without the dependency the scheduler is free to make the weights of all layers at once.
    """
    (weight_OQ,) = mx.depends([module["weight"][rows]], [x])
    return _dense(module, weight_OQ, rows)


class FastQuantizedLinear(nn.QuantizedLinear):
    """``nn.QuantizedLinear`` whose forward uses BLAS for more than a few rows."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return x Wᵀ + bias; x is (..., I)."""
        if x.size // x.shape[-1] < MIN_ROWS:
            return super().__call__(x)
        y = _matmul(self, x)
        return y + self["bias"] if "bias" in self else y


class FastQuantizedEmbedding(nn.QuantizedEmbedding):
    """``nn.QuantizedEmbedding`` whose ``as_linear`` uses BLAS for more than a few rows."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Return x Wᵀ; x is (..., I)."""
        if x.size // x.shape[-1] < MIN_ROWS:
            return super().as_linear(x)
        return _matmul(self, x)


_FAST = {
    nn.QuantizedLinear: FastQuantizedLinear,
    nn.QuantizedEmbedding: FastQuantizedEmbedding,
}


def use_fast_matmul(model: nn.Module) -> int:
    """Give every quantized layer of ``model`` the CPU forward, in place; nothing on a GPU.

    Returns:
        The number of layers changed (0 on a GPU, and on a second call).
    """
    if on_gpu():
        return 0
    changed = 0
    for module in model.modules():
        # The instance takes the subclass: whoever holds it (tied heads, adapters) sees the change.
        fast = _FAST.get(type(module))
        if fast is not None:
            module.__class__ = fast
            changed += 1
    return changed


class _FastToBe(nn.Linear):
    """``nn.Linear`` that is quantized into a layer with the CPU forward."""

    def to_quantized(self, *args: Any, **kwargs: Any) -> FastQuantizedLinear:
        """Return a ``FastQuantizedLinear``."""
        layer: Any = super().to_quantized(*args, **kwargs)
        layer.__class__ = FastQuantizedLinear
        return layer


def quantize_into_fast(model: nn.Module) -> None:
    """Let the dense linear layers of ``model`` become fast ones when they are quantized.

    For code that quantizes layers and runs them at once; nothing on a GPU.
    """
    if not on_gpu():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = _FastToBe


def layer_dtype(layer: nn.Module) -> mx.Dtype:
    """Return what a layer computes in: its weight's dtype, or that of its scales."""
    for name in ("scales", "weight"):
        if name in layer and mx.issubdtype(layer[name].dtype, mx.floating):
            return layer[name].dtype
    return mx.bfloat16  # mxfp and nvfp scales are bytes


def dense_layer(former: nn.Module, weight: mx.array) -> nn.Module:
    """Return a layer of the kind of ``former`` with a dense weight, and the bias of ``former``."""
    from mlx_lm.models.switch_layers import SwitchLinear

    bias = "bias" in former
    if isinstance(former, (nn.Embedding, nn.QuantizedEmbedding)):
        dense: nn.Module = nn.Embedding(1, 1)
    else:
        dense = SwitchLinear(1, 1, 1, bias) if weight.ndim == 3 else nn.Linear(1, 1, bias)
    if bias:
        dense["bias"] = former["bias"]
    dense["weight"] = weight
    return dense


def expert_types() -> tuple[type, ...]:
    """Return the classes of expert layers, dense and quantized.

    None where mlx-lm's module of them is not imported: then no model has such a layer.
    """
    module = sys.modules.get("mlx_lm.models.switch_layers")
    return () if module is None else (module.SwitchLinear, module.QuantizedSwitchLinear)


def _quantized_types() -> tuple[type, ...]:
    return nn.QuantizedLinear, nn.QuantizedEmbedding, *expert_types()[1:]


def densify(model: nn.Module, dtype: mx.Dtype | None = None, *, read: bool = True) -> int:
    """Replace quantized layers by dense ones with the same outputs, in place, one at a time.

    For generation and scoring on a CPU when memory allows (8 times that of 4 bits).

    Args:
        model: Any model.
        dtype: Of the dense layers, whose weights are computed in float32; None leaves these in
            float32 and biases as they are.
        read: Evaluate each layer; else it is made where it is read (``models.streamed``).

    Returns:
        The number of layers replaced.
    """
    kinds = _quantized_types()
    waiting = [(path, each) for path, each in model.named_modules() if isinstance(each, kinds)]
    count = len(waiting)
    while waiting:  # popped, so that each quantized layer is freed as soon as it is replaced
        path, module = waiting.pop()
        weight = _dense(module, module["weight"]).astype(dtype or mx.float32)
        dense = dense_layer(module, weight)
        if "bias" in dense and dtype is not None:
            dense["bias"] = dense["bias"].astype(dtype)
        if read:
            mx.eval(dense.parameters())
        dense.freeze()
        dense.train(module.training)
        model.update_modules(tree_unflatten([(path, dense)]))
    return count


def dense_parameters(model: nn.Module) -> dict[str, Callable[[], mx.array]]:
    """Return path -> what computes the parameter that ``densify`` would leave there.

    An entry holds the arrays it is made of, and the dense one is its caller's.
    """
    flat = dict(tree_flatten(model.parameters()))
    parameters: dict[str, Callable[[], mx.array]] = {}
    for path, module in model.named_modules():
        if isinstance(module, _quantized_types()):
            weight, scales, biases = (
                flat.pop(f"{path}.{part}", None) for part in ("weight", "scales", "biases")
            )
            parameters[f"{path}.weight"] = partial(
                dequantize, weight, scales, biases, **vars(format_of(module))
            )
    return {**parameters, **{path: partial(_itself, value) for path, value in flat.items()}}


def _itself(value: mx.array) -> mx.array:
    return value


def densify_pays(model: nn.Module) -> bool:
    """Return whether ``model`` would answer faster dense: quantized, no GPU, and memory allows."""
    if on_gpu() or not is_quantized(model):
        return False
    from mlx_lm.utils import get_total_parameters

    return 4 * get_total_parameters(model) < DENSE_FRACTION * device_memory()


def is_quantized(model: nn.Module) -> bool:
    """Return whether any module of ``model`` holds quantized weights."""
    return any("scales" in module and "weight" in module for module in model.modules())
