"""Quantize a model in memory.

Invariant: the model is changed in place, the returned config is the one that a stock
``mlx_lm.load`` needs, and every layer left unquantized is listed with its reason. Try it:
``mlx-slim quantize MODEL -o DIR --bits 4``.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.quantized import is_quantized, use_fast_matmul
from mlx_slim.models.unpack import unpack
from mlx_slim.quantize.policy import Skipped, leaves, make_policy
from mlx_slim.runtime import on_gpu


@dataclass(frozen=True)
class QuantizeReport:
    """What quantization did.

    Attributes:
        config: The model config with ``quantization`` filled in; the given one is left alone.
        method: ``rtn``, ``awq``, ``gptq``, ``dwq`` or ``dynamic``.
        bits_per_weight: Bytes of all parameters × 8 / number of weights, norms and scales included.
        bytes_before: Bytes of all parameters of the source.
        bytes_after: Bytes of all parameters now.
        quantized: Format -> number of layers, e.g. ``{"4-bit affine, group 64": 211}``.
        skipped: Layers left as they are, and why.
    """

    config: dict[str, Any]
    method: str
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    quantized: dict[str, int]
    skipped: list[Skipped] = field(default_factory=list)


def quantize_model(
    model: nn.Module,
    config: dict[str, Any],
    quantize: QuantizeConfig,
    recipe: str | None = None,
) -> QuantizeReport:
    """Quantize ``model`` in place by rounding to nearest; on a CPU its layers become fast ones.

    Args:
        model: A dense model.
        config: Its ``config.json``.
        quantize: Bits, group size and mode.
        recipe: One of mlx-lm's mixed recipes (``policy.RECIPES``), or None.

    Raises:
        SlimError: If the model is quantized already, or no layer fits.
    """
    refuse_quantized(model, config)
    policy = make_policy(model, quantize, recipe)
    before = parameter_bytes(model)
    from mlx_lm.utils import quantize_model as quantize_in_place

    base = {
        "group_size": quantize.group_size,
        "bits": quantize.bits,
        "mode": quantize.mode,
    }

    def decide(path: str, _module: nn.Module) -> bool | dict[str, Any]:
        chosen = policy.chosen.get(path)
        return bool(chosen) if chosen is None or chosen == base else dict(chosen)

    with contextlib.redirect_stdout(io.StringIO()):
        _, new_config = quantize_in_place(
            model,
            config,
            quantize.group_size,
            quantize.bits,
            mode=quantize.mode,
            quant_predicate=decide,
        )
    mx.eval(model.parameters())
    return report(model, new_config, "rtn", before, policy.skipped)


def rounded(
    weight: mx.array, stored: mx.Dtype, *, bits: int, group_size: int, mode: str
) -> mx.array:
    """Return ``weight`` quantized and dequantized, in its own dtype.

    Args:
        weight: (..., I), I divisible by ``group_size``.
        stored: Dtype that scales and biases lie in on disk: they are rounded to it too.
        bits: Bits per code.
        group_size: Weights that share a scale.
        mode: ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
    """
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    codes, *parts = (
        value.astype(stored).astype(weight.dtype)
        if mx.issubdtype(value.dtype, mx.floating)
        else value
        for value in mx.quantize(weight, **settings)
    )
    scales, biases = parts[0], parts[1] if len(parts) > 1 else None
    if on_gpu():
        return mx.dequantize(codes, scales, biases, **settings).astype(weight.dtype)
    return unpack(codes, scales, biases, **settings).astype(weight.dtype)


def refuse_quantized(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise a ``SlimError`` if ``model`` is quantized already."""
    if is_quantized(model) or "quantization" in config:
        raise SlimError(
            "the model is quantized already",
            "make it dense first: mlx-slim convert MODEL -o DIR --dequantize",
        )


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))  # pyright: ignore


def report(
    model: nn.Module,
    config: dict[str, Any],
    method: str,
    bytes_before: int,
    skipped: list[Skipped],
) -> QuantizeReport:
    """Count what a quantized ``model`` holds, and give it the fast CPU layers."""
    from mlx_lm.utils import compute_bits_per_weight

    kinds: Counter[str] = Counter()
    for _, module in leaves(model):
        if "scales" in module:
            kinds[f"{module.bits}-bit {module.mode}, group {module.group_size}"] += 1
    use_fast_matmul(model)
    return QuantizeReport(
        config=copy.deepcopy(config),
        method=method,
        bits_per_weight=float(compute_bits_per_weight(model)),
        bytes_before=bytes_before,
        bytes_after=parameter_bytes(model),
        quantized=dict(kinds),
        skipped=skipped,
    )
