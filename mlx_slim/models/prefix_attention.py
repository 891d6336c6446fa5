"""Attention and rotary positions over a list of token runs that rows share.

Inside ``prefix_attention`` a model computes a list (1, P) of nodes (``data/shared.py``): a node's
queries see the keys and values of the nodes on its path, and its own causally; its rotary positions
begin at its depth. All else in a model is computed position by position, so it runs over the list
as it is. Differentiation adds up the gradients of a shared position.

Invariant: the hidden states of a position are those that it has in a row of its own, which
``why_not`` checks on a probe before a model is trained so. Dropout draws one mask for the shared
part. Legend: B rows (1), H heads, P positions, D width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.models.attention import attention_of
from mlx_slim.models.logits_close import Change, logits_close
from mlx_slim.models.rope import boundary_of


class PathNode(Protocol):
    """A node of ``data/shared.py``."""

    @property
    def begin(self) -> int:
        """Its first position in the list."""
        ...

    @property
    def end(self) -> int:
        """Behind its last one."""
        ...

    @property
    def depth(self) -> int:
        """Positions before it in its rows."""
        ...

    @property
    def path(self) -> Sequence[tuple[int, int]]:
        """(begin, end) of the nodes that hold these."""
        ...


@contextlib.contextmanager
def prefix_attention(nodes: Sequence[PathNode] | None) -> Iterator[None]:
    """Let models built inside compute a list of ``nodes``; None changes nothing.

    The graph of a gradient is built inside too: blocks are recomputed there.
    """
    if nodes is None:
        yield
        return
    length = nodes[-1].end
    rope, attention = mx.fast.rope, mx.fast.scaled_dot_product_attention

    def rotated(x_BHPD: mx.array, *arguments: Any, offset: Any = 0, **named: Any) -> mx.array:
        _check(x_BHPD, length)
        return mx.concatenate(
            [
                rope(
                    x_BHPD[..., node.begin : node.end, :],
                    *arguments,
                    offset=offset + node.depth,
                    **named,
                )
                for node in nodes
            ],
            axis=-2,
        )

    def attended(
        q_BHPD: mx.array,
        k_BHPD: mx.array,
        v_BHPD: mx.array,
        *,
        scale: float,
        mask: Any = None,
        **named: Any,
    ) -> mx.array:
        _check(q_BHPD, length)
        _check(k_BHPD, length)
        if mask is None or named.get("sinks") is not None:
            raise ValueError("attention that is not causal, or has sinks")
        results = []
        for node in nodes:
            spans = (*node.path, (node.begin, node.end))
            keys, values = (_joined(x, spans) for x in (k_BHPD, v_BHPD))
            queries = q_BHPD[..., node.begin : node.end, :]
            results.append(attention(queries, keys, values, scale=scale, mask="causal"))
        return mx.concatenate(results, axis=-2)

    mx.fast.rope, mx.fast.scaled_dot_product_attention = rotated, attended
    try:
        yield
    finally:
        mx.fast.rope, mx.fast.scaled_dot_product_attention = rope, attention


def _check(x: mx.array, length: int) -> None:
    if x.shape[0] != 1 or x.shape[-2] != length:
        raise ValueError(f"positions are not on the axis before the last one: {x.shape}")


def merged_spans(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ``spans`` with those that meet as one."""
    merged = [spans[0]]
    for begin, end in spans[1:]:
        if merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return tuple(merged)


def _joined(x_BHPD: mx.array, spans: Sequence[tuple[int, int]]) -> mx.array:
    pieces = [x_BHPD[..., begin:end, :] for begin, end in merged_spans(spans)]
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-2)


class _Node(NamedTuple):
    begin: int
    end: int
    depth: int
    path: tuple[tuple[int, int], ...]


# Three rows, two of which share more than all do, and where each of their positions is in the list.
_PROBE = (0, 1, 2, 3, 4, 5, 6, 6, 3, 1, 2)
_NODES = (
    _Node(0, 5, 0, ()),
    _Node(5, 7, 5, ((0, 5),)),
    _Node(7, 9, 5, ((0, 5),)),
    _Node(9, 10, 7, ((0, 5), (7, 9))),
    _Node(10, 11, 7, ((0, 5), (7, 9))),
)
_ROWS = ((0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 7, 8, 9), (0, 1, 2, 3, 4, 7, 8, 10))


def why_not(
    model: nn.Module,
    longest: int,
    computed: Callable[
        [Sequence[PathNode]], contextlib.AbstractContextManager[None]
    ] = prefix_attention,
) -> str:
    """Return why rows of ``model`` cannot share their beginnings; empty where they can.

    Args:
        model: What is trained, or scored.
        longest: Positions of the longest row.
        computed: Lets a model called inside compute a list of nodes.
    """
    layers = attention_of(model)
    if layers is None or any(not layer.heads for layer in layers):
        return "not all of its layers attend through MLX's attention"
    if any(layer.sinks or (layer.array_mask and layer.window is None) for layer in layers):
        return "its attention has sinks or a mask of its own"
    if any(layer.window is not None and layer.window < longest for layer in layers):
        return f"its attention window is shorter than rows of {longest:,} tokens"
    if boundary_of(model) is not None:
        return "its RoPE depends on the length of a sequence"
    try:
        with computed(_NODES):
            listed = model(mx.array([_PROBE]))[0]  # type: ignore[operator]
        for row in _ROWS:
            alone = model(mx.array([[_PROBE[place] for place in row]]))[0]  # type: ignore[operator]
            if not logits_close(listed[mx.array(row)], alone, Change.SHAPES).close:
                return "its logits are others with shared beginnings"
    except (TypeError, ValueError, AttributeError, IndexError):
        return "its layers do not compute a list of tokens"
    return ""
