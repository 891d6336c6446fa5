"""The gated delta update of Qwen3.5 and its relatives, with MLX's own function where it pays.

mlx-lm computes it by a loop over the positions wherever its Metal kernel, which has no gradient,
cannot be used: in training, and on a CPU. ``mx.fast.gated_delta_update`` computes the same in
chunks, with a gradient. Invariant: the numbers are those of the loop (bit for bit on a CPU);
parameters and base classes stay. Try it: ``python -m pytest tests/models/test_gated_delta.py``.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_UPDATE, _LOOP = "gated_delta_update", "gated_delta_ops"


def use_fast_gated_delta(model: nn.Module) -> bool:
    """Let the layers of ``model`` that have a gated delta update compute it in chunks, in place.

    Returns:
        Whether ``model`` holds such a layer that was not changed before.
    """
    from mlx_lm.models import gated_delta

    if not hasattr(mx.fast, _UPDATE):  # MLX before 0.32.4
        return False
    loop, update = getattr(gated_delta, _LOOP), getattr(gated_delta, _UPDATE)
    fast = _rebound(update, {_LOOP: _in_chunks(loop)})
    kinds: dict[type, type] = {}
    for module in model.modules():
        kind = type(module)
        call = kind.__dict__.get("__call__")
        if not isinstance(call, FunctionType) or _UPDATE not in call.__code__.co_names:
            continue
        if call.__globals__.get(_UPDATE) is update:
            if kind not in kinds:
                body = {"__call__": _rebound(call, {_UPDATE: fast})}
                kinds[kind] = type(f"Chunked{kind.__name__}", (kind,), body)
            module.__class__ = kinds[kind]
    return bool(kinds)


def _rebound(function: Any, names: dict[str, object]) -> Any:
    """Return ``function`` with other values for some of the global names that it uses."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _in_chunks(loop: Any) -> Any:
    def call(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        g: mx.array,
        beta: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        if g.ndim != 3:  # a decay of each channel (Kimi) is not what MLX's function computes
            return loop(q, k, v, g, beta, state, mask)
        output, state = mx.fast.gated_delta_update(q, k, v, g, beta, state, mask)
        return output, state

    return call
