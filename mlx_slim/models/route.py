"""Intercepts the blocks of any model during its forward pass.

Invariant: inside ``routed`` the model's forward pass calls a function in place of each block, which
may read the hidden states, skip the block or replace its output; masks, caches, norms and head are
computed by the model, and the blocks are restored afterwards. ``FromBlock`` passes rows through a
model a block at a time; ``enter`` and ``leave`` are what the model computes before its first block
and after its last one. Try it:
``mlx-slim prune MODEL -o DIR --method block-influence --ratio 0.1``.
Legend: B rows, T positions, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.attention import reads_other_blocks
from mlx_slim.models.logits_close import Change, logits_close

Forward = Callable[[mx.array], mx.array]
# (index of the block, its forward pass with its own mask, hidden_BTD) -> hidden_BTD
Route = Callable[[int, Forward, mx.array], mx.array]


@dataclass(frozen=True)
class _Routing:
    """Where a block's forward pass goes, and the number of each block by its ``id``."""

    route: Route
    index: dict[int, int]


def _routed_class(original: type, routing: _Routing) -> type:
    class Routed(original):  # type: ignore[misc, valid-type]
        """The same block; ``route`` is called in its place."""

        def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            def forward(hidden_BTD: mx.array) -> mx.array:
                return original.__call__(self, hidden_BTD, *args, **kwargs)

            return routing.route(routing.index[id(self)], forward, hidden)

    Routed.__name__ = f"Routed{original.__name__}"
    return Routed


@contextlib.contextmanager
def routed(blocks: list[nn.Module], route: Route) -> Iterator[None]:
    """Call ``route`` in place of each of ``blocks`` inside the context, which may be nested."""
    originals = [type(block) for block in blocks]
    routing = _Routing(route, {id(block): i for i, block in enumerate(blocks)})
    classes = {original: _routed_class(original, routing) for original in set(originals)}
    for block, original in zip(blocks, originals, strict=True):
        block.__class__ = classes[original]
    try:
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.__class__ = original


def entangled(model: nn.Module) -> str:
    """Return what the blocks do that keeps them from being computed one at a time, in words.

    Empty where each reads what the block before it returned, and no more. Nothing is computed: no
    weight is read.
    """
    if reads_other_blocks(model):
        return "attend to keys of other blocks"
    try:
        passed = [hidden for _, hidden in _visits(model, mx.zeros((1, 4), mx.int32))]
    except (TypeError, ValueError):
        passed = []  # a block that returns more than hidden states
    count = len(structure.blocks(model))
    if len(passed) != count or any(one is not passed[0] for one in passed):
        return "pass on more than hidden states"
    return ""


def refuse_entangled(model: nn.Module) -> None:
    """Raise a ``SlimError`` unless each block reads what the block before it returned, and no more.

    Nothing is computed: no weight is read.
    """
    if reason := entangled(model):
        raise SlimError(
            f"blocks of {type(model).__module__.rsplit('.', 1)[-1]} {reason}: they cannot be "
            "computed one at a time",
            "use another --method",
        )


def _visits(model: nn.Module, tokens_BT: mx.array) -> list[tuple[Forward, mx.array]]:
    """Return (forward pass, hidden states given to it) of each block; no block is computed."""
    visits: list[tuple[Forward, mx.array]] = []

    def route(_index: int, forward: Forward, hidden_BTD: mx.array) -> mx.array:
        visits.append((forward, hidden_BTD))
        return hidden_BTD

    with routed(structure.blocks(model), route):
        model(tokens_BT)  # type: ignore[operator]  # logits are never computed
    # The class of a routed block refers to itself: until the garbage collector comes it holds
    # ``visits``, but not hidden states that are not computed, and with them the embedding.
    hidden = visits.copy()
    visits.clear()
    return hidden


def enter(model: nn.Module, tokens_BT: mx.array) -> tuple[mx.array, list[Forward]]:
    """Return the hidden states (B, T, D) that enter the first block, and each block's forward.

    A forward keeps the masks of these rows; it computes with the layers that the block has when it
    is called.
    """
    visits = _visits(model, tokens_BT)
    return visits[0][1], [forward for forward, _ in visits]


def leave(model: nn.Module, tokens_BT: mx.array, hidden_BTD: mx.array) -> mx.array:
    """Return the logits (B, T, V) of the hidden states that the last block returned."""
    with routed(structure.blocks(model), lambda *_: hidden_BTD):
        return model(tokens_BT)  # type: ignore[operator]


