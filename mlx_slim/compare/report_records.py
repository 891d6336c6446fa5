"""Records of the report: what ``results.json`` of a matrix folder holds and the pages show.

Invariant: the order of the fields is that of the keys in the file, which other programs read; the
pages are rendered from the same records. Try it: ``mlx-slim report DIR``, then look into
``DIR/results.json``.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_slim.compare.records import (
    CellRecord,
    DiskUse,
    FuseFidelity,
    IntruderCounts,
    Kind,
    ModelRecord,
    PruneSummary,
    TrainingCost,
    as_json,
)
from mlx_slim.evaluation.figures import Figures, figures_json
from mlx_slim.evaluation.records import QuestionSet
from mlx_slim.reading import JsonObject

Interval = tuple[float, float]
AGAINST_BASE = "against the base"


@dataclass(frozen=True)
class ReportTask:
    """A task of the report.

    Attributes:
        task: Its name.
        metric: The metric that is reported.
        chance: Fraction that guessing gets right; 0 for free answers.
        questions: What was scored, of the first cell that answered it.
    """

    task: str
    metric: str
    chance: float
    questions: QuestionSet

    def as_json(self) -> JsonObject:
        """Return the object of ``tasks``."""
        named = {"task": self.task, "metric": self.metric, "chance": self.chance}
        return {**named, **self.questions.as_json()}


@dataclass(frozen=True)
class TaskScore:
    """A cell's score on a task, on the task's main metric.

    Attributes:
        k: Right answers.
        n: Questions.
        value: k/n.
        stderr: Its standard error.
        metrics: All metrics.
        micro: Of a task with subtasks: over all questions; None of another task.
        macro: Of a task with subtasks: over its subtasks; None likewise.
    """

    k: int
    n: int
    value: float
    stderr: float
    metrics: Figures
    micro: Figures | None
    macro: Figures | None

    def as_json(self) -> JsonObject:
        """Return the object of ``scores``; what is None is absent."""
        groups = {"metrics": self.metrics, "micro": self.micro, "macro": self.macro}
        figures = {name: figures_json(group) for name, group in groups.items() if group is not None}
        return {"k": self.k, "n": self.n, "value": self.value, "stderr": self.stderr, **figures}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell's line of the matrix table: of its ``CellRecord``, with its scores.

    Attributes:
        scores: Task -> score, of the tasks that it answered.
        mean: Over those tasks; None without any.
        predicted: Always None; the key was published by version 0.1.
    """

    name: str
    model: str
    method: str
    kind: Kind
    seed: int | None
    dtype: str
    learning_rate: float | None
    train: TrainingCost | None
    disk: DiskUse
    parent: str | None
    pruned: PruneSummary | None
    scores: dict[str, TaskScore]
    mean: float | None
    bits_per_byte: float | None
    eval_peak_memory_bytes: int | None
    eval_seconds: float | None
    predicted: None = None
    fidelity: FuseFidelity | None
    intruders: IntruderCounts | None

    @classmethod
    def of(cls, cell: CellRecord, scores: dict[str, TaskScore], mean: float | None) -> Row:
        """Return the line of a cell."""
        computed = {"scores": scores, "mean": mean, "predicted": None}
        stored = {
            key: getattr(cell, key) for key in cls.__dataclass_fields__ if key not in computed
        }
        return cls(**stored, **computed)

    def as_json(self) -> JsonObject:
        """Return the object of ``rows``."""
        scores = {task: score.as_json() for task, score in self.scores.items()}
        return {**as_json(self), "scores": scores}


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One paired comparison of two cells on a task; every difference is second minus first.

    Attributes:
        model: Key of the matrix.
        why: The question that the difference answers.
        first: Cell, usually the base.
        second: Cell that is compared with it.
        task: The task.
        first_score: Of the first, a fraction.
        second_score: Of the second.
        n: Questions.
        delta: Difference of the scores.
        stderr: Its standard error.
        interval: Its 95% interval.
        bootstrap: Its interval by resampling; None where none is drawn.
        gained: Questions where only the second is right.
        lost: Questions where only the first is right.
        p_value: Exact McNemar.
        detectable: Smallest true difference that the corrected test detects in 4 of 5 cases; None
            if there are too few questions for any.
        p_holm: Corrected over all comparisons of the model.
        family: How many those are.
        verdict: In words.
    """

    model: str
    why: str
    first: str
    second: str
    task: str
    first_score: float
    second_score: float
    n: int
    delta: float
    stderr: float
    interval: Interval
    bootstrap: Interval | None
    gained: int
    lost: int
    p_value: float
    detectable: float | None = None
    p_holm: float = 1.0
    family: int = 1
    verdict: str = ""

    @property
    def against_base(self) -> bool:
        """Whether the first is the model's base."""
        return self.why == AGAINST_BASE


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    sd: float


@dataclass(frozen=True)
class SeedSpread:
    """The scores of a method that ran with several seeds: task -> mean and deviation."""

    model: str
    method: str
    seeds: list[int | None]
    tasks: dict[str, Spread]


@dataclass(frozen=True)
class PublishedScore:
    """A base's score beside the published one of the same task, shots and metric.

    Attributes:
        model: Key of the matrix.
        task: The task.
        num_fewshot: Solved examples before each question.
        metric: Of both scores.
        published: A fraction.
        ours: A fraction.
        stderr: Of ours.
        n: Questions that we scored.
        all_rows: Whether those are all rows of the task.
        rows: How many it has.
        within: Whether the two are within 1.96 standard errors.
    """

    model: str
    task: str
    num_fewshot: int
    metric: str
    published: float
    ours: float
    stderr: float
    n: int
    all_rows: bool
    rows: int
    within: bool


@dataclass(frozen=True)
class Extraction:
    """Generated answers of a cell: in how many a filter found none, and how they ended."""

    cell: str
    task: str
    n: int
    unextracted: dict[str, int]
    stopped: dict[str, int]


@dataclass(frozen=True)
class Flip:
    """A question that a cell answered otherwise than its base.

    Attributes:
        cell: The cell.
        base: Its base.
        task: The task.
        direction: ``gained`` or ``lost``.
        doc_id: Row of the question.
        prompt: The question; None if it was not stored.
        target: The right answer.
        before: The base's answer.
        after: The cell's answer.
    """

    cell: str
    base: str
    task: str
    direction: str
    doc_id: int
    prompt: str | None
    target: str
    before: str
    after: str


@dataclass(frozen=True)
class RecipeSettings:
    """Recipes of the tuned cells by recipe key: equal values, and those that differ by cell."""

    common: JsonObject
    differing: dict[str, JsonObject]

    def as_json(self) -> JsonObject:
        """Return the object of ``settings``."""
        return {"common": self.common, "own": self.differing}


@dataclass(frozen=True)
class FailedCell:
    """A cell that is missing, and why."""

    cell: str
    why: str


@dataclass(frozen=True)
class ReportModel:
    """A model of the matrix.

    Attributes:
        entry: As the matrix names it.
        weights_sha256: As recorded by its cells; None without a complete one.
    """

    entry: ModelRecord
    weights_sha256: str | None

    def as_json(self) -> JsonObject:
        """Return the object of ``models``."""
        return {**as_json(self.entry), "weights_sha256": self.weights_sha256}
