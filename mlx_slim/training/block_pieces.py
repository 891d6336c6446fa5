"""A pre-norm block cut at its attention and its activation, forward and backward.

Between the pieces NumPy computes (``models/host_attention.py``), on arrays that are evaluated. The
backward pass differentiates each piece again: its graph is lazy, so products that a gradient does
not need are built and never computed. Invariant: a block in pieces computes what it does whole, and
draws the same dropout masks. Try it: ``python -m pytest tests/training/test_blockwise.py``.
Legend: B sequences, T positions, D width, H heads, K heads of keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_slim.models import activations, host_attention, structure
from mlx_slim.models.dropout import dropout_again
from mlx_slim.models.host_attention import Visible
from mlx_slim.models.prefix_attention import PathNode
from mlx_slim.training.optim import trainable

Gradients = dict[str, mx.array]
Building = Callable[[], contextlib.AbstractContextManager[None]]


class Reached(Exception):
    """A piece of a block ends here; carries what it computed."""


@dataclass(frozen=True)
class Call:
    """How a body calls a block: hidden states (B, T, D), and what comes after them."""

    x_BTD: mx.array
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]


class InterceptedBlock:
    """Takes the place of a block: notes how it is called; returns ``output`` or what it was given.

    ``last``: nothing behind it is built, if there is no output.
    """

    def __init__(
        self, block: nn.Module, calls: list[Call], output: mx.array | None, last: bool
    ) -> None:
        self._block, self._calls, self._output, self._last = block, calls, output, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, x_BTD: mx.array, *arguments: Any, **named: Any) -> mx.array:
        """Note the call."""
        self._calls.append(Call(x_BTD, arguments, named))
        if self._output is not None:
            return self._output
        if self._last:
            raise Reached
        return x_BTD


@contextlib.contextmanager
def intercepted_blocks(
    model: nn.Module, calls: list[Call], output: mx.array | None = None
) -> Iterator[None]:
    """Let the body of ``model`` call intercepted blocks."""
    *path, name = structure.blocks_path(model).split(".")
    owner: Any = model
    for each in path:
        owner = owner[each]
    blocks = owner[name]
    owner[name] = [InterceptedBlock(block, calls, output, block is blocks[-1]) for block in blocks]
    try:
        with contextlib.suppress(Reached):
            yield
    finally:
        owner[name] = blocks


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclass
class Keys:
    """What the dropout masks of a block were drawn from."""

    attention: list[mx.array] = field(default_factory=list)
    mlp: list[mx.array] = field(default_factory=list)


def _until(
    piece: Callable[[mx.array, Callable[..., mx.array]], mx.array],
    hidden_BTD: mx.array,
    reached: Callable[..., mx.array],
) -> tuple[mx.array, ...]:
    """Return what ``reached``, called in ``piece``, raises."""
    try:
        piece(hidden_BTD, reached)
    except Reached as end:
        return end.args
    raise AssertionError("a block without attention or SwiGLU")


class BlockPieces:
    """The four pieces of a pre-norm block, each a lazy graph."""

    def __init__(self, block: Any, call: Call) -> None:
        self.block, self.call, self.keys = block, call, Keys()
        self.scale, self.mask = 1.0, cast(Any, None)

    def _attention(self, x_BTD: mx.array, function: Callable[..., mx.array]) -> mx.array:
        with (
            dropout_again(self.keys.attention),
            _replaced(mx.fast, "scaled_dot_product_attention", function),
        ):
            normed = self.block.input_layernorm(x_BTD)
            return self.block.self_attn(normed, *self.call.arguments, **self.call.named)

    def queries(self, x_BTD: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return q (B, H, T, .), k (B, K, T, .) and v; note scale and mask."""

        def reached(*qkv: mx.array, scale: float, mask: Any = None, **_: Any) -> mx.array:
            self.scale, self.mask = scale, mask
            raise Reached(*qkv)

        queries, keys, values = _until(self._attention, x_BTD, reached)
        return queries, keys, values

    def attended(self, x_BTD: mx.array, attended_BHTD: mx.array) -> mx.array:
        """Return what the layer behind attention makes of it (B, T, D)."""
        return self._attention(x_BTD, lambda *_, **__: attended_BHTD)

    def _mlp(self, h_BTD: mx.array, function: Callable[..., mx.array]) -> mx.array:
        with dropout_again(self.keys.mlp), _replaced(activations, "swiglu", function):
            return self.block.mlp(self.block.post_attention_layernorm(h_BTD))

    def gates(self, h_BTD: mx.array) -> tuple[mx.array, mx.array]:
        """Return what the activation gets: gate and up, of one shape."""

        def reached(*gates: mx.array) -> mx.array:
            raise Reached(*gates)

        gate, up = _until(self._mlp, h_BTD, reached)
        return gate, up

    def fed(self, h_BTD: mx.array, active: mx.array) -> mx.array:
        """Return what the layer behind the activation makes of it (B, T, D)."""
        return self._mlp(h_BTD, lambda *_: active)


@dataclass(frozen=True)
class Residuals:
    """What the backward pass of a block needs of its forward pass."""

    pieces: BlockPieces
    visible: Visible
    x_BTD: mx.array
    qkv: tuple[np.ndarray, np.ndarray, np.ndarray]
    attended: mx.array
    sums_BHT: np.ndarray
    h_BTD: mx.array
    gates: tuple[np.ndarray, np.ndarray]


