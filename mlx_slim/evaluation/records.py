"""Records of an evaluation: sections of ``results.json``, its state and its timings.

Invariant: ``as_json`` is the content of the file, key by key; ``read`` refuses what cannot be used
with one line that names file and key, and reads what version 0.1 wrote. Try it:
``mlx-slim eval MODEL --task openbookqa -o OUT``, then look into ``OUT/results.json``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.figures import Figures, GroupFigures, read_figures
from mlx_slim.reading import JsonObject, field, shown

TEXT = "perplexity"  # key of the section of a text


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
class Timing:
    """What differs from machine to machine: a task's section of ``timings.json``."""

    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int

    @classmethod
    def read(cls, values: JsonObject, where: str) -> Timing:
        """Return the record of a section.

        Raises:
            SlimError: Names ``where``, the key and its value.
        """
        return cls(
            field(values, where, "seconds", float),
            field(values, where, "tokens_per_second", float),
            field(values, where, "peak_memory_bytes", int),
        )


@dataclass(frozen=True)
class TrainedOn:
    """How many questions of a task the model was trained on, and the names of those runs."""

    questions: int
    runs: list[str]


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
            metrics=read_figures(section, where, "metrics") or {},
            micro=read_figures(section, where, "micro"),
            macro=read_figures(section, where, "macro"),
            categories={
                name: GroupFigures(
                    field(group, f"{where}: {name}", "n", int),
                    read_figures(group, f"{where}: {name}", "micro") or {},
                    read_figures(group, f"{where}: {name}", "macro") or {},
                )
                for name, group in categories.items()
            },
            truncated=field(section, where, "truncated", int, 0),
            samples_sha256=field(section, where, "samples_sha256", str, None),
        )

    @property
    def n(self) -> int:
        """Questions."""
        return self.questions.n

    def compared(self) -> JsonObject:
        """Return what must be equal in two results that are compared."""
        return self.questions.as_json()


@dataclass(frozen=True)
class TextSection:
    """The section of a text in ``results.json``.

    Attributes:
        n: Windows.
        bytes: UTF-8, of all documents.
        text_sha256: Of the documents.
        window: Tokens of a window.
        windows: How many there are.
        metrics: Name -> value.
        samples_sha256: Of the file of records.
    """

    n: int
    bytes: int
    text_sha256: str | None
    window: int | None
    windows: int | None
    metrics: Figures
    samples_sha256: str | None

    @classmethod
    def read(cls, section: JsonObject, where: str) -> TextSection:
        """Return the record of a section.

        Raises:
            SlimError: Names ``where``, the key and its value.
        """
        return cls(
            n=field(section, where, "n", int, low=1),
            bytes=field(section, where, "bytes", int, low=1),
            text_sha256=field(section, where, "text_sha256", str, None),
            window=field(section, where, "window", int, None),
            windows=field(section, where, "windows", int, None),
            metrics=read_figures(section, where, "metrics") or {},
            samples_sha256=field(section, where, "samples_sha256", str, None),
        )

    def compared(self) -> JsonObject:
        """Return what must be equal in two results that are compared."""
        return {"text_sha256": self.text_sha256, "window": self.window, "n": self.n}


@dataclass(frozen=True)
class ScoringSettings:
    """How a model was scored; None where it is not recorded."""

    dtype: str | None
    chat_template: bool | None
    system_instruction: str | None
    max_length: int | None
    device: str | None
    kv_bits: int | None


@dataclass(frozen=True)
class EvalResults:
    """``results.json``, for those who read it.

    Attributes:
        model: Folder or hub id.
        adapter: Its adapters in words, or None.
        settings: How it was scored.
        weights_sha256: Of the model; None where it is not recorded.
        adapter_sha256: Of its adapters, or None.
        tasks: Name -> section.
        text: Of a text that was scored, or None.
    """

    model: str
    adapter: str | None
    settings: ScoringSettings
    weights_sha256: str | None
    adapter_sha256: str | None
    tasks: dict[str, TaskSection]
    text: TextSection | None

    @classmethod
    def read(cls, results: JsonObject, where: str) -> EvalResults:
        """Return the record of ``results.json``.

        Args:
            results: Its object.
            where: Begins the message: the file.

        Raises:
            SlimError: Names ``where``, the key and its value.
        """
        model = field(results, where, "model", str)
        sections = field(results, where, "tasks", dict, of=dict)
        for task in sections:
            if task != Path(task).name:
                raise SlimError(
                    f"{where}: {shown(task)} is not the name of a task", "score the model again"
                )
        text = field(results, where, TEXT, dict, None)
        return cls(
            model=model,
            adapter=field(results, where, "adapter", str, None),
            settings=ScoringSettings(
                dtype=field(results, where, "dtype", str, None),
                chat_template=field(results, where, "chat_template", bool, None),
                system_instruction=field(results, where, "system_instruction", str, None),
                max_length=field(results, where, "max_length", int, None),
                device=field(results, where, "device", str, None),
                kv_bits=field(results, where, "kv_bits", int, None),
            ),
            weights_sha256=field(results, where, "weights_sha256", str, None),
            adapter_sha256=field(results, where, "adapter_sha256", str, None),
            tasks={
                task: TaskSection.read(section, f"{where}: {shown(task)}")
                for task, section in sections.items()
            },
            text=None if text is None else TextSection.read(text, f"{where}: {TEXT}"),
        )

    @property
    def sections(self) -> dict[str, TaskSection | TextSection]:
        """The tasks, then the text."""
        return {**self.tasks, **({} if self.text is None else {TEXT: self.text})}


@dataclass(frozen=True, kw_only=True)
class EvalState:
    """``eval.json``: what a resume must match, in the order of ``results.json``.

    Attributes:
        schema_version: Of the format.
        code: Of the scoring: raised when the same settings give other numbers.
        model: Folder or hub id, as given.
        revision: Of a hub id.
        weights_sha256: Of the model.
        adapter: Its adapters in words, or None.
        adapter_sha256: Of its adapters, or None.
        dtype: Computed in.
        dense: Whether quantized weights are dequantized; None until it is decided.
        cache_bytes: Of the caches of answers; None likewise.
        device: ``gpu`` or ``cpu``.
        seed: Of the options.
        chat_template: Whether prompts go through the model's.
        fewshot_as_multiturn: Whether examples are turns.
        system_instruction: The system message, or None.
        max_length: Tokens of the longest input.
        batch_tokens: Of a batch, or None.
        kv_bits: Bits that keys and values are rounded to, or None.
        python: Version.
        system: Platform.
        versions: Of packages.
        tasks: Name -> what the job describes.
    """

    schema_version: int
    code: int
    model: str
    revision: str | None
    weights_sha256: str
    adapter: str | None
    adapter_sha256: str | None
    dtype: str
    dense: bool | None = None
    cache_bytes: int | None = None
    device: str
    seed: int
    chat_template: bool
    fewshot_as_multiturn: bool
    system_instruction: str | None
    max_length: int
    batch_tokens: int | None
    kv_bits: int | None = None
    python: str
    system: str
    versions: dict[str, str]
    tasks: dict[str, JsonObject]
