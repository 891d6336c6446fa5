"""Optimizers and schedules: those of mlx, bias-corrected, over float32 masters where needed.

Invariant: every optimizer computes in float32. Parameters kept in 16 bits get a float32 master
copy, because 0.02 − 1e-5 rounds back to 0.02 in bfloat16. The learning rate is a plain function of
the step, so a resumed run has it exactly. Weight decay is for matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slim.config.train import TrainConfig
from mlx_slim.errors import SlimError

Schedule = Callable[[int], float]


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Return the warm-up in steps: a fraction of the run when below 1, else a count."""
    count = config.warmup * total_steps if config.warmup < 1 else config.warmup
    return min(math.ceil(count), max(total_steps - 1, 0))


@dataclass(frozen=True)
class Extended:
    """The beginning of a run that was given more steps later.

    Attributes:
        warmup: Its warm-up, optimizer steps, whatever fraction of the longer run that is.
        totals: The steps that it was to take before, in order.
    """

    warmup: int
    totals: tuple[int, ...]

    def until(self, total_steps: int) -> Extended:
        """Return it as it was when the run was to take ``total_steps``."""
        return Extended(self.warmup, tuple(n for n in self.totals if n < total_steps))


def schedule(config: TrainConfig, total_steps: int, extended: Extended | None = None) -> Schedule:
    """Return the learning rate of each optimizer step, the first being step 0.

    Warm-up rises linearly from peak/W to the peak. Then ``constant`` stays, ``linear`` and
    ``cosine`` fall to ``min_lr_ratio`` · peak, reached right after the last step, and ``wsd`` stays
    until the last ``decay`` fraction of the steps and falls linearly there (arXiv 2404.06395).

    A run that was ``extended`` keeps its warm-up. ``linear`` and ``cosine`` then fall once more,
    from the last rate that they had reached, over the steps that were added; ``constant`` and
    ``wsd`` are those of a run that began so long.
    """
    peak, floor = config.learning_rate, config.learning_rate * config.min_lr_ratio
    warmup = extended.warmup if extended else warmup_steps(config, total_steps)
    decaying = max(1, total_steps - warmup)
    ends = [*(extended.totals if extended else ()), total_steps]

    def fall(top: float, progress: float) -> float:
        if config.schedule == "cosine":
            return floor + (top - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return top + (floor - top) * progress

    def falling(step: int) -> float:
        begin, top = warmup, peak
        for end in ends:
            length = max(1, end - begin)
            if step < end or end == total_steps:
                return fall(top, min(1.0, (step - begin) / length))
            begin, top = end, fall(top, (length - 1) / length)
        raise AssertionError

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        if config.schedule in ("cosine", "linear"):
            return falling(step)
        progress = min(1.0, (step - warmup) / decaying)
        if config.schedule == "wsd":
            decay_fraction = max(config.decay, 1 / decaying)
            return peak + (floor - peak) * min(1.0, max(0.0, (progress - 1) / decay_fraction + 1))
        return peak

    return rate


def _build(name: str, weight_decay: float) -> mlx_optim.Optimizer:
    if name == "adamw":
        return mlx_optim.AdamW(0.0, weight_decay=weight_decay, bias_correction=True)
    if name == "adam":
        return mlx_optim.Adam(0.0, bias_correction=True)
    if name == "adafactor":
        return mlx_optim.Adafactor(
            0.0, relative_step=False, scale_parameter=False, weight_decay=weight_decay
        )
    if name == "lion":
        return mlx_optim.Lion(0.0, weight_decay=weight_decay)
    if name == "muon":
        return mlx_optim.Muon(0.0, weight_decay=weight_decay)
    return mlx_optim.SGD(0.0, momentum=0.9, weight_decay=weight_decay)


def _is_hidden_matrix(path: str, parameter: mx.array) -> bool:
    """Return whether Muon suits a parameter: a matrix that is neither embedding nor head."""
    return parameter.ndim == 2 and not any(
        word in path for word in ("embed", "wte", "lm_head", "output.weight")
    )


def decays(path: str, parameter: mx.array) -> bool:
    """Return whether weight decay is meant for a parameter: matrices, and not biases of experts."""
    return parameter.ndim >= 2 and not path.rsplit(".", 1)[-1].endswith("bias")


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable parameters, flat: path -> array."""
    return dict(tree_flatten(model.trainable_parameters()))


def gradient_norm(gradients: dict[str, mx.array]) -> mx.array:
    """Return the L2 norm over all gradients, a float32 scalar.

    Dot products, not ``square().sum()``: see ``models/logits.py`` for what that loses on a CPU.
    """
    flat = (value.reshape(-1) for value in gradients.values())
    return mx.sqrt(sum((value @ value for value in flat), mx.array(0.0)))


def check_arrays(arrays: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    """Refuse arrays of a checkpoint that have other names or shapes than those expected.

    Raises:
        KeyError: A name that is in only one of the two.
        SlimError: If a shape is another one.
    """
    if difference := arrays.keys() ^ expected.keys():
        raise KeyError(min(difference))
    for name, array in arrays.items():
        if array.shape != expected[name].shape:
            raise SlimError(
                f"checkpoint: {name} has the shape {array.shape}, expected {expected[name].shape}",
                "resume from an older checkpoint, or start a new run",
            )


def set_trainable(model: nn.Module, values: dict[str, mx.array]) -> None:
    """Put flat ``values`` back into ``model``."""
    model.update(tree_unflatten(list(values.items())))


@dataclass(frozen=True)
class _Group:
    """Parameters of one mlx optimizer.

    Attributes:
        name: Of the optimizer.
        scale: Multiple of the recipe's learning rate (LoRA+).
        fallback: Multiple besides, of what Muon does not take.
        weight_decay: Of its parameters.
    """

    name: str
    scale: float
    fallback: float
    weight_decay: float

    def key(self, path: str) -> str:
        """Return where a checkpoint holds the state of ``path``.

        Groups that differ only in decay have one set of counters there: they are equal.
        """
        return f"{self.name}@{self.scale!r}/{path}/"


class Optimizer:
    """Groups of parameters, each with an mlx optimizer and a multiple of the learning rate.

    Parameters are flat here, ``path -> array``, so that any subset of them can be passed.

    Args:
        model: Its trainable parameters are what is optimized.
        config: Optimizer name, weight decay and what it is for, rates.
        rate_scale: path -> multiple of the learning rate (LoRA+).
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        rate_scale: Callable[[str], float] = lambda path: 1.0,
    ) -> None:
        self.model = model
        parameters = trainable(model)
        self.masters = {
            path: value.astype(mx.float32)
            for path, value in parameters.items()
            if value.dtype in (mx.bfloat16, mx.float16)
        }
        self._groups: dict[_Group, list[str]] = {}
        for path, value in parameters.items():
            name: str = config.optimizer
            fallback = 1.0
            if name == "muon" and not _is_hidden_matrix(path, value):
                name = "adamw"
                fallback = config.resolved_fallback_rate / config.learning_rate
            decay = config.weight_decay if config.decay_all or decays(path, value) else 0.0
            group = _Group(name, rate_scale(path), fallback, decay)
            self._groups.setdefault(group, []).append(path)
        self._optimizers = {group: _build(group.name, group.weight_decay) for group in self._groups}
        values = {**parameters, **self.masters}
        for group, optimizer in self._optimizers.items():
            optimizer.init({path: values[path] for path in self._groups[group]})

    def update(self, gradients: dict[str, mx.array], learning_rate: float) -> None:
        """Take one step.

        Args:
            gradients: path -> float32 gradient, one for each trainable parameter.
            learning_rate: Of this step; each group takes its multiple.
        """
        current = trainable(self.model)
        values = {**current, **self.masters}
        updated: dict[str, mx.array] = {}
        for group, optimizer in self._optimizers.items():
            paths = self._groups[group]
            optimizer.learning_rate = learning_rate * group.scale * group.fallback
            updated |= optimizer.apply_gradients(
                {path: gradients[path] for path in paths}, {path: values[path] for path in paths}
            )
        self.masters = {path: updated[path] for path in self.masters}
        set_trainable(
            self.model, {path: value.astype(current[path].dtype) for path, value in updated.items()}
        )

    def evaluate(self) -> None:
        """Compute the update one parameter after the other, the largest last.

        All at once, MLX would hold the temporaries of every parameter: for full fine-tuning more
        than another copy of the model. In this order the gradients of the others are gone when the
        temporaries of the largest come. Whoever holds gradients keeps them alive.
        """
        parameters = trainable(self.model)
        states = [self._optimizers[group].state for group in self._groups]
        for path in sorted(parameters, key=lambda path: parameters[path].size):
            moments = [state[path] for state in states if path in state]
            mx.eval(parameters[path], self.masters.get(path), moments)
        mx.eval(self.arrays())

    def arrays(self) -> list[Any]:
        """Return all that an update changes, for ``mx.eval``."""
        return [trainable(self.model), self.state()]

    def state(self) -> dict[str, mx.array]:
        """Return moments, counters and masters as flat named arrays, for a checkpoint."""
        flat = {f"master/{path}": value for path, value in self.masters.items()}
        for group, optimizer in self._optimizers.items():
            for path, value in optimizer.state.items():
                leaves = value if isinstance(value, dict) else {"": value}
                flat |= {group.key(path) + leaf: x for leaf, x in leaves.items()}
        return flat

    def load_state(self, flat: dict[str, mx.array]) -> None:
        """Take back what ``state`` returned.

        Raises:
            KeyError: If the arrays belong to another optimizer or to other parameters.
        """
        check_arrays(flat, self.state())
        self.masters = {path: flat[f"master/{path}"] for path in self.masters}
        for group, optimizer in self._optimizers.items():
            state = cast(dict[str, mx.array | dict[str, mx.array]], optimizer.state)
            for path, value in state.items():
                key = group.key(path)
                if isinstance(value, dict):
                    state[path] = {leaf: flat[key + leaf] for leaf in value}
                else:
                    state[path] = flat[key]
