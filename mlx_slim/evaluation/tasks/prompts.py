"""Questions from rows: prompt, continuations and right answer.

Invariant: the text is what lm-evaluation-harness builds: description, examples separated by
``separator``, the question, and a ``delimiter`` before an answer that belongs to the answer. With
``harness`` sampling the examples are the harness's own draws: one generator a task, one draw a row,
in row order. Else, and for tasks with subtasks, they are the first rows of the few-shot split (of
the question's subtask), and a question is never among its own examples: the next row replaces it.
Try it: ``mlx-slim tasks mmlu_anatomy``.

    description + (prompt + delimiter + answer + separator) × shots + prompt | delimiter + choice

The answer of an example is ``example`` where the task has that. With a ``continuation`` the choices
are contexts, and the last part is

    prompt + choice | delimiter + continuation
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from mlx_slim.config.expressions import compile_text, compile_value, names_in
from mlx_slim.config.task import TaskSpec
from mlx_slim.data.chat_render import apply_chat_template
from mlx_slim.data.formats import Example
from mlx_slim.data.templates import Rendered, Template
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.targets import read_choices, right_places, right_texts
from mlx_slim.evaluation.tasks.question import Question
from mlx_slim.evaluation.tasks.rows import TaskRows
from mlx_slim.evaluation.tasks.spec import FIRST, HARNESS, Task

_SEED = 1234  # of the harness's draws
_PLACEHOLDER = "answer"  # what comes before an answer does not depend on it


@dataclass(frozen=True)
class Chat:
    """A chat template around description and prompt.

    Attributes:
        render: (system, user) -> the prompt, up to where the answer begins.
        renders_bos: The rendered text includes special tokens.
        turns: (system, examples as (question, answer), user) -> the prompt, where examples are
            separate turns; None puts them into the user's message.
        system: Begins every system message, before the task's description.
    """

    render: Callable[[str, str], str]
    renders_bos: bool = False
    turns: Callable[[str, list[tuple[str, str]], str], str] | None = None
    system: str = ""

    def with_system(self, text: str) -> Chat:
        """Return these prompts with ``text`` as the beginning of every system message.

        Raises:
            SlimError: The template refuses or ignores a system message.
        """
        if self.render(text, "?") == self.render("", "?"):
            raise SlimError(
                f"the chat template takes no system message, and --system is {text!r:.60}",
                "leave --system out",
            )
        return replace(self, system=text)

    @classmethod
    def of_model(cls, tokenizer: Any, multiturn: bool, notes: list[str]) -> Chat:
        """Return the prompts of the model's own chat template, as the harness renders them.

        Args:
            tokenizer: Has the template.
            multiturn: Examples are separate turns.
            notes: Receives one line where the template refuses a system message, which is then
                left out.
        """
        refused = "the chat template takes no system message: task descriptions are left out"

        def turns(system: str, examples: list[tuple[str, str]], user: str) -> str:
            messages = [{"role": "user", "content": user}]
            for question, answer in reversed(examples):
                messages = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                    *messages,
                ]
            if system and refused not in notes:
                try:
                    return rendered([{"role": "system", "content": system}, *messages])
                except TemplateError:
                    plain = without(messages)
                    notes.append(refused)
                    return plain
            return without(messages)

        def rendered(messages: list[dict[str, str]]) -> str:
            return apply_chat_template(tokenizer, messages)

        def without(messages: list[dict[str, str]]) -> str:
            try:
                return rendered(messages)
            except TemplateError as error:
                raise SlimError(
                    f"the chat template refuses the questions: {' '.join(str(error).split())}",
                    "try --no-fewshot-as-multiturn, or leave --apply-chat-template out",
                ) from error

        return cls(lambda system, user: turns(system, [], user), turns=turns if multiturn else None)

    @classmethod
    def of(cls, template: Template) -> Chat:
        """Return the prompts of a training template, cut where it lets an answer begin."""

        def rendered(system: str, user: str) -> Rendered:
            messages = [{"role": "system", "content": system}] if system else []
            messages += [{"role": "user", "content": user}]
            messages += [{"role": "assistant", "content": _PLACEHOLDER}]
            fields = {"prompt": user, "completion": _PLACEHOLDER, "system": system}
            return template.render(Example("completions", messages, fields))

        def render(system: str, user: str) -> str:
            whole = rendered(system, user)
            return whole.text[: whole.spans[0][0]]

        return cls(render, rendered("", "?").has_bos)


def build_questions(
    task: Task,
    task_rows: TaskRows,
    num_fewshot: int | None = None,
    limit: int | None = None,
    *,
    chat: Chat | None = None,
    sampling: str = FIRST,
) -> list[Question]:
    """Return the questions of a task, in row order.

    Args:
        task: The task.
        task_rows: Its rows.
        num_fewshot: Examples before each question; None takes the task's own number.
        limit: Only the first ``limit`` rows, of each subtask where the task has any.
        chat: Put description and prompt through a chat template; the choices have no delimiter
            then, as in the harness.
        sampling: ``first`` rows as examples, or the draws of the ``harness``; a task with subtasks
        has
            the first rows of each either way, as MMLU has there.

    Raises:
        SlimError: A row without a field that a template names (the row and the field are named),
            an empty choice, a target that is no choice or is ambiguous (``evaluation/targets.py``),
            or fewer few-shot rows than ``num_fewshot``.
    """
    shots = task.num_fewshot if num_fewshot is None else num_fewshot
    writer = _Writer(task, task_rows, shots, chat, sampling)
    field = task.spec.subgroups.field if task.spec.subgroups else None
    taken: dict[str | None, int] = {}
    questions: list[Question] = []
    for doc_id, row in enumerate(task_rows.rows):
        part = row[field] if field else None
        taken[part] = taken.get(part, 0) + 1
        if limit is None or taken[part] <= limit:
            questions.append(writer.question(doc_id, row, part))
    return questions


class _Writer:
    """Renders the rows of one task."""

    def __init__(
        self, task: Task, task_rows: TaskRows, shots: int, chat: Chat | None, sampling: str
    ) -> None:
        spec = task.spec
        draws = sampling == HARNESS and spec.subgroups is None
        self._random = random.Random(_SEED) if draws else None
        self._task, self._rows, self._count, self._chat = task, task_rows, shots, chat
        self._description = compile_text(spec.description)
        self._prompt = compile_text(spec.prompt)
        self._target = _compiled(spec.target)
        self._solved, self._continuation, self._raw = (
            None if text is None else compile_text(text)
            for text in (spec.example, spec.continuation, spec.raw)
        )
        choices = spec.choices or []
        self._one = compile_value(choices) if isinstance(choices, str) else None
        self._each = [] if isinstance(choices, str) else [compile_text(text) for text in choices]
        self._plain = list(_without_templates(spec))
        self._delimiter = "" if chat else spec.delimiter
        self._field = spec.subgroups.field if spec.subgroups else None
        self._shared: dict[str | None, list[int]] = {}
        self._pairs: dict[int, tuple[str, str]] = {}

    def question(self, doc_id: int, row: Mapping[str, Any], part: str | None) -> Question:
        place = self._rows.place(doc_id)
        for key, text in self._plain:
            if text in row:
                raise self._error(
                    place,
                    f"{key} is the text {text!r} for every row, and the row has a field of that "
                    "name",
                    f'to insert the field write "{{{{ {text} }}}}"',
                )
        description = self._run(self._description, "description", row, place)
        if self._chat:
            description = _joined(self._chat.system, description, self._task.spec.separator)
        prompt_text = self._run(self._prompt, "prompt", row, place)
        examples = [self._pair(index) for index in self._chosen(part, row)]
        if self._task.kind == "perplexity":
            return self._document(doc_id, row, part, prompt_text, place)
        choices = self._choices(row, place)
        target, *others = self._answers(row, choices, place)
        after, contexts = choices, []
        if self._continuation is not None:
            after = [self._run(self._continuation, "continuation", row, place)] * len(choices)
            contexts = [prompt_text + choice for choice in choices]
        return Question(
            doc_id=doc_id,
            subject=part,
            context=self._context(description, examples, prompt_text),
            choices=tuple(self._delimiter + text for text in after),
            lengths=tuple(map(len, contexts or choices)),
            target=target,
            others=tuple(others),
            contexts=tuple(self._context(description, examples, text) for text in contexts),
        )

    def _document(
        self, doc_id: int, row: Mapping[str, Any], part: str | None, text: str, place: str
    ) -> Question:
        """Return a text that is predicted; words are what white space separates, as in the harness.

        An empty text at an end counts as a word there.
        """
        if not text.strip() and self._task.spec.block is None:
            raise self._error(place, "the prompt is empty: there is nothing to predict")
        raw = text if self._raw is None else self._run(self._raw, "raw", row, place)
        lengths = (len(re.split(r"\s+", raw)), len(raw.encode("utf-8", "surrogatepass")))
        return Question(doc_id, part, text, (), lengths, "")

    def _context(self, description: str, examples: list[tuple[str, str]], prompt: str) -> str:
        """Return description, examples and a prompt as the model reads them."""
        if self._chat and self._chat.turns:
            return self._chat.turns(description, examples, prompt)
        spec = self._task.spec
        shots = (f"{before}{spec.delimiter}{text}{spec.separator}" for before, text in examples)
        whole = "".join(shots) + prompt
        return self._chat.render(description, whole) if self._chat else description + whole

    def _chosen(self, part: str | None, row: Mapping[str, Any]) -> list[int]:
        """Return the examples of a question: their places among the few-shot rows."""
        if not self._count:
            return []
        if self._random is not None:
            return self._drawn(self._random, row)
        if part not in self._shared:
            self._shared[part] = self._first(part, None)
        shared, rows = self._shared[part], self._rows.shots
        return self._first(part, row) if any(rows[i] == row for i in shared) else shared

    def _first(self, part: str | None, besides: Mapping[str, Any] | None) -> list[int]:
        """Return the first rows for examples, ``besides`` left out."""
        chosen: list[int] = []
        for index, row in enumerate(self._rows.shots):
            if len(chosen) == self._count:
                break
            if (self._field is None or row[self._field] == part) and row != besides:
                chosen.append(index)
        if len(chosen) < self._count:
            raise self._too_few(len(chosen), part)
        return chosen

    def _drawn(self, generator: random.Random, row: Mapping[str, Any]) -> list[int]:
        """Return the next draw: the examples of the next question, as in the harness.

        Where a question may be among its own examples, one more is drawn, and the question is left
        out.
        """
        pool, data = self._rows.shots, self._task.spec.data
        spare = data.spare_shot or data.shots in (data.split, data.path)
        if len(pool) < self._count + spare:
            raise self._too_few(len(pool), None)
        drawn = generator.sample(range(len(pool)), self._count + spare)
        if spare:
            drawn = [index for index in drawn if pool[index] != row][: self._count]
            if len(drawn) < self._count:  # the row occurs several times
                others = [index for index in range(len(pool)) if pool[index] != row]
                if len(others) < self._count:
                    raise self._too_few(len(others), None)
                drawn = generator.sample(others, self._count)
        return drawn

    def _pair(self, index: int) -> tuple[str, str]:
        """Return question and answer of an example."""
        if index not in self._pairs:
            self._pairs[index] = self._example(index, self._rows.shots[index])
        return self._pairs[index]

    def _too_few(self, count: int, part: str | None) -> SlimError:
        of = f" of {part}" if part else ""
        return SlimError(
            f"task {self._task.name}: {self._count} shots requested, but its split "
            f"{self._task.spec.data.shots!r} has {count} rows{of} for them",
            "ask for fewer with --num-fewshot",
        )

    def _example(self, index: int, row: Mapping[str, Any]) -> tuple[str, str]:
        place = f"few-shot row {index + 1} of split {self._task.spec.data.shots!r}"
        prompt = self._run(self._prompt, "prompt", row, place)
        if self._solved is not None:
            return prompt, self._run(self._solved, "example", row, place)
        choices = self._choices(row, place)
        answer, *_ = self._answers(row, choices, place)
        text = choices[answer] if isinstance(answer, int) else answer
        if self._continuation is None:
            return prompt, text
        return prompt + text, self._run(self._continuation, "continuation", row, place)

    def _choices(self, row: Mapping[str, Any], place: str) -> list[str]:
        if self._one is None:
            values = [self._run(text, "choices", row, place) for text in self._each]
        else:
            values = self._run(self._one, "choices", row, place)
            if not isinstance(values, list | tuple) or not values:
                raise self._error(place, f"choices is {values!r:.60}: expected a list of texts")
        try:
            return read_choices(values)
        except ValueError as error:
            raise self._error(place, str(error)) from error

    def _answers(
        self, row: Mapping[str, Any], choices: list[str], place: str
    ) -> tuple[int, ...] | tuple[str, ...]:
        """Return what is right: places of choices, or texts; at least one."""
        value = self._run(self._target, "target", row, place)
        try:
            if self._task.kind == "generation":
                return right_texts(value, as_json="json_match" in self._task.metrics)
            places = right_places(value, choices)
        except ValueError as error:
            raise self._error(place, str(error)) from error
        if len(places) > 1 and "macro_f1" in self._task.metrics:
            problem = f"the target is {value!r:.60}: macro_f1 needs one right choice a row"
            raise self._error(place, problem, "leave macro_f1 out of metrics")
        return places

    def _run(
        self, template: Callable[[Any], Any], key: str, row: Mapping[str, Any], place: str
    ) -> Any:
        try:
            value = template(row)
            return list(value) if isinstance(value, Iterator) else value  # of a filter: map, select
        except Exception as error:  # a template can raise anything
            problem = f"{key}: {error or type(error).__name__}"
            hint = f"the row has {', '.join(row) or 'no field'}"
            raise self._error(place, problem, hint) from error

    def _error(self, place: str, problem: str, hint: str = "") -> SlimError:
        return SlimError(f"task {self._task.name}: {place}: {problem}", hint)


def _joined(system: str, description: str, separator: str) -> str:
    """Return a system message and a description as one text, separated as in the harness."""
    if not (system and description):
        return system or description
    spaced = system[-1].isspace() or description[0].isspace()
    return system + ("" if spaced else separator) + description


def _without_templates(spec: TaskSpec) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of prompt, target and choices that are the same for every row."""
    for key in ("prompt", "target", "choices"):
        texts = getattr(spec, key) or []
        for text in [texts] if isinstance(texts, str) else texts:
            if not names_in(text):
                yield key, text.strip()


def _compiled(target: str | list[str]) -> Callable[[Any], Any]:
    """Return a task's target as a function of a row; a list of templates gives a list."""
    if isinstance(target, str):
        return compile_value(target)
    each = [compile_value(text) for text in target]
    return lambda row: [one(row) for one in each]
