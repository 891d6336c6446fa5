"""Quantization-aware training: the model computes with the weights that it will be stored with.

Invariant: inside ``computing`` every layer that ``mlx-slim quantize`` would quantize (the same
``make_policy``, so the same layers, bits and groups) computes with dequantize(quantize(w)), and the
gradient reaches w unchanged (straight-through): w_fq = w + stop_gradient(dequantize(quantize(w)) −
w) (arXiv 1308.3432). As the derivative of w_fq by w is 1, that is: evaluate the gradient at the
rounded weights, apply it to the float ones. So weights are rounded once an optimizer step, whatever
the batches, threads and checkpointed blocks inside it, and the loss does not depend on it.

Of an adapter the merged weight is rounded: the base weight W is replaced by round(W') − (W' − W),
with which the adapter's own forward pass gives x · round(W')ᵀ and its own gradients. For DoRA that
gives m the gradient of the rounded row, which is right: rounding a row commutes with scaling it.
Norms, biases and layers that the policy leaves out stay. Memory: one more copy of the rounded
layers while a batch is computed. Try it: ``mlx-slim train smollm2-qat -o runs/qat``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.lora import Adapter
from mlx_slim.models.quantized import LayerFormat
from mlx_slim.quantization.apply import rounded
from mlx_slim.training.callbacks import ForwardHook


@dataclass
class _Site:
    """A layer to fake-quantize: the module with its weight, its adapter, its format."""

    layer: nn.Module
    adapter: Adapter | None
    format: LayerFormat
    fixed: mx.array | None = None  # the rounded weight of a layer that does not change


@final
class FakeQuantizer(ForwardHook):
    """Rounds the weights while a batch is computed.

    Args:
        model: A dense model, with its adapters and with its trainable parameters unfrozen.
        chosen: Path -> format: ``make_policy`` of the dense model.
        stored: Dtype that scales and biases will be stored in.
    """

    name: ClassVar[str] = "qat"

    def __init__(self, model: nn.Module, chosen: dict[str, LayerFormat], stored: mx.Dtype) -> None:
        modules = dict(model.named_modules())
        self._stored = stored
        self._sites = []
        for path, settings in chosen.items():
            module = modules[path]
            adapter = module if isinstance(module, Adapter) else None
            layer = module if adapter is None else adapter.base
            self._sites.append(_Site(layer, adapter, settings))

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, the layers hold rounded weights; afterwards the very arrays that they held."""
        floats = [site.layer["weight"] for site in self._sites]
        try:
            for site in self._sites:
                site.layer["weight"] = self._weight(site)
                mx.eval(site.layer["weight"])  # one at a time: temporaries must not pile up
            yield
        finally:
            for site, weight in zip(self._sites, floats, strict=True):
                site.layer["weight"] = weight
                if site.adapter is not None:
                    site.adapter.end_fake_quantize()

    def _weight(self, site: _Site) -> mx.array:
        weight = site.layer["weight"]
        if site.adapter is not None:
            target = rounded(
                site.adapter.merged_weight().astype(weight.dtype), self._stored, site.format
            )
            return site.adapter.fake_quantize(target).astype(weight.dtype)
        if site.fixed is not None:
            return site.fixed
        value = rounded(weight, self._stored, site.format)
        if "weight" in site.layer._no_grad:
            site.fixed = value
        return value

    def captured(self) -> list[dict]:
        """Return the layers whose arrays change between steps."""
        return [site.layer if site.adapter is None else site.adapter for site in self._sites]