def _numbers(array: mx.array) -> np.ndarray:
    """Return the numbers of an evaluated array, contiguous; not to be written to."""
    return np.ascontiguousarray(np.asarray(array))


def _visible(mask: Any, nodes: Sequence[PathNode] | None) -> Visible:
    if nodes is not None:
        return Visible(nodes=nodes)
    if mask is None or isinstance(mask, str):
        return Visible(causal=mask is not None)
    numbers = _numbers(mask)
    return Visible(mask=numbers.reshape((1,) * (4 - numbers.ndim) + numbers.shape))


def forward(
    pieces: BlockPieces,
    x_BTD: mx.array,
    nodes: Sequence[PathNode] | None,
    build: Building,
) -> tuple[mx.array, Residuals]:
    """Return what comes out of a block, and what its backward pass needs."""
    with build():
        queries, keys, values = pieces.queries(x_BTD)
    mx.eval(queries, keys, values, pieces.keys.attention)
    qkv = _numbers(queries), _numbers(keys), _numbers(values)
    visible = _visible(pieces.mask, nodes)
    numbers, sums_BHT = host_attention.attention(*qkv, pieces.scale, visible)
    attended = mx.array(numbers)  # stays where MLX counts it
    with build():
        h_BTD = x_BTD + pieces.attended(x_BTD, attended)
        gate, up = pieces.gates(h_BTD)
    mx.eval(h_BTD, gate, up, pieces.keys.attention, pieces.keys.mlp)
    gates = _numbers(gate), _numbers(up)
    active, _ = host_attention.swiglu(*gates)
    with build():
        y_BTD = h_BTD + pieces.fed(h_BTD, mx.array(active))
    mx.eval(y_BTD, pieces.keys.mlp)
    return y_BTD, Residuals(pieces, visible, x_BTD, qkv, attended, sums_BHT, h_BTD, gates)


def backward(
    residuals: Residuals,
    by_y_BTD: mx.array,
    build: Building,
) -> tuple[mx.array, Gradients]:
    """Return the gradients by what went into a block, and by its parameters (paths in it)."""
    pieces, block = residuals.pieces, residuals.pieces.block
    x_BTD, h_BTD = residuals.x_BTD, residuals.h_BTD
    gradients: Gradients = {}

    def through(
        piece: Callable[[mx.array], Any],
        value: mx.array,
        cotangents: list[mx.array],
        *modules: str,
        reader: bool,
        skip: mx.array | None = None,
    ) -> mx.array:
        with build():  # while another thread builds, the block holds what that one traces
            named = _parameters(block, modules, reader)
            by_value, by_parameters = _vjp(block, piece, value, named, cotangents)
            if skip is not None:
                by_value = by_value + skip
        mx.eval(by_value, by_parameters)
        gradients.update(by_parameters)
        return by_value

    active, sigmoids = host_attention.swiglu(*residuals.gates)
    by_active = through(
        lambda active: pieces.fed(h_BTD, active), mx.array(active), [by_y_BTD], "mlp", reader=True
    )
    by_gates = [
        mx.array(one)
        for one in host_attention.swiglu_gradients(_numbers(by_active), *residuals.gates, sigmoids)
    ]
    names = ("post_attention_layernorm", "mlp")
    by_h_BTD = through(pieces.gates, h_BTD, by_gates, *names, reader=False, skip=by_y_BTD)
    by_attended = through(
        lambda attended: pieces.attended(x_BTD, attended),
        residuals.attended,
        [by_h_BTD],
        "self_attn",
        reader=True,
    )
    attended = _numbers(by_attended), _numbers(residuals.attended), residuals.sums_BHT
    by_qkv = [
        mx.array(one)
        for one in host_attention.attention_gradients(
            *attended, *residuals.qkv, pieces.scale, residuals.visible
        )
    ]
    names = ("input_layernorm", "self_attn")
    by_x_BTD = through(pieces.queries, x_BTD, by_qkv, *names, reader=False, skip=by_h_BTD)
    return by_x_BTD, gradients


def _parameters(block: Any, modules: Sequence[str], reader: bool) -> Gradients:
    """Return path -> trained array of ``modules``: of ``structure.READERS`` only, or of others."""
    return {
        f"{module}.{name}": value
        for module in modules
        for name, value in trainable(block[module]).items()
        if (name.split(".")[0] in structure.READERS) == reader
    }


def _vjp(
    block: Any,
    piece: Callable[[mx.array], Any],
    value: mx.array,
    named: Gradients,
    cotangents: list[mx.array],
) -> tuple[mx.array, Gradients]:
    """Return the gradients by ``value`` and by the ``named`` parameters of ``block``."""
    names = list(named)

    def with_parameters(value: mx.array, *parameters: mx.array) -> Any:
        block.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        return piece(value)

    _, (by_value, *by_parameters) = mx.vjp(with_parameters, [value, *named.values()], cotangents)
    block.update(tree_unflatten(list(named.items())))
    return by_value, dict(zip(names, by_parameters, strict=True))
