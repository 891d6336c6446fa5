"""An evaluation task: every key of its YAML file, its one default and what it may be.

Invariant: a task is data, no code: where its rows lie, what they must hold, how a row becomes a
prompt, and which figures are kept. Templates and patterns are compiled when the file is read, so a
file that loads has no syntax error left (those of shipped files are compiled by the tests, and
where they are used); unknown keys are errors. Try it: ``mlx-slim tasks gsm8k``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mlx_slim.config.problems import checked
from mlx_slim.config.read import read_mapping
from mlx_slim.config.section import Section
from mlx_slim.config.values import MOST, MOST_SHOTS, PositiveInt
from mlx_slim.reading import JsonObject

FieldType = Literal["text", "texts", "integer", "number", "list", "object"]
_SHIPPED = "shipped"
_CHOICE_METRICS = ("acc", "acc_norm", "macro_f1", "mc2")
_DOCUMENT_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
_BLOCK_METRICS = ("perplexity", "bits_per_token")
_FRACTIONS = {"mc2"}  # of one question: anything from 0 to 1
_WHOLE_METRICS = ("exact_match", "json_match")
_GENERATION_KEYS = {"until", "max_tokens", "filters", "ignore", "ignore_case"}
_ANSWER_KEYS = {"choices", "target", "continuation", "example", "description", "chat", "subgroups"}


class TaskData(Section):
    """Where the rows lie.

    Attributes:
        path: Hub data set id, or a ``.jsonl``/``.json``/``.parquet`` file (beside the task's file).
        config: Configuration of a hub data set.
        revision: Commit of a hub data set.
        split: The scored split; in a data mirror, the file ``<mirror>/<split>.jsonl``.
        shots: Split (or file) that few-shot examples are the first rows of.
        spare_shot: Where examples are drawn as the harness draws them, one more is drawn and the
            question itself is left out; holds where ``shots`` is ``split``, too.
        hub_splits: What the hub calls a split, where that differs.
        mirror: Folder in the data mirror; the task's name unless given.
        records: Key of a list in a JSON file whose entries are the rows.
        where: Expression that picks rows: ``"{{ type == 'yesno' }}"``.
        missing: What to do when the rows are nowhere, one line.
    """

    path: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str = "test"
    shots: str | None = None
    spare_shot: bool = False
    hub_splits: dict[str, str] = Field(default_factory=dict)
    mirror: str | None = None
    records: str | None = None
    where: str | None = None
    missing: str = ""

    @field_validator("where")
    @classmethod
    def _is_an_expression(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            _check(info, values=[value])
        return value


class Filter(Section):
    """How an answer is read out of a generated text.

    Attributes:
        pattern: Regular expression; its first group that matched is the answer.
        take: Which match counts.
    """

    pattern: str
    take: Literal["first", "last"] = "first"

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, value: str, info: ValidationInfo) -> str:
        _check(info, patterns=[value])
        return value


class Subgroups(Section):
    """Subtasks that are scored separately, each with its own few-shot examples.

    Attributes:
        field: The row's field that names its part.
        categories: Category -> its subtasks; a row of any other subtask is an error.
    """

    field: str
    categories: dict[str, list[str]]

    @property
    def subtasks(self) -> dict[str, str]:
        """Part -> its category."""
        return {name: group for group, names in self.categories.items() for name in names}


class TaskSpec(Section):
    """One evaluation task.

    Attributes:
        name: What ``--task`` calls it; the file's name unless given.
        version: Raised whenever the same model could get another score.
        kind: ``multiple_choice`` (the likeliest continuation wins), ``generation``, or
            ``perplexity`` (the prompt itself is predicted, from its first token on).
        about: What it asks, one line.
        licence: Of the rows.
        source: The paper.
        data: Where the rows lie.
        fields: What a row must hold: ``field: type`` (dots reach into objects), or its values.
        overlap: Fields that hold the question, for ``mlx-slim data overlap``.
        subgroups: Subtasks scored separately.
        num_fewshot: Examples before the question unless ``--num-fewshot`` says otherwise.
        description: Before everything; the system message where a chat template is used.
        prompt: The question.
        choices: Continuations of multiple choice: templates, or one expression that gives a list;
            none may be empty.
        target: The right answer, or a list of them of which any counts: a choice's place or text
            (``evaluation/targets.py`` says how); for generation the text. Templates, or one
            expression.
        example: The answer in a solved example, where that is not the target (a worked solution).
        continuation: The text that is scored after every choice, which is then the end of the
            prompt: the likeliest context wins (WinoGrande).
        delimiter: Between prompt and answer.
        separator: Between examples.
        raw: The text whose words and bytes the perplexities divide by; the prompt unless given.
        block: Tokens of a block: the rows, joined by the separator, are one text, cut into whole
            blocks, in each of which the first token is not predicted (GPTQ and its successors).
        metrics: The figures kept; the kind's own unless given.
        chat: The prompt always goes through the model's chat template.
        until: Texts that end an answer.
        max_tokens: Longest answer, tokens.
        filters: Name -> how an answer is read out of the text; gives the metric ``<name>_match``.
        ignore: Patterns removed from answer and target before they are compared.
        ignore_case: Case does not count.
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    version: PositiveInt = 1
    kind: Literal["multiple_choice", "generation", "perplexity"]
    about: str = ""
    licence: str = ""
    source: str = ""
    data: TaskData = TaskData()
    fields: dict[str, FieldType | list[str]] = Field(default_factory=dict)
    overlap: list[str] = Field(default_factory=list)
    subgroups: Subgroups | None = None
    num_fewshot: Annotated[int, Field(ge=0, le=MOST_SHOTS)] = 0
    description: str = ""
    prompt: str
    choices: str | list[str] | None = None
    target: str | list[str] = ""
    example: str | None = None
    continuation: str | None = None
    raw: str | None = None
    block: Annotated[int, Field(ge=2, le=MOST)] | None = None
    delimiter: str = " "
    separator: str = "\n\n"
    metrics: list[str] = Field(default_factory=list)
    chat: bool = False
    until: list[str] = Field(default_factory=list)
    max_tokens: PositiveInt = 256
    filters: dict[str, Filter] = Field(default_factory=dict)
    ignore: list[str] = Field(default_factory=list)
    ignore_case: bool = False

    @field_validator("description", "prompt", "example", "continuation", "raw")
    @classmethod
    def _is_a_template(cls, value: str | None, info: ValidationInfo) -> str | None:
        _check(info, texts=[value or ""])
        return value

    @field_validator("target", "choices")
    @classmethod
    def _is_an_expression(
        cls, value: str | list[str] | None, info: ValidationInfo
    ) -> str | list[str] | None:
        _check(info, values=[value] if isinstance(value, str) else value or [])
        return value

    @field_validator("ignore")
    @classmethod
    def _are_patterns(cls, value: list[str], info: ValidationInfo) -> list[str]:
        _check(info, patterns=value)
        return value

    @model_validator(mode="after")
    def _keys_suit_the_kind(self) -> TaskSpec:
        if self.kind == "multiple_choice":
            if not self.choices:
                raise ValueError("kind multiple_choice needs choices: templates, or an expression")
            if idle := sorted(_GENERATION_KEYS & self.model_fields_set):
                raise ValueError(f"kind multiple_choice does not use {', '.join(idle)}")
        elif self.kind == "generation":
            if idle := [key for key in ("choices", "continuation") if getattr(self, key)]:
                raise ValueError(f"kind generation does not use {', '.join(idle)}")
        elif idle := sorted((_GENERATION_KEYS | _ANSWER_KEYS) & self.model_fields_set):
            raise ValueError(f"kind perplexity does not use {', '.join(idle)}")
        elif self.block and self.raw:
            raise ValueError("a task with block counts tokens: leave raw out")
        if self.kind != "perplexity":
            if "target" not in self.model_fields_set:
                raise ValueError(f"kind {self.kind} needs target: the right answer")
            if idle := [key for key in ("raw", "block") if getattr(self, key) is not None]:
                raise ValueError(f"kind {self.kind} does not use {', '.join(idle)}")
        if self.target == []:
            raise ValueError("target is an empty list: expected at least one right answer")
        metrics = self._metrics_of_kind
        if unknown := [name for name in self.metrics if name not in metrics]:
            raise ValueError(
                f"no metric {unknown[0]!r} for {self.kind}: known are {', '.join(metrics)}"
            )
        if self.num_fewshot and not self.data.shots:
            raise ValueError(
                f"num_fewshot={self.num_fewshot}, but data.shots names no split to take them from"
            )
        return self

    @property
    def _metrics_of_kind(self) -> tuple[str, ...]:
        if self.kind == "multiple_choice":
            return _CHOICE_METRICS
        if self.kind == "perplexity":
            return _BLOCK_METRICS if self.block else _DOCUMENT_METRICS
        return (*(f"{name}_match" for name in self.filters), *_WHOLE_METRICS)

    @property
    def scores(self) -> tuple[str, ...]:
        """``metrics``, or the kind's own: acc and acc_norm; every filter's; exact_match."""
        if self.metrics:
            return tuple(dict.fromkeys(self.metrics))
        if self.kind == "multiple_choice":
            return ("acc", "acc_norm")
        if self.kind == "perplexity":
            return self._metrics_of_kind
        return tuple(f"{name}_match" for name in self.filters) or ("exact_match",)

    @property
    def counts_answers(self) -> bool:
        """Whether every metric counts right answers, or is made of such counts."""
        return self.kind != "perplexity" and not _FRACTIONS & set(self.scores)


def _check(
    info: ValidationInfo,
    *,
    texts: Sequence[str] = (),
    values: Sequence[str] = (),
    patterns: Sequence[str] = (),
) -> None:
    """Compile templates, expressions and patterns, unless they are a shipped file's.

    Raises:
        ValueError: If one cannot be compiled.
    """
    if info.context == _SHIPPED:
        return
    # Imported here: Jinja and regex are a fifth of what `tasks` takes.
    from mlx_slim.config.expressions import compile_text, compile_value
    from mlx_slim.config.patterns import compile_pattern

    for text in texts:
        compile_text(text)
    for value in values:
        compile_value(value)
    for pattern in patterns:
        compile_pattern(pattern)


def read_task(file: Path, *, shipped: bool = False) -> TaskSpec:
    """Return the task of a YAML file.

    Args:
        file: Its path.
        shipped: Do not compile its templates and patterns: the tests do.

    Raises:
        SlimError: Unreadable file, or wrong keys and values, all of them with file and line.
    """
    values, lines = read_mapping(file)
    origins = {path: f"{file.name}:{line}" for path, line in lines.items()}
    values.setdefault("name", file.stem)
    context = _SHIPPED if shipped else None
    return checked(TaskSpec, _texts(values), origins, [], f"task {file}", context=context)


def _texts(values: JsonObject) -> JsonObject:
    """Let templates be written as YAML numbers: ``choices: [1, 2]`` are texts."""
    return values | {
        key: [_text(one) for one in value] if isinstance(value, list) else _text(value)
        for key, value in values.items()
        if key in ("choices", "target")
    }


def _text(value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if number else value
