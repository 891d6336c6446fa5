"""Figures over the records of an evaluation: of a task, of its groups, of a text.

Invariant: ``as_json`` is the content of ``results.json``, key by key. Used by
``evaluation/tasks/metrics.py``, which computes them, and ``evaluation/records.py``, which reads
them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mlx_slim.reading import JsonObject, field


@dataclass(frozen=True)
class Figure:
    """A metric over questions.

    Attributes:
        value: Of the metric.
        stderr: Its standard error; None where none is defined.
        k: Right answers; None where the metric counts nothing.
    """

    value: float
    stderr: float | None = None
    k: int | None = None

    @classmethod
    def read(cls, values: JsonObject, where: str) -> Figure:
        """Return the figure of a JSON object.

        Raises:
            SlimError: Names ``where``, the key and its value.
        """
        value = field(values, where, "value", float)
        error = field(values, where, "stderr", float, None)
        return cls(value, error, field(values, where, "k", int, None))


Figures = dict[str, Figure]  # by metric


def figures_json(figures: Figures) -> JsonObject:
    """Return figures as ``results.json`` holds them."""
    return {name: asdict(figure) for name, figure in figures.items()}


def read_figures(values: JsonObject, where: str, key: str) -> Figures | None:
    """Return the figures under ``key`` of a JSON object; None where there are none.

    Raises:
        SlimError: Names ``where``, the key and its value.
    """
    objects = field(values, where, key, dict, None, of=dict)
    if objects is None:
        return None
    return {name: Figure.read(one, f"{where}: {key}.{name}") for name, one in objects.items()}


@dataclass(frozen=True)
class GroupFigures:
    """Figures over several subtasks.

    Attributes:
        n: Questions.
        micro: All questions alike.
        macro: All subtasks alike.
    """

    n: int
    micro: Figures
    macro: Figures

    def as_json(self) -> JsonObject:
        """Return the object of ``categories``."""
        return {"n": self.n, "micro": figures_json(self.micro), "macro": figures_json(self.macro)}


@dataclass(frozen=True)
class SubtaskFigures:
    """Figures of one subtask, and the category that it belongs to."""

    n: int
    metrics: Figures
    category: str

    def as_json(self) -> JsonObject:
        """Return the object of ``subtasks``."""
        return {"n": self.n, "metrics": figures_json(self.metrics), "category": self.category}


@dataclass(frozen=True)
class Groups:
    """Figures of a task with subtasks.

    Attributes:
        whole: Over all of them.
        categories: Name -> figures over the subtasks of a category.
        subtasks: Name -> figures.
    """

    whole: GroupFigures
    categories: dict[str, GroupFigures]
    subtasks: dict[str, SubtaskFigures]


@dataclass(frozen=True)
class TaskSummary:
    """The figures over the records of a task.

    Attributes:
        n: Questions.
        metrics: Over all questions.
        groups: None of a task without subtasks.
    """

    n: int
    metrics: Figures
    groups: Groups | None = None

    def as_json(self) -> JsonObject:
        """Return what a section of ``results.json`` holds of it."""
        values: JsonObject = {"n": self.n, "metrics": figures_json(self.metrics)}
        if self.groups is not None:
            values |= {
                "micro": figures_json(self.groups.whole.micro),
                "macro": figures_json(self.groups.whole.macro),
                "categories": {k: v.as_json() for k, v in self.groups.categories.items()},
                "subtasks": {k: v.as_json() for k, v in self.groups.subtasks.items()},
            }
        return values


@dataclass(frozen=True)
class TextSummary:
    """The figures over the records of a text.

    Attributes:
        n: Windows.
        documents: Of the text.
        bytes: UTF-8, of all documents.
        tokens: Predicted.
        bits_per_byte: Of the text.
        bits_per_token: Of the text.
        perplexity: Of a token.
    """

    n: int
    documents: int
    bytes: int
    tokens: int
    bits_per_byte: float
    bits_per_token: float
    perplexity: float

    def as_json(self) -> JsonObject:
        """Return what the section of ``results.json`` holds of it."""
        values = asdict(self)
        metrics = ("bits_per_byte", "bits_per_token", "perplexity")
        return {
            **{key: value for key, value in values.items() if key not in metrics},
            "metrics": {name: {"value": values[name]} for name in metrics},
        }


Summary = TaskSummary | TextSummary
