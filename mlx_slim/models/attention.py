"""How each block of a model attends: windows, masks, sinks, and whether its backward pass is fused.

Since 0.32.4 MLX has a fused backward pass of attention on Metal. It takes no array as a mask and no
sinks; then, on other devices and below that version, the scores of all pairs of positions are
stored: heads x T numbers for each position.

Invariant: what a class does is looked at, not listed: its graph is built, never computed, with
caches that note which mask each block asks for and attention that notes what it is given.
Try it: ``python -m pytest tests/models/test_attention.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.models import structure
from mlx_slim.runtime import on_metal

UNBOUNDED = 2**31 - 1  # rows of any length
_FUSED_SINCE = (0, 32, 4)
# Widths of a head for which MLX takes its fused kernel by itself. The library has backward kernels
# for 192, 256 and 512 too; since 0.32.2 these need ``force_fused``.
_FUSED_HEADS = frozenset({64, 72, 80, 96, 128})
_CPU_ATTENTION = 0.26  # measured: docs/lab-log.md
# What it costs a Mac to write and read a score, in operations: about 14 passes of 2 bytes at 16
# operations a byte (35% of the FLOP/s of M1 to M4 over 65% of their bandwidth); not measured.
_SCORE_TRAFFIC = 450


def has_fused_backward() -> bool:
    """Return whether this MLX, on a Mac's GPU, has a fused backward pass of attention.

    ``MLX_SDPA_VJP_FALLBACK`` turns it off.
    """
    numbers = version("mlx").split(".")[:3]
    new = tuple(int(number) for number in numbers if number.isdigit()) >= _FUSED_SINCE
    return new and not os.environ.get("MLX_SDPA_VJP_FALLBACK")


def fused_here() -> bool:
    """Return whether this machine computes the backward pass of attention in one kernel."""
    return on_metal() and has_fused_backward()


@dataclass(frozen=True)
class Attention:
    """Attention of one block over a row without padding on the left and without segments.

    Attributes:
        window: Tokens that a position sees; None for all before it.
        heads: Of the queries.
        head_width: Numbers of a head; None where the block does not call MLX's attention.
        array_mask: Whether its mask is an array at any length.
        sinks: Whether it has attention sinks.
    """

    window: int | None = None
    heads: int = 0
    head_width: int | None = None
    array_mask: bool = False
    sinks: bool = False

    @property
    def fused_length(self) -> int:
        """Tokens of the longest row that Metal's fused backward pass takes; 0 for none."""
        if self.head_width not in _FUSED_HEADS or self.array_mask or self.sinks:
            return 0
        return self.window or UNBOUNDED


def attention_of(model: nn.Module) -> list[Attention] | None:
    """Return the attention of each block of ``model``; None where that cannot be seen."""
    log = _watched_pass(model)
    return log and [log.attention(index) for index in range(len(structure.blocks(model)))]


def reads_other_blocks(model: nn.Module) -> bool:
    """Return whether a block attends to keys that another one wrote into its cache (Gemma 3n)."""
    log = _watched_pass(model)
    return log is not None and log.reads_other_blocks


def _watched_pass(model: nn.Module) -> _Log | None:
    """Return what a forward pass asks for; None where the model does not run with such caches."""
    from mlx_lm.models.cache import make_prompt_cache

    log = _Log()
    caches = [_Cache(log) for _ in make_prompt_cache(model)]
    try:
        with _watching(model, log):
            model(mx.zeros((1, 4), dtype=mx.int32), cache=caches)  # type: ignore[operator]
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError):
        return None  # wants caches of another kind, or a device that is not here
    return log


class Balance(NamedTuple):
    """Lengths T at which attention over T positions costs as much as a block's other products.

    Attributes:
        causal: Of rows by themselves.
        masked: Of rows that share a sequence, kept apart by an array.
    """

    causal: float
    masked: float


