"""What a run carries along beside model and optimizer: rounded weights, a rank budget, a watch.

Invariant: the loop knows these calls and nothing of what stands behind them; whatever a callback
remembers between steps is in the checkpoint, as arrays (``state``) or as numbers of ``TrainState``,
so a resumed run repeats the uninterrupted one. Used by ``training/loop.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from mlx_slim.training.state import TrainState

SAVE = "save"  # what ``after`` answers when a checkpoint is due


class Callback:
    """Does nothing; each subclass takes the calls that it needs."""

    def planned(self, total: int) -> None:
        """The run will take ``total`` steps; raise a ``SlimError`` if that cannot be."""

    def settled(self, step: int) -> bool:
        """Return whether the weights after ``step`` may be the run's result."""
        return True

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Return what surrounds every forward and backward pass, validation included."""
        return contextlib.nullcontext()

    def gradients(self, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the gradients (path -> float32) of a step as they are to be used."""
        return gradients

    def updated(self, step: int) -> None:
        """The parameters were updated; ``step`` steps are done."""

    def begin(self, position: TrainState) -> str:
        """The run is about to take its next step: return nothing, or the reason not to."""
        return ""

    def after(self, position: TrainState, last: bool) -> str:
        """A step is done: return nothing, ``SAVE``, or the reason to stop for."""
        return ""

    def state(self) -> dict[str, mx.array]:
        """Return what a checkpoint must hold, flat names."""
        return {}

    def load_state(self, flat: dict[str, mx.array]) -> None:
        """Take back what ``state`` returned.

        Raises:
            KeyError: If the arrays belong to another recipe.
        """

    def captured(self) -> list[dict]:
        """Return modules whose frozen arrays change between steps (a compiled step reads them)."""
        return []


@contextlib.contextmanager
def computing(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Enter ``computing`` of all ``callbacks``."""
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(callback.computing())
        yield


def gather(callbacks: Sequence[Callback]) -> dict[str, mx.array]:
    """Return the states of all ``callbacks`` under one roof: ``NUMBER/name`` -> array."""
    return {
        f"{number}/{name}": value
        for number, callback in enumerate(callbacks)
        for name, value in callback.state().items()
    }


def hand_out(callbacks: Sequence[Callback], flat: dict[str, mx.array]) -> None:
    """Give ``gather``'s arrays back.

    Raises:
        KeyError: If they belong to another recipe.
    """
    if difference := set(flat) ^ set(gather(callbacks)):
        raise KeyError(min(difference))
    for number, callback in enumerate(callbacks):
        prefix = f"{number}/"
        own = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
        callback.load_state(own)