class Watched(nn.Module):
    """A layer that passes its input to ``look`` before it computes."""

    def __init__(self, layer: nn.Module, look: Callable[[mx.array], None]) -> None:
        super().__init__()
        self.layer = layer
        self._look = look

    def __call__(self, x: mx.array) -> mx.array:
        """Return the layer's output."""
        self._look(x)
        return self.layer(x)  # pyright: ignore[reportCallIssue]


@contextlib.contextmanager
def replaced(block: nn.Module, path: str, make: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    """Put ``make`` of the layer at ``path`` inside ``block`` in its place."""
    *names, leaf = path.split(".")
    parent: Any = block
    for name in names:
        parent = parent[name]
    layer = parent[leaf]
    parent[leaf] = make(layer)
    try:
        yield
    finally:
        parent[leaf] = layer


def watched(
    block: nn.Module, path: str, look: Callable[[mx.array], None]
) -> contextlib.AbstractContextManager[None]:
    """Pass the inputs of the layer at ``path`` inside ``block`` to ``look``."""
    return replaced(block, path, lambda layer: Watched(layer, look))


class FromBlock:
    """A model from one of its blocks on: what comes before is computed once.

    Args:
        model: Its blocks map hidden states to hidden states.
        rows_NT: Token ids.
    """

    def __init__(self, model: nn.Module, rows_NT: mx.array) -> None:
        self._model: Any = model
        self._rows_NT = rows_NT
        self._blocks = structure.blocks(model)
        self._begin = 0
        self._entering: list[mx.array] = []  # hidden_1TD of block _begin, by row

    def advance(self, block: int) -> None:
        """Begin at ``block``, which is not before the present one, with its layers as they are."""
        if block > self._begin:
            entering = []
            for number in range(len(self._rows_NT)):
                entering.append(self._pass(number, block)[1])
                mx.eval(entering[-1])  # the blocks after it, and the logits, are never computed
            self._begin, self._entering = block, entering

    def logits(self, number: int) -> mx.array:
        """Return the logits (T, V) of a row."""
        return self._pass(number, self._begin)[0][0]

    def second_moments(
        self, block: int, layers: list[str], rows: Sequence[int] | None = None
    ) -> dict[str, mx.array]:
        """Return layer -> E[x xᵀ] (I, I), float32, of its I inputs over all tokens.

        Args:
            block: Not before the one begun at.
            layers: Paths inside the block.
            rows: Numbers of the rows whose tokens count; None takes all.
        """
        numbers = range(len(self._rows_NT)) if rows is None else rows
        tokens = len(numbers) * self._rows_NT.shape[1]
        moments: dict[str, mx.array] = {}
        latest: list[mx.array] = []  # the last input and its product: q, k and v read the same

        def look(x_1TI: mx.array, layer: str) -> None:
            if not latest or latest[0] is not x_1TI:
                x_TI = x_1TI.reshape(-1, x_1TI.shape[-1]).astype(mx.float32)
                latest[:] = [x_1TI, x_TI.T @ x_TI / tokens]
            moments[layer] = moments[layer] + latest[1] if layer in moments else latest[1]

        with contextlib.ExitStack() as stack:
            for layer in layers:
                look_there = partial(look, layer=layer)
                stack.enter_context(watched(self._blocks[block], layer, look_there))
            for number in numbers:
                self._pass(number, block)
                latest.clear()
                mx.eval(moments)  # the blocks after it are never computed
        return moments

    def _pass(self, number: int, block: int) -> tuple[mx.array, mx.array]:
        """Return the logits of a row and the hidden states that enter ``block``."""
        seen: list[mx.array] = []

        def route(index: int, forward: Forward, hidden_1TD: mx.array) -> mx.array:
            if index < self._begin:
                return hidden_1TD
            if index == self._begin and self._entering:
                hidden_1TD = self._entering[number]
            if index == block:
                seen.append(hidden_1TD)
            return forward(hidden_1TD)

        with routed(self._blocks, route):
            logits_1TV = self._model(self._rows_NT[number][None])
        return logits_1TV, seen[0]


def splits_at_blocks(model: nn.Module, row_1T: mx.array) -> bool:
    """Return whether the last block computes the same from its hidden states alone.

    Blocks that read keys of other blocks, or hand on more than hidden states, do not.
    """
    if reads_other_blocks(model):  # it may find the right ones, of a pass before
        return False
    try:
        last = FromBlock(model, row_1T)
        expected = last.logits(0)
        last.advance(len(structure.blocks(model)) - 1)
        return logits_close(last.logits(0), expected, Change.NOTHING).close
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        return False
