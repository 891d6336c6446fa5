"""What a loop reports, and who listens.

Invariant: loops build these records and call ``Observer.notify``; they never print and never import
a console library. An event's ``as_record`` is exactly its line in ``metrics.jsonl``, whose field
names other programs read (``schema_version`` in ``run.json`` covers them).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import ClassVar, Protocol, Self

from mlx_slim.reading import JsonObject


@dataclass(frozen=True)
class Event:
    """Base of every event; ``name`` is the ``event`` field of its record.

    ``record_keys``: field → its key in the record, where they differ (file formats are stable).
    """

    name: ClassVar[str] = ""
    record_keys: ClassVar[dict[str, str]] = {}

    def as_record(self) -> JsonObject:
        """Return the JSON object of this event, ``event`` first, unset fields left out."""
        fields = {key: value for key, value in asdict(self).items() if value is not None}
        return {"event": self.name} | {self.record_keys.get(k, k): v for k, v in fields.items()}


@dataclass(frozen=True)
class Started(Event):
    """The loop is about to take its first step.

    Attributes:
        total_steps: Optimizer steps of the whole run.
        total_epochs: Passes over the training rows (may be a fraction).
        budget_bytes: Memory that the run may use, bytes.
        first_step: Steps already done (more than 0 after a resume).
        ranks: Processes that compute each step; None for one.
    """

    name: ClassVar[str] = "started"
    total_steps: int
    total_epochs: float
    budget_bytes: int
    first_step: int = 0
    ranks: int | None = None


@dataclass(frozen=True)
class StepDone(Event):
    """One optimizer step.

    Attributes:
        step: Optimizer steps done, counted from 1.
        epoch: Passes over the training rows so far (a fraction).
        loss: Σ token NLL / Σ supervised tokens over the whole step, nats per token.
        tokens: Real (non-padding) tokens of the step, over all ranks.
        computed_tokens: Tokens computed, padding included.
        supervised_tokens: Tokens that the loss counted.
        tokens_per_second: Real tokens per second of computing, without pauses (``train.duty``),
            of all ranks.
        learning_rate: The rate that this step used.
        grad_norm: L2 norm of the gradient before clipping.
        active_memory_bytes: MLX memory in use after the step, bytes.
        peak_memory_bytes: MLX peak since the run began, bytes.
        metrics: The terms of the loss by name, nats per token (``cross_entropy`` and ``divergence``
            of a distillation); None where it has one term. ``parts`` in the record.
        text_age: Steps since the model wrote what a round learns; None without rounds.
    """

    name: ClassVar[str] = "step"
    record_keys: ClassVar[dict[str, str]] = {"metrics": "parts"}
    step: int
    epoch: float
    loss: float
    tokens: int
    computed_tokens: int
    supervised_tokens: int
    tokens_per_second: float
    learning_rate: float
    grad_norm: float
    active_memory_bytes: int
    peak_memory_bytes: int
    metrics: dict[str, float] | None = None
    text_age: int | None = None


@dataclass(frozen=True)
class ValidationDone(Event):
    """The fixed validation split was scored after ``step``; ``best`` if it is the lowest so far.

    ``metrics``: the terms of the loss by name, nats per token; ``parts`` in the record.
    """

    name: ClassVar[str] = "validation"
    record_keys: ClassVar[dict[str, str]] = {"metrics": "parts"}
    step: int
    loss: float
    supervised_tokens: int
    seconds: float
    best: bool
    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class TaskValidated(Event):
    """Questions of a task, none of its test, were answered; ``best`` if ``value`` is so far."""

    name: ClassVar[str] = "task_validation"
    step: int
    task: str
    metric: str
    value: float
    questions: int
    seconds: float
    best: bool


FORGETTING_OF_0_1 = "held_out"  # name of the next event in a ``metrics.jsonl`` of version 0.1


@dataclass(frozen=True)
class ForgettingMeasured(Event):
    """A fixed general text was predicted after ``step`` (0: before the first one).

    Attributes:
        step: Optimizer steps done.
        bits_per_byte: Of the text.
        rise: Relative to the start: 0.02 is 2% more bits.
        within: Whether that is no more than ``forgetting.max_rise``.
        seconds: Wall time.
    """

    name: ClassVar[str] = "forgetting"
    step: int
    bits_per_byte: float
    rise: float
    within: bool
    seconds: float


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint is complete on disk; ``path`` is relative to the run folder."""

    name: ClassVar[str] = "saved"
    step: int
    path: str


