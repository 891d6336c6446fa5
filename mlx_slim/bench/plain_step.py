"""Loss and gradient the slow, plain way: what a training step is compared with.

Invariant: nothing of the fast path is used: mlx-lm's own model class with dense float32 weights, on
the CPU, one row at a time without padding or cache, full logits, the loss and its gradient with
respect to them in float64, an adapter added to its weight. Try it: ``mlx-slim doctor --self-test``.
Legend: B sequences, T positions, N supervised positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from mlx_slim.data.batches import Batch
from mlx_slim.reading import ModelConfig

_ADAPTER = ("lora_a", "lora_b")


def dense_weights(model: nn.Module) -> dict[str, mx.array]:
    """Return the weights of a model as float32, dequantized by MLX; adapters left out.

    The paths are those of the model without adapters.
    """
    flat = cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))
    dense: dict[str, mx.array] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            continue
        codes, scales, biases = (
            flat.pop(f"{path}.{part}", None) for part in ("weight", "scales", "biases")
        )
        assert codes is not None and scales is not None
        dense[f"{path}.weight"] = mx.dequantize(
            codes,
            scales.astype(mx.float32) if module.mode == "affine" else scales,
            None if biases is None else biases.astype(mx.float32),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
            dtype=mx.float32,
        )
    dense |= {
        path: value.astype(mx.float32)
        for path, value in flat.items()
        if not path.endswith(_ADAPTER)
    }
    return {path.replace(".linear.", "."): value for path, value in dense.items()}


class PlainModel:
    """mlx-lm's model of a config with the weights of another one, dense and in float32.

    Everything is computed on the CPU.

    Args:
        config: Of the model, as it was loaded; what it says of quantization is left out.
        model: Quantized or not, with LoRA adapters or without.
        scale: s of its adapters' updates s · A B.
    """

    def __init__(self, config: ModelConfig, model: nn.Module, scale: float = 0.0) -> None:
        dense = {key: value for key, value in config.items() if "quantization" not in key}
        model_class, args_class = _get_classes(dense)
        self._model: Any = model_class(args_class.from_dict(dense))
        self._scale = scale
        with mx.stream(mx.cpu):
            self._weights = dense_weights(model)
            mx.eval(self._weights)

    def logits(self, tokens_BT: mx.array, trained: dict[str, mx.array] | None = None) -> mx.array:
        """Return logits (B, T, V), float32, with the weights or factors of ``trained``."""
        trained, weights = trained or {}, dict(self._weights)
        weights |= {p: value for p, value in trained.items() if not p.endswith(_ADAPTER)}
        for path in [path for path in trained if path.endswith(_ADAPTER[0])]:
            layer = path.removesuffix(f".{_ADAPTER[0]}")
            update_IO = trained[path] @ trained[f"{layer}.{_ADAPTER[1]}"]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + self._scale * update_IO.T
        self._model.update(tree_unflatten(list(weights.items())))
        return self._model(tokens_BT)

    def step(
        self, batches: Sequence[Batch], trained: dict[str, mx.array]
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Return the mean loss of the supervised tokens, nats, and its gradients, path -> float64.

        Args:
            batches: One row each, not padded.
            trained: Path -> what is differentiated: weights, or LoRA's factors.
        """
        total, count = 0.0, 0
        names = sorted(trained)
        gradients = {name: np.zeros(trained[name].shape) for name in names}
        with mx.stream(mx.cpu):
            values = [trained[name].astype(mx.float32) for name in names]
            for batch in batches:
                tokens_BT, positions_N = mx.array(batch.tokens_BT), mx.array(batch.positions_N)

                def rows(
                    *arrays: mx.array, tokens: mx.array = tokens_BT, at: mx.array = positions_N
                ) -> list[mx.array]:
                    logits_BTV = self.logits(tokens, dict(zip(names, arrays, strict=True)))
                    return [logits_BTV.reshape(-1, logits_BTV.shape[-1])[at]]

                nll_N, by_logits_NV = _cross_entropy(
                    np.array(rows(*values)[0]).astype(np.float64), batch.targets_N
                )
                total, count = total + float(nll_N.sum()), count + len(nll_N)
                cotangent = mx.array(by_logits_NV.astype(np.float32))
                for name, value in zip(names, mx.vjp(rows, values, [cotangent])[1], strict=True):
                    gradients[name] += np.array(value)
        return total / count, {name: value / count for name, value in gradients.items()}


def _cross_entropy(logits_NV: np.ndarray, targets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return −log softmax(logits)[target] (N,) and its derivative by the logits (N, V)."""
    shifted = logits_NV - logits_NV.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=-1, keepdims=True)
    rows = np.arange(len(targets_N))
    derivative = exponentials / sums
    derivative[rows, targets_N] -= 1
    return np.log(sums[:, 0]) - shifted[rows, targets_N], derivative


def largest_difference(
    actual: Mapping[str, mx.array], expected: Mapping[str, mx.array | np.ndarray]
) -> tuple[float, str]:
    """Return the largest ‖a − e‖ / ‖e‖ over the tensors of two gradients, and its path.

    Raises:
        KeyError: If a tensor is in only one of the two.
    """
    if difference := actual.keys() ^ expected.keys():
        raise KeyError(min(difference))
    largest, where = 0.0, ""
    for path, reference in expected.items():
        wide = np.array(reference).astype(np.float64)
        gap = np.linalg.norm(np.array(actual[path]).astype(np.float64) - wide)
        relative = float(gap / max(np.linalg.norm(wide), np.finfo(np.float64).tiny))
        if math.isnan(relative):
            return relative, path
        if relative > largest:
            largest, where = relative, path
    return largest, where
