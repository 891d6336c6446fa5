"""Records of an evaluation: figures, and a task's section of ``results.json``.

Invariant: ``as_json`` is what stands in the file, key by key; ``read`` refuses what cannot be used
with one line that names file and key, and reads what version 0.1 wrote. Try it:
``mlx-slim eval MODEL --task openbookqa -o OUT``, then look into ``OUT/results.json``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

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
    """Return figures as they stand in ``results.json``."""
    return {name: asdict(figure) for name, figure in figures.items()}


def _figures(values: JsonObject, where: str, key: str) -> Figures | None:
    """Return the figures under ``key``; None where there are none."""
    objects = field(values, where, key, dict, None, of=dict)
    if objects is None:
        return None
    return {name: Figure.read(one, f"{where}: {key}.{name}") for name, one in objects.items()}


@dataclass(frozen=True)
class QuestionSet:
    """What must be equal in two results that are compared; None where it is not recorded.

    Attributes:
        task_version: Of the task's definition.
        num_fewshot: Solved examples before each question.
        limit: First rows only (of each subject), or None.
        rows_sha256: Checksum of the scored rows.
        shots_sha256: Of the rows that examples are taken from; None without examples.
        fewshot_sampling: How examples were chosen; None without examples.
        definition_sha256: Of the task's definition.
        n: Questions.
    """

    task_version: int | None
    num_fewshot: int | None
    limit: int | None
    rows_sha256: str | None
    shots_sha256: str | None
    fewshot_sampling: str | None
    definition_sha256: str | None
    n: int

    @classmethod
    def read(cls, section: JsonObject, where: str) -> QuestionSet:
        """Return what a section of ``results.json`` says.

        Raises:
            SlimError: Names ``where``, the key and its value.
        """
        numbers = ("task_version", "num_fewshot", "limit")
        return cls(
            **{
                key.name: field(section, where, key.name, int if key.name in numbers else str, None)
                for key in fields(cls)[:-1]
            },
            n=field(section, where, "n", int, low=1),
        )

    def differing(self, other: QuestionSet) -> list[str]:
        """Return the names of the fields that differ."""
        return [
            key.name for key in fields(self) if getattr(self, key.name) != getattr(other, key.name)
        ]

    def as_json(self) -> JsonObject:
        """Return one flat object."""
        return asdict(self)


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
class TaskSection:
    """A task's section of ``results.json``, for those who read it.

    Attributes:
        questions: What was scored.
        metrics: Over all questions.
        micro: The same of a task with subtasks; None of another task.
        macro: Means over its subtasks; None likewise.
        categories: Name -> figures over the subtasks of a category.
        truncated: Requests cut to the model's longest input.
        samples_sha256: Of the file of records.
    """

    questions: QuestionSet
    metrics: Figures
    micro: Figures | None
    macro: Figures | None
    categories: dict[str, GroupFigures]
    truncated: int
    samples_sha256: str | None

    @classmethod
    def read(cls, section: JsonObject, where: str) -> TaskSection:
        """Return the record of a section.

        Args:
            section: Of ``results.json``.
            where: Begins the message: the file and the task.

        Raises:
            SlimError: Names ``where``, the key and its value.
        """
        categories = field(section, where, "categories", dict, {}, of=dict)
        return cls(
            questions=QuestionSet.read(section, where),
            metrics=_figures(section, where, "metrics") or {},
            micro=_figures(section, where, "micro"),
            macro=_figures(section, where, "macro"),
            categories={
                name: GroupFigures(
                    field(group, f"{where}: {name}", "n", int),
                    _figures(group, f"{where}: {name}", "micro") or {},
                    _figures(group, f"{where}: {name}", "macro") or {},
                )
                for name, group in categories.items()
            },
            truncated=field(section, where, "truncated", int, 0),
            samples_sha256=field(section, where, "samples_sha256", str, None),
        )