@dataclass(frozen=True)
class Resumed(Event):
    """Training resumes from the checkpoint at ``path`` (relative to the run folder).

    ``ranks``: processes that compute each step from here on; None for one.
    """

    name: ClassVar[str] = "resumed"
    step: int
    path: str
    ranks: int | None = None


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should know, one line (``level`` is ``info`` or ``warning``)."""

    name: ClassVar[str] = "notice"
    message: str
    level: str = "info"


@dataclass(frozen=True)
class Done(Event):
    """The loop ended.

    Attributes:
        step: Optimizer steps done.
        reason: ``complete``, ``early_stopping``, ``forgetting``, ``interrupted`` or
            ``non_finite_loss``.
        tokens: Real tokens trained on, this run and the runs it resumed.
        seconds: Time of computing the training steps, without pauses and validations, seconds.
        best_validation: Lowest validation loss, nats per token; None without a validation split.
        best_step: Of the best validation: by ``best_task`` (``train.validate_task``), else by loss.
        peak_memory_bytes: MLX peak, bytes.
        result_step: The step whose weights are the result: the best, or an earlier one that a
            callback allows.
        duty: Fraction of the time that the run computed; None without pauses.
    """

    name: ClassVar[str] = "done"
    step: int
    reason: str
    tokens: int
    seconds: float
    peak_memory_bytes: int
    best_validation: float | None = None
    best_step: int | None = None
    result_step: int | None = None
    duty: float | None = None
    best_task: float | None = None


@dataclass(frozen=True)
class EvalStarted(Event):
    """A model is loaded, and scoring is about to start.

    Attributes:
        model: Hub id or folder.
        adapter: Adapter folder, or None.
        tasks: Names of the tasks, in order.
        questions: Questions of all tasks.
        answered: Those that an earlier run had answered.
        fraction: Fraction of the whole evaluation's work that this was, 0 … 1.
        budget_bytes: Memory of the device, bytes.
    """

    name: ClassVar[str] = "eval_started"
    record_keys: ClassVar[dict[str, str]] = {"fraction": "share"}
    model: str
    tasks: tuple[str, ...]
    questions: int
    answered: int
    fraction: float
    budget_bytes: int
    adapter: str | None = None


@dataclass(frozen=True)
class EvalProgress(Event):
    """More questions of a task are answered, and on disk.

    Attributes:
        task: The task.
        answered: Its questions answered so far.
        questions: All its questions.
        metric: The task's first metric.
        value: That metric over the questions answered so far.
        fraction: Fraction of the whole evaluation's work that is done, 0 … 1.
        tokens_per_second: Tokens computed per second of this process, recently.
        active_memory_bytes: MLX memory in use, bytes.
        peak_memory_bytes: MLX peak since the model was loaded, bytes.
    """

    name: ClassVar[str] = "eval_progress"
    record_keys: ClassVar[dict[str, str]] = {"fraction": "share"}
    task: str
    answered: int
    questions: int
    metric: str
    value: float
    fraction: float
    tokens_per_second: float
    active_memory_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class TaskDone(Event):
    """A task is scored.

    Attributes:
        task: The task.
        num_fewshot: Solved examples before each question.
        n: Questions.
        metrics: Name -> ``value``, ``stderr`` and ``k``, as in ``results.json``.
        seconds: Wall time of its chunks, those of an interrupted run included.
        tokens_per_second: Tokens computed per second.
        peak_memory_bytes: MLX peak, bytes.
    """

    name: ClassVar[str] = "task"
    task: str
    num_fewshot: int | None
    n: int
    metrics: JsonObject
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class EvalDone(Event):
    """All tasks of a model are scored and ``results.json`` is written in ``path``."""

    name: ClassVar[str] = "eval_done"
    model: str
    path: str
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class StageProgress(Event):
    """A stage of work began, is further, or ended (``progress.stage`` reports it).

    Attributes:
        stage: What is done, in words.
        done: Work done so far, in ``unit`` (may be a fraction).
        total: All of it; None where that is unknown.
        unit: Plural noun; empty where only the time is known.
        finished: Whether the stage has ended.
    """

    name: ClassVar[str] = "progress"
    stage: str
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    finished: bool = False


@dataclass(frozen=True)
class EvalAnswering(Event):
    """Questions of a chunk are being answered; its answers are not on disk yet.

    Attributes:
        task: The task.
        answered: Its questions answered, those on disk included.
        questions: All its questions.
        fraction: Fraction of the whole evaluation's work that is done, 0 … 1.
    """

    name: ClassVar[str] = "eval_answering"
    record_keys: ClassVar[dict[str, str]] = {"fraction": "share"}
    task: str
    answered: int
    questions: int
    fraction: float


@dataclass(frozen=True)
class Predicted(Event):
    """What a run was predicted to need, before its first step.

    Attributes:
        predicted_peak_bytes: Peak memory.
        breakdown: Bytes by what takes them at the peak.
    """

    name: ClassVar[str] = "predicted"
    predicted_peak_bytes: int
    breakdown: dict[str, int]


class Observer(Protocol):
    """Anything that wants to hear of events: console, ``metrics.jsonl``, TensorBoard, tests."""

    def notify(self, event: Event) -> None:
        """Take one event; must not raise for an event it does not know."""
        ...


class ClosingObserver:
    """An observer that ``with`` closes, however the block ends."""

    def close(self) -> None:
        """Let go of what the observer holds; safe to call twice."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class Broadcast:
    """One observer that passes every event on to many, in order."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.observers = list(observers)

    def notify(self, event: Event) -> None:
        """Pass ``event`` on to each observer."""
        for observer in self.observers:
            observer.notify(event)
