"""What takes part in a run besides model and optimizer: QAT, AdaLoRA, a measurement of forgetting.

Invariant: a callback owns its whole state, and a checkpoint stores it (``state``), so a resumed run
repeats the uninterrupted one; the loop (``training/loop.py``) calls these hooks and reads nothing
else of a callback. Every hook class is abstract and every callback is a final subclass of the hooks
that it needs. To add one: subclass a hook and append it to ``Tuned.callbacks``
(``finetuning/build.py``). Try it: ``python -m pytest tests/training/test_callbacks.py``.
"""

from __future__ import annotations

import contextlib
import enum
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import mlx.core as mx

from mlx_slim.reading import JsonObject


class Action(enum.IntEnum):
    """What the loop does next; of several callbacks the greatest counts."""

    CONTINUE = 0
    SAVE = 1  # write a checkpoint
    STOP = 2  # write a checkpoint and end the run


@dataclass(frozen=True)
class Verdict:
    """What a monitor answers after a step.

    Attributes:
        action: What to do next.
        reason: Why the run stops, for ``events.Done``; empty unless it does.
        latest_step: If the run stops: the newest step whose weights may be its result.
    """

    action: Action = Action.CONTINUE
    reason: str = ""
    latest_step: int | None = None


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict with the greatest action; of equal ones the first, at the least step."""
    verdicts = list(verdicts)
    strongest = max(verdicts, key=lambda one: one.action, default=Verdict())
    steps = [v.latest_step for v in verdicts if v.action == strongest.action]
    return replace(strongest, latest_step=min((s for s in steps if s is not None), default=None))


@dataclass(frozen=True)
class CallbackState:
    """What a checkpoint stores of one callback.

    Attributes:
        arrays: Name -> array, in ``callbacks.safetensors``.
        values: JSON values, in ``state.json``.
    """

    arrays: dict[str, mx.array] = field(default_factory=dict)
    values: JsonObject = field(default_factory=dict)


class Callback(ABC):
    """Base of the hooks below; ``name`` is unique in a run and names its part of a checkpoint."""

    name: ClassVar[str]


class ForwardHook(Callback):
    """Surrounds every forward and backward pass; without state."""

    @abstractmethod
    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Return what surrounds a pass, validation included."""

    @abstractmethod
    def captured(self) -> list[dict]:
        """Return modules whose frozen arrays change between steps (a compiled step reads them)."""


class StatefulCallback(Callback):
    """Remembers something between steps."""

    @abstractmethod
    def state(self) -> CallbackState:
        """Return what a checkpoint must hold."""

    @abstractmethod
    def load_state(self, state: CallbackState) -> None:
        """Restore what ``state`` returned.

        Raises:
            KeyError: If the arrays belong to another recipe.
            SlimError: If the values are damaged or belong to other inputs.
        """


@dataclass(frozen=True)
class MetricValue:
    """A figure of a model.

    Attributes:
        task: Whose questions were answered.
        metric: Name of the figure.
        value: The more the better.
        questions: How many.
    """

    task: str
    metric: str
    value: float
    questions: int


class ValidationMetric(StatefulCallback):
    """Decides which validation is the best, in place of the loss; of several the first."""

    @abstractmethod
    def measure(self) -> MetricValue:
        """Return the figure of the weights as they are, the same on all ranks."""


class UpdateHook(StatefulCallback):
    """Changes gradients before, and parameters after, an optimizer step."""

    @abstractmethod
    def planned(self, total: int) -> None:
        """The run will take ``total`` optimizer steps.

        Raises:
            SlimError: If that is too few.
        """

    @abstractmethod
    def gradients(self, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the gradients (path -> float32) of a step as the optimizer is to use them."""

    @abstractmethod
    def updated(self, step: int) -> None:
        """The parameters were updated; ``step`` steps are done."""

    @abstractmethod
    def settled(self, step: int) -> bool:
        """Return whether the weights after ``step`` may be the run's result."""


class Monitor(StatefulCallback):
    """Measures between steps and may end the run."""

    @abstractmethod
    def begin(self, step: int) -> Verdict:
        """``step`` steps are done and the next one is about to be taken."""

    @abstractmethod
    def after(self, step: int, last: bool) -> Verdict:
        """Step number ``step`` is done; ``last`` if it is the run's last one."""

    @abstractmethod
    def stopped(self) -> bool:
        """Return whether this callback ended the run."""

    @abstractmethod
    def required_steps(self) -> set[int]:
        """Return the steps whose checkpoints must stay, because they may become the result."""

    @abstractmethod
    def reopen(self, undo: bool) -> set[str]:
        """The run takes more steps than planned: forget what only its former last step measured.

        Args:
            undo: False keeps those measurements.

        Returns:
            Names of the events of that step to drop from ``metrics.jsonl``.
        """


@contextlib.contextmanager
def computing(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Enter ``computing`` of all forward hooks among ``callbacks``."""
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, ForwardHook):
                stack.enter_context(callback.computing())
        yield


def collect_states(callbacks: Sequence[Callback]) -> dict[str, CallbackState]:
    """Return name -> state of all callbacks that have one."""
    return {one.name: one.state() for one in callbacks if isinstance(one, StatefulCallback)}


def restore_states(callbacks: Sequence[Callback], states: dict[str, CallbackState]) -> None:
    """Give every callback the state that a checkpoint holds of it.

    Raises:
        KeyError: If the checkpoint belongs to other callbacks, or one of them to another recipe.
        SlimError: As ``StatefulCallback.load_state``.
    """
    stateful = {one.name: one for one in callbacks if isinstance(one, StatefulCallback)}
    if difference := stateful.keys() ^ states.keys():
        raise KeyError(min(difference))
    for name, state in states.items():
        stateful[name].load_state(state)
