"""TensorBoard and Weights & Biases, through their own packages.

Invariant: a tracker listens and is never needed: it is an extra (``pip install
'mlx-slim[tensorboard]'``), it writes on rank 0 only, and ``metrics.jsonl`` holds all that it gets.
Try it: ``mlx-slim train smollm2-lora 'report_to=[tensorboard]' -o run``, then
``tensorboard --logdir run/tensorboard``.
"""

from __future__ import annotations

import importlib
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_slim import runtime
from mlx_slim.artifacts import write_text
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.events import (
    ClosingObserver,
    Done,
    Event,
    ForgettingMeasured,
    Saved,
    Started,
    StepDone,
    TaskValidated,
    ValidationDone,
)
from mlx_slim.round_events import RoundBegun


def _package(module: str, extra: str) -> Any:
    """Import ``module`` of an extra.

    Raises:
        SlimError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SlimError(
            f"report_to names {extra}, which is not installed ({error})",
            f"pip install 'mlx-slim[{extra}]', or take {extra} out of report_to",
        ) from error


def scalars(event: Event) -> dict[str, float]:
    """Return what a tracker draws of ``event``: tag → number; empty for most events."""
    if isinstance(event, StepDone):
        return {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/tokens_per_second": event.tokens_per_second,
            "train/epoch": event.epoch,
            "memory/active_bytes": float(event.active_memory_bytes),
            "memory/peak_bytes": float(event.peak_memory_bytes),
            **_loss_metrics("train", event.metrics),
        }
    if isinstance(event, RoundBegun):
        return {
            "round/tokens": float(event.tokens),
            "round/cut": float(event.cut),
            "round/writing_seconds": event.writing_seconds,
            "round/scoring_seconds": event.scoring_seconds,
            **_loss_metrics("round", event.metrics),
        }
    if isinstance(event, ValidationDone):
        return {"validation/loss": event.loss, **_loss_metrics("validation", event.metrics)}
    if isinstance(event, TaskValidated):
        return {f"validation/{event.task}/{event.metric}": event.value}
    if isinstance(event, ForgettingMeasured):
        return {"forgetting/bits_per_byte": event.bits_per_byte}
    return {}


def _loss_metrics(group: str, metrics: Mapping[str, float] | None) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in (metrics or {}).items()}


class TensorBoard:
    """Writes TensorBoard event files, without TensorFlow or PyTorch.

    Args:
        folder: Where the event files go; a resumed run adds one more file.

    Raises:
        SlimError: If ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        writers = _package("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._event = _package("tensorboard.compat.proto.event_pb2", "tensorboard").Event
        self._summary = _package("tensorboard.compat.proto.summary_pb2", "tensorboard").Summary
        self._writer: Any = writers.EventFileWriter(str(folder))

    def notify(self, event: Event) -> None:
        """Add the numbers of ``event``; on disk at the latest with the next checkpoint."""
        if self._writer is None:
            return
        if values := scalars(event):
            summary = self._summary(
                value=[self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
            )
            step = getattr(event, "step", 0)
            self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if isinstance(event, (Saved, ValidationDone)):
            self._writer.flush()
        elif isinstance(event, Done):
            self.close()

    def close(self) -> None:
        """Write what is left; safe to call twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """Sends the numbers to Weights & Biases (``WANDB_MODE=offline`` keeps them here).

    Args:
        folder: The run folder; ``wandb_id`` in it lets a resumed run continue the same chart.
        name: The run's name.
        config: The resolved recipe.

    Raises:
        SlimError: If ``wandb`` is not installed, or refuses to start.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        wandb = _package("wandb", "wandb")
        identity = folder / "wandb_id"
        if not identity.exists():
            write_text(identity, uuid.uuid4().hex[:12])
        try:
            self._run: Any = wandb.init(
                project="mlx-slim",
                name=name,
                id=identity.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(folder),
                config=dict(config),
            )
        except Exception as error:  # wandb's own errors: no key, no network, a bad setting
            raise SlimError(
                f"wandb does not start: {error}",
                "wandb login, or set WANDB_MODE=offline, or take wandb out of report_to",
            ) from error

    def notify(self, event: Event) -> None:
        """Send the numbers of ``event``; the end of the loop ends the run."""
        if self._run is None:
            return
        if values := scalars(event):
            self._run.log(values, step=getattr(event, "step", 0))
        elif isinstance(event, Done):
            self._run.summary.update(event.as_record())
            self.close()

    def close(self) -> None:
        """End the run; safe to call twice."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Trackers(ClosingObserver):
    """The trackers of ``report_to`` as one observer; a context manager that closes them.

    Args:
        names: ``tensorboard`` and ``wandb``, any of them.
        folder: The run folder.
        name: The run's name.
        config: The resolved recipe.
        rank: This process's rank; every rank but 0 has none. Default: ``runtime.world``'s.

    Raises:
        SlimError: If a name is unknown or its package is missing: before the loop begins.
    """

    def __init__(
        self,
        names: Iterable[str],
        folder: Path,
        *,
        name: str = "",
        config: Mapping[str, Any] | None = None,
        rank: int | None = None,
    ) -> None:
        makers = {
            "tensorboard": lambda: TensorBoard(folder / "tensorboard"),
            "wandb": lambda: WeightsAndBiases(folder, name or folder.name, config or {}),
        }
        self.observers: list[TensorBoard | WeightsAndBiases] = []
        requested = list(names)
        for one in requested:
            if one not in makers:
                raise SlimError(f"report_to names {one!r}", did_you_mean(one, makers))
        if (runtime.world().rank() if rank is None else rank) != 0:
            requested = []
        for one in requested:
            _package(one, one)
        self._waiting = [makers[one] for one in requested]

    def notify(self, event: Event) -> None:
        """Pass ``event`` on to each tracker; they begin, and write, only when a loop starts."""
        if isinstance(event, Started):
            self.observers += [make() for make in self._waiting]
            self._waiting = []
        for observer in self.observers:
            observer.notify(event)

    def close(self) -> None:
        """Write what is left; safe to call twice."""
        for observer in self.observers:
            observer.close()