def attention_balance(model: nn.Module, length: int, *, gpu: bool, fused: bool) -> Balance:
    """Return where attention costs as much as a block's matmuls.

    A token costs 2·P operations in the P weights of a block's linear layers and 4·D·T in unfused
    attention. On a CPU the exponentials of the softmax weigh more than their count. On a Mac where
    the backward pass is fused, a token costs 4·P, forward and backward, and 7·D·T; under an array
    12·D·T, and the scores pass through memory.

    Args:
        model: The model.
        length: Of the longest row or sequence.
        gpu: Whether it runs on a GPU.
        fused: Whether that has the fused backward pass.
    """
    linears = [m for m in structure.blocks(model)[0].modules() if structure.is_linear(m)]
    shapes = [(m.weight.shape[0], _input_width(m)) for m in linears]
    weights = sum(outputs * inputs for outputs, inputs in shapes)
    width = min((size for _, size in shapes), default=1)  # a class may have layers of its own
    layers = [layer for layer in attention_of(model) or [] if layer.head_width] if fused else []
    if not layers:
        balance = weights / (2 * width) * (1.0 if gpu else _CPU_ATTENTION)
        return Balance(balance, balance)
    causal = masked = 0.0
    for layer in layers:
        unfused = layer.heads * (12 * (layer.head_width or 0) + _SCORE_TRAFFIC)
        in_one = 7 * layer.heads * (layer.head_width or 0)
        causal += in_one if length <= layer.fused_length else unfused
        masked += unfused
    return Balance(4 * weights * len(layers) / causal, 4 * weights * len(layers) / masked)


def _input_width(linear: nn.Module) -> int:
    if isinstance(linear, nn.QuantizedLinear):
        return linear["scales"].shape[-1] * linear.group_size
    return linear["weight"].shape[-1]


class _Log:
    """The masks that were requested, and the calls of attention, by block."""

    def __init__(self) -> None:
        self.masks: dict[int, tuple[int | None, bool]] = {}  # id -> its window, always an array
        self.block: int | None = None
        self.reads_other_blocks = False
        self.windows: dict[int, int | None] = {}
        self.calls: dict[int, Attention] = {}
        self._alive: list[mx.array] = []  # so that no id is used twice

    def mask(self, length: int, window: int | None, always: bool) -> mx.array:
        mask = mx.zeros((length, length), dtype=mx.bool_)
        self._alive.append(mask)
        self.masks[id(mask)] = window, always
        if self.block is not None:
            self.windows[self.block] = window
        return mask

    def call(self, queries: mx.array, values: mx.array, mask: Any, sinks: Any) -> None:
        """Note a call of MLX's attention."""
        if self.block is None:
            return
        alike = queries.shape[-1] == values.shape[-1]
        array = isinstance(mask, mx.array)  # one that the block made or changed is always there
        _, always = self.masks.get(id(mask), (None, array))
        self.calls[self.block] = Attention(
            heads=queries.shape[1],
            head_width=queries.shape[-1] if alike else None,
            array_mask=always,
            sinks=sinks is not None,
        )

    def attention(self, block: int) -> Attention:
        """Return what is noted of a block."""
        return replace(self.calls.get(block, Attention()), window=self.windows.get(block))


class _Cache:
    """A key-value cache that records nothing but the masks requested of it."""

    offset = 0
    keys: Any = None
    values: Any = None

    def __init__(self, log: _Log) -> None:
        self._log = log

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[Any, Any]:
        self._log.reads_other_blocks = True
        return self.keys, self.values

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> mx.array:
        return self._log.mask(N, window_size, return_array)


class _Watched:
    """A block that notes the mask it is given, then does what it does."""

    def __init__(self, block: Any, index: int, log: _Log) -> None:
        self._block, self._index, self._log = block, index, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        log = self._log
        for value in (*arguments, *named.values()):
            if id(value) in log.masks:
                log.windows[self._index] = log.masks[id(value)][0]
        log.block = self._index
        try:
            return self._block(*arguments, **named)
        finally:
            log.block = None


@contextmanager
def _watching(model: nn.Module, log: _Log) -> Iterator[None]:
    """Put watchers around the blocks, where the model looks for them, and around attention."""
    *path, name = structure.blocks_path(model).split(".")
    owner: Any = model
    for part in path:
        owner = owner[part]
    blocks, attention = owner[name], mx.fast.scaled_dot_product_attention

    def noted(q: mx.array, k: mx.array, v: mx.array, **named: Any) -> mx.array:
        log.call(q, v, named.get("mask"), named.get("sinks"))
        return attention(q, k, v, **named)

    owner[name] = [_Watched(block, index, log) for index, block in enumerate(blocks)]
    mx.fast.scaled_dot_product_attention = noted
    try:
        yield
    finally:
        owner[name] = blocks
        mx.fast.scaled_dot_product_attention = attention
