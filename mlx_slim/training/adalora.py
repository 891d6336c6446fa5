"""The rank budget of AdaLoRA: which triplets of which layers stay (arXiv 2303.10512).

Invariant: after every cut the triplets in use over all layers are exactly ``budget(step)``, which
falls from rank × layers to target_rank × layers along a cubic curve and is exact at both ends. A
cut zeroes λ of the least important triplets; between cuts they may come back, in the last ``final``
steps they may not. Sensitivity, uncertainty and mask belong to the checkpoint.

Importance of triplet i = s(λ_i) + mean s(P_·i) + mean s(Q_i·), with s(w) = Ī · Ū:
I = |w·∇w|, Ī ← β1 Ī + (1−β1) I, Ū ← β2 Ū + (1−β2) |I − Ī|.

Shapes: R rank, L adapted layers. Try it:
``mlx-slim train smollm2-lora adapter.rank=12 adapter.adaptive.target_rank=8``.
"""

from __future__ import annotations

import math
from typing import ClassVar, final

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.adapters.adalora import AdaLoRALinear
from mlx_slim.adapters.inject import adapters_of
from mlx_slim.config.adapter import AdaptiveConfig
from mlx_slim.errors import SlimError
from mlx_slim.training.callbacks import CallbackState, UpdateHook
from mlx_slim.training.optim import check_arrays

_NAMES = ("lora_e", "lora_a", "lora_b")  # λ, Q, P
_AXIS = {"lora_e": (), "lora_a": (0,), "lora_b": (1,)}  # axes of the entries of one triplet


@final
class RankBudget(UpdateHook):
    """Scores and cuts the triplets of all AdaLoRA layers of ``model``.

    Args:
        model: With ``AdaLoRALinear`` layers of one rank.
        config: ``adapter.adaptive``.
    """

    name: ClassVar[str] = "adalora"

    def __init__(self, model: nn.Module, config: AdaptiveConfig) -> None:
        self.config = config
        self._layers = {p: a for p, a in adapters_of(model) if isinstance(a, AdaLoRALinear)}
        self._start = sum(layer.rank for layer in self._layers.values())
        self._end = config.target_rank * len(self._layers)
        self._mean = {key: mx.zeros(value.shape) for key, value in self._parameters().items()}
        self._spread = {key: mx.zeros(value.shape) for key, value in self._parameters().items()}
        self._mask = mx.ones((self._start,))
        self._first, self._last = 0, 1

    def planned(self, total: int) -> None:
        """Lay the steps out.

        Raises:
            SlimError: If warm-up and final steps leave none to cut in.
        """
        self._first, final = (
            math.ceil(value * total if value < 1 else value)
            for value in (self.config.warmup, self.config.final)
        )
        self._last = total - final
        if self._first >= self._last:
            raise SlimError(
                f"adapter.adaptive: {self._first} steps of warm-up and {final} final ones leave "
                f"none of {total} to cut ranks in",
                "lower adapter.adaptive.warmup or adapter.adaptive.final",
            )

    def _parameters(self) -> dict[str, mx.array]:
        return {f"{p}.{name}": layer[name] for p, layer in self._layers.items() for name in _NAMES}

    def settled(self, step: int) -> bool:
        """Return whether the ranks are final after ``step``."""
        return step >= self._last

    def budget(self, step: int) -> int:
        """Return the triplets in use after ``step`` steps, over all layers."""
        progress = (step - self._first) / (self._last - self._first)
        left = (1 - min(1.0, max(0.0, progress))) ** 3
        return self._end + round((self._start - self._end) * left)

    def gradients(self, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the gradients with the penalty's added; take note of the sensitivities."""
        gradients = dict(gradients)
        gamma, config = self.config.orthogonality, self.config
        for path, layer in self._layers.items():
            a_IR, b_RO = layer.lora_a, layer.lora_b
            unit_RR = mx.eye(layer.rank)
            penalty = {
                "lora_a": a_IR @ (a_IR.T @ a_IR - unit_RR),
                "lora_b": (b_RO @ b_RO.T - unit_RR) @ b_RO,
            }
            for name, value in penalty.items():
                key = f"{path}.{name}"
                gradients[key] = gradients[key] + 4 * gamma * value
        for key, value in self._parameters().items():
            now = mx.abs(value * gradients[key])
            mean = config.beta1 * self._mean[key] + (1 - config.beta1) * now
            spread = config.beta2 * self._spread[key] + (1 - config.beta2) * mx.abs(now - mean)
            self._mean[key], self._spread[key] = mean, spread
        mx.eval(self._mean, self._spread)
        return gradients

    def importance(self) -> mx.array:
        """Return the score of every triplet (L·R,), layer after layer."""
        scores = []
        for path in self._layers:
            components = []
            for name in _NAMES:
                key = f"{path}.{name}"
                score = self._mean[key] * self._spread[key]
                components.append(score.mean(axis=_AXIS[name]) if _AXIS[name] else score)
            scores.append(sum(components[1:], components[0]))
        return mx.concatenate(scores)

    def updated(self, step: int) -> None:
        """Cut where it is time, and keep what was cut at zero in the final steps."""
        since = step - self._first
        due = since > 0 and since % self.config.interval == 0
        if step == self._last or (due and step < self._last):
            # The least important go; of equals the later ones, the same on every machine.
            order = np.argsort(-np.array(self.importance()), kind="stable")
            retained = np.zeros(self._start, np.float32)
            retained[order[: self.budget(step)]] = 1
            self._mask = mx.array(retained)
        elif step < self._last:
            return
        begin = 0
        for layer in self._layers.values():
            layer.lora_e = layer.lora_e * self._mask[begin : begin + layer.rank]
            begin += layer.rank
        mx.eval([layer.lora_e for layer in self._layers.values()])

    def state(self) -> CallbackState:
        """Return sensitivities, uncertainties and the mask."""
        arrays = {f"mean/{key}": value for key, value in self._mean.items()}
        arrays |= {f"spread/{key}": value for key, value in self._spread.items()}
        return CallbackState({**arrays, "mask": self._mask})

    def load_state(self, state: CallbackState) -> None:
        """Restore what ``state`` returned.

        Raises:
            KeyError: If the arrays are those of other layers.
        """
        arrays = state.arrays
        check_arrays(arrays, self.state().arrays)
        self._mean = {key: arrays[f"mean/{key}"] for key in self._mean}
        self._spread = {key: arrays[f"spread/{key}"] for key in self._spread}
        self._mask = arrays["mask"]
