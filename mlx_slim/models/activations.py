"""The activations of feed-forward blocks: SwiGLU three times as fast on a CPU, GELU as trained.

MLX evaluates an exponential in 15-20 ns on a CPU and a power of two in 6; SwiGLU is one exponential
an element and was a third of a forward pass beside the matmuls. ``use_fast_swiglu`` gives each
gated MLP a forward through ``exp``; the experts of a mixture keep their forward, which picks and
sorts tokens, and get the activation alone. Invariant: parameters, attributes and base classes stay,
and a class is changed only after its own forward was compared on real weights. Nothing changes on a
GPU. ``use_tanh_gelu`` mends classes that compute GELU by erf where the model was trained with the
tanh formula (Gemma 1, StarCoder2): 3e-4 of the largest logit.
Try it: ``mlx-slim bench train MODEL``.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.models import host_exponentials
from mlx_slim.models.logits_close import Change, logits_close
from mlx_slim.models.structure import GATED_MLP
from mlx_slim.runtime import on_gpu, to_float

_LOG2_E = 1.4426950408889634


def exp(x: mx.array) -> mx.array:
    """Return e^x of float32 ``x``, to 1e-6 relative; on a CPU as a power of two.

    Do not differentiate where ``x`` may exceed 88: infinity times zero is no gradient.
    """
    return mx.exp(x) if on_gpu() else mx.power(2.0, x * _LOG2_E)


def _sigmoid(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + exp(-x))


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return gate · sigmoid(gate) · up, computed in float32, in the dtype of ``gate``."""
    gate32 = gate.astype(mx.float32)
    return (gate32 * _sigmoid(gate32) * up.astype(mx.float32)).astype(gate.dtype)


@swiglu.vjp
def _swiglu_vjp(
    primals: list[mx.array], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = (value.astype(mx.float32) for value in primals)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    derivative = sigmoid + silu * (1.0 - sigmoid)
    return (
        (cotangent * up * derivative).astype(primals[0].dtype),
        (cotangent * silu).astype(primals[1].dtype),
    )


def _forward(self: Any, x: mx.array) -> mx.array:
    gate, up, down = (getattr(self, name) for name in GATED_MLP)
    gated, ungated = gate(x), up(x)
    if host_exponentials.in_use(gated, ungated):
        return down(host_exponentials.swiglu(gated, ungated))
    return down(cast(Any, swiglu)(gated, ungated))


class _ExpertSwiGLU(nn.Module):
    """The activation of mlx-lm's experts, called with the linear half first."""

    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return cast(Any, swiglu)(gate, up)


def use_fast_swiglu(model: nn.Module) -> int:
    """Give every gated MLP of ``model`` the CPU forward, in place; nothing on a GPU.

    Returns:
        The number of MLPs and groups of experts changed (0 on a GPU, and on a second call).
    """
    from mlx_lm.models.switch_layers import SwitchGLU

    if on_gpu():
        return 0
    fast: dict[type, type | None] = {}
    changed = use_fast_experts(model)
    for module in model.modules():
        kind = type(module)
        if isinstance(module, SwitchGLU):
            continue
        if not all(name in module for name in GATED_MLP) or getattr(kind, "fast_swiglu", False):
            continue
        if kind not in fast:
            fast[kind] = _fast_class(module)
        faster = fast[kind]
        if faster is not None:
            module.__class__ = faster
            changed += 1
    return changed


def use_fast_experts(model: nn.Module) -> int:
    """Give the experts of ``model`` the CPU activation, as ``use_fast_swiglu`` does."""
    from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

    changed = 0
    for module in [] if on_gpu() else model.modules():
        # One instance is the default of all mixtures: it is replaced, never changed.
        if isinstance(module, SwitchGLU) and type(module.activation) is SwiGLU:
            cast(Any, module).activation = _ExpertSwiGLU()
            changed += 1
    return changed


def _fast_class(module: nn.Module) -> type | None:
    """Return a subclass of the class of ``module`` with our forward, if it computes the same."""
    gate = getattr(module, GATED_MLP[0])
    if gate["weight"].ndim != 2:  # experts of a class that is not known: their calls differ
        return None
    width = gate["weight"].shape[-1]
    if "scales" in gate:
        width = gate["scales"].shape[-1] * gate.group_size
    x = mx.random.normal((2, width), key=mx.random.key(0))
    try:
        # Wide enough to tell SiLU from GELU: both are x / 2 near zero.
        x = x * (4.0 / max(to_float(mx.abs(gate(x)).max()), 1e-6))
        expected = cast(Any, module)(x)
        mx.eval(expected)  # a CPU widens 16-bit weights: those of one computation at a time
        ours = _forward(module, x)
    except (TypeError, ValueError, AttributeError):  # wants more than one input
        return None
    if expected.shape != ours.shape:
        return None
    if not logits_close(ours, expected, Change.FORWARD).close:
        return None
    kind = type(module)
    return type(f"Fast{kind.__name__}", (kind,), {"__call__": _forward, "fast_swiglu": True})


_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_PLAIN_MLP = ("c_fc", "c_proj")


def _tanh_gated(self: Any, x: mx.array) -> mx.array:
    gate, up, down = (getattr(self, name) for name in GATED_MLP)
    return down(nn.gelu_approx(gate(x)) * up(x))


def _tanh_plain(self: Any, x: mx.array) -> mx.array:
    inner, outer = (getattr(self, name) for name in _PLAIN_MLP)
    return outer(nn.gelu_approx(inner(x)))


def use_tanh_gelu(model: nn.Module, activation: str | None) -> None:
    """Let the feed-forward blocks of ``model`` compute GELU by tanh, where that is ``activation``.

    Args:
        model: As its class builds it; changed in place if the class only knows the erf formula.
        activation: What transformers computes; see ``models/reference.py``.
    """
    source = inspect.getsource(sys.modules[type(model).__module__])
    if activation not in _TANH or "nn.gelu(" not in source or "gelu_approx" in source:
        return
    for module in model.modules():
        for names, forward in ((GATED_MLP, _tanh_gated), (_PLAIN_MLP, _tanh_plain)):
            if all(name in module for name in names):
                kind = type(module)
                module.__class__ = type(f"Tanh{kind.__name__}", (kind,), {"__call__": forward})
