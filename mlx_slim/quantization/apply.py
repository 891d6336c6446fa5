"""Quantize a model in memory.

Invariant: the model is changed in place, a layer at a time, so that no more than one of them is in
memory dense if it was not before; the returned config is the one that a stock ``mlx_lm.load``
needs, and every layer left unquantized is listed with its reason. Try it:
``mlx-slim quantize MODEL -o DIR --bits 4``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.dequantize import dequantize
from mlx_slim.models.load import Loaded, load
from mlx_slim.models.opening import read_weights
from mlx_slim.models.quantized import LayerFormat, format_of, is_quantized, use_fast_matmul
from mlx_slim.quantization.policy import Skipped, leaves, make_policy
from mlx_slim.reading import ModelConfig
from mlx_slim.runtime import on_gpu

_PIECE = 1 << 18  # bytes of the rows that are rounded to a float format at a time, on a CPU


@dataclass(frozen=True)
class QuantizeReport:
    """What quantization did.

    Attributes:
        config: The model config with ``quantization`` filled in; the argument is not changed.
        method: One of ``methods.METHODS``.
        bits_per_weight: Bytes of all parameters × 8 / number of weights, norms and scales included.
        bytes_before: Bytes of all parameters of the source.
        bytes_after: Bytes of all parameters now.
        quantized: Format -> number of layers, e.g. ``{"4-bit affine, group 64": 211}``.
        skipped: Layers left as they are, and why.
    """

    config: ModelConfig
    method: str
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    quantized: dict[str, int]
    skipped: list[Skipped] = field(default_factory=list)


def quantize_model(
    model: nn.Module,
    config: ModelConfig,
    quantize: QuantizeConfig,
    recipe: str | None = None,
    formats: Mapping[str, LayerFormat | None] | None = None,
    *,
    read: bool = True,
) -> QuantizeReport:
    """Quantize ``model`` in place by rounding to nearest; on a CPU its layers become fast ones.

    Args:
        model: A dense model, its weights read already or not (``models.opening.open_weights``).
        config: Its ``config.json``.
        quantize: Bits, group size and mode.
        recipe: One of mlx-lm's mixed recipes (``policy.RECIPES``), or None.
        formats: As ``policy.make_policy`` takes them.
        read: Read the weights; else codes are made where they are read (``models.streamed``).

    Raises:
        SlimError: If the model is quantized already, or no layer fits.
    """
    refuse_quantized(model, config)
    policy = make_policy(model, quantize, recipe, formats)
    before = parameter_bytes(model)
    waiting = leaves(model)[::-1]
    while waiting:  # popped, so that each dense layer is freed as soon as it is replaced
        path, module = waiting.pop()
        if path in policy.chosen:
            layer = quantize_layer(module, policy.chosen[path], read=read)
            model.update_modules(tree_unflatten([(path, layer)]))
    if read:
        read_weights(model)
    base = LayerFormat(quantize.group_size, quantize.bits, quantize.mode)
    others = {path: asdict(chosen) for path, chosen in policy.chosen.items() if chosen != base}
    settings = {**asdict(base), **others}
    new_config = {
        **copy.deepcopy(config),
        "quantization": settings,
        "quantization_config": settings,  # where the hub looks for it
    }
    return report(model, new_config, "rtn", before, policy.skipped)


# Quantizes a model whose weights are not read yet.
Quantizer = Callable[[nn.Module, ModelConfig], QuantizeReport]


def load_quantized(
    source: str | Path,
    quantizer: QuantizeConfig | Quantizer,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[Loaded, QuantizeReport]:
    """Load a dense model and quantize each layer as it is read; return it and what was done.

    The numbers are those of ``load`` and of the quantizer; the dense model never exists.

    Args:
        source: Folder or hub id.
        quantizer: What quantizes it; a format stands for ``quantize_model``.
        revision: As ``load`` takes it.
        dtype: As ``load`` takes it.
        trust_remote_code: As ``load`` takes it.

    Raises:
        SlimError: As ``load`` and the quantizer do.
    """
    reports: list[QuantizeReport] = []
    quantize = (
        partial(quantize_model, quantize=quantizer)
        if isinstance(quantizer, QuantizeConfig)
        else quantizer
    )

    def transform(model: nn.Module, config: ModelConfig) -> ModelConfig:
        reports.append(quantize(model, config))
        return reports[0].config

    loaded = load(
        source,
        revision=revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        transform=transform,
    )
    return loaded, reports[0]


def quantize_layer(module: nn.Module, chosen: LayerFormat, *, read: bool = True) -> nn.Module:
    """Return ``module`` quantized and, with ``read``, evaluated.

    On a CPU, MLX rounds to the float formats (mxfp4, nvfp4) through 20 to 40 copies of its input,
    so there a few rows are rounded at a time; each row is rounded by itself in every format.
    """
    settings = asdict(chosen)
    layer = cast(Any, module).to_quantized(**settings)
    if chosen.mode != "affine" and not on_gpu():
        weight = module["weight"]
        rows_RI = weight.reshape(-1, weight.shape[-1])
        step = max(1, _PIECE // (weight.shape[-1] * weight.itemsize))
        pieces: list[Any] = []
        for start in range(0, rows_RI.shape[0], step):
            piece = rows_RI[start : start + step]
            if pieces and not read:  # one after the other, whenever they are computed
                (piece,) = mx.depends([piece], list(pieces[-1]))
            pieces.append(mx.quantize(piece, **settings))
            if read:
                mx.eval(pieces[-1])
        for name, chunks in zip(("weight", "scales"), zip(*pieces, strict=True), strict=True):
            layer[name] = mx.concatenate(list(chunks)).reshape(*weight.shape[:-1], -1)
    if read:
        mx.eval(layer.parameters())
    return layer


def rounded(weight: mx.array, stored: mx.Dtype, chosen: LayerFormat) -> mx.array:
    """Return ``weight`` quantized and dequantized, in the same dtype.

    Args:
        weight: (..., I), I divisible by the group size.
        stored: Dtype of scales and biases on disk: they are rounded to it too.
        chosen: The format.
    """
    settings = asdict(chosen)
    codes, *constants = (
        value.astype(stored).astype(weight.dtype)
        if mx.issubdtype(value.dtype, mx.floating)
        else value
        for value in mx.quantize(weight, **settings)
    )
    scales, biases = constants[0], constants[1] if len(constants) > 1 else None
    if on_gpu():
        return mx.dequantize(codes, scales, biases, **settings).astype(weight.dtype)
    return dequantize(codes, scales, biases, **settings).astype(weight.dtype)


def refuse_quantized(model: nn.Module, config: ModelConfig) -> None:
    """Raise a ``SlimError`` if ``model`` is quantized already."""
    if is_quantized(model) or "quantization" in config:
        raise SlimError(
            "the model is quantized already",
            "dequantize it first: mlx-slim convert MODEL -o DIR --dequantize",
        )


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))  # pyright: ignore


def bits_per_weight(model: nn.Module) -> float:
    """Return the bytes of all parameters × 8 / number of weights, quantized ones counted dense."""
    from mlx_lm.utils import get_total_parameters

    return 8 * parameter_bytes(model) / get_total_parameters(model)


def report(
    model: nn.Module,
    config: ModelConfig,
    method: str,
    bytes_before: int,
    skipped: list[Skipped],
) -> QuantizeReport:
    """Count what a quantized ``model`` holds, and give it the fast CPU layers."""
    kinds: Counter[str] = Counter()
    for _, module in leaves(model):
        if "scales" in module:
            kinds[str(format_of(module))] += 1
    use_fast_matmul(model)
    return QuantizeReport(
        config=copy.deepcopy(config),
        method=method,
        bits_per_weight=bits_per_weight(model),
        bytes_before=bytes_before,
        bytes_after=parameter_bytes(model),
        quantized=dict(sorted(kinds.items())),
        skipped=skipped,
    )
