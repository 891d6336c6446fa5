"""Tasks by name: shipped ones, their subtasks, suites, and a user's own file.

Invariant: a name means one task with one definition; a subtask (``mmlu_anatomy``) is defined by the
file of the whole task. ``-`` and ``_`` are the same in a name. Try it: ``mlx-slim tasks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from mlx_slim.config import library
from mlx_slim.config.read import read_mapping
from mlx_slim.config.task import TaskSpec, read_task
from mlx_slim.config.values import MOST_SHOTS
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.reading import exists

__all__ = ["Selection", "Task", "TaskSpec", "expand", "find_task", "list_tasks", "suites"]

_SUITES, _SAMPLING = "_suites", "sampling"
FIRST, HARNESS = "first", "harness"  # where few-shot examples come from


@dataclass(frozen=True)
class Task:
    """A task that can be scored.

    Attributes:
        spec: Its definition.
        file: Its YAML file; data files are looked up beside it first.
        part: The one subtask that is scored (``anatomy`` of MMLU), None for all.
    """

    spec: TaskSpec
    file: Path
    part: str | None = None

    @property
    def name(self) -> str:
        """``mmlu``, ``mmlu_anatomy``; spaces of a subtask are written as ``_``."""
        if self.part is None:
            return self.spec.name
        return f"{self.spec.name}_{_word(self.part)}"

    @property
    def version(self) -> int:
        """Of the definition."""
        return self.spec.version

    @property
    def kind(self) -> str:
        """``multiple_choice``, ``generation`` or ``perplexity``."""
        return self.spec.kind

    @property
    def num_fewshot(self) -> int:
        """Default number of examples before the question."""
        return self.spec.num_fewshot

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that are recorded."""
        return self.spec.scores

    @property
    def subtasks(self) -> tuple[str, ...]:
        """The subtasks that this task's figures are pooled from; none for a plain task."""
        grouped = self.spec.subgroups is not None and self.part is None
        return tuple(self.spec.subgroups.subtasks) if grouped and self.spec.subgroups else ()


def _word(part: str) -> str:
    return part.replace(" ", "_")


@dataclass(frozen=True)
class Selection:
    """A task and the number of examples to score it with.

    Attributes:
        task: The task.
        num_fewshot: Examples before a question.
        sampling: Where they come from, ``first`` or ``harness`` (``prompts.build_questions``).
    """

    task: Task
    num_fewshot: int
    sampling: str = FIRST


def list_tasks() -> list[Task]:
    """Return the shipped tasks by name, without their subtasks."""
    return [_shipped(name) for name in library.names("evals")]


@lru_cache(maxsize=64)
def _shipped(name: str) -> Task:
    file = library.find("evals", name)
    return Task(read_task(file, shipped=True), file)


def suites() -> dict[str, dict[str, int]]:
    """Return suite -> task -> its number of shots."""
    return {name: suite.shots for name, suite in _suites().items()}


@dataclass(frozen=True)
class _Suite:
    """Tasks with the number of shots of each, and how examples are chosen."""

    shots: dict[str, int]
    sampling: str


def _suites() -> dict[str, _Suite]:
    file = read_mapping(library.find("evals", _SUITES))[0]
    return {
        name: _Suite(
            {task: shots for task, shots in members.items() if task != _SAMPLING},
            members.get(_SAMPLING, FIRST),
        )
        for name, members in file.items()
    }


def find_task(name: str | Path) -> Task:
    """Return the task of that name, or of that ``.yaml`` file.

    Raises:
        SlimError: If there is none (the hint names the closest), or its file is wrong.
    """
    text = str(name)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        file = Path(text).expanduser()
        if not exists(file):
            raise SlimError(
                f"{file} does not exist",
                "a task is a YAML file beside its rows; mlx-slim tasks arc_easy shows one",
            )
        return Task(read_task(file), file)
    task_name = text.replace("-", "_")
    shipped = library.names("evals")
    if task_name in shipped:
        return _shipped(task_name)
    every = [*shipped, *suites()]
    for whole in shipped:
        if task_name.startswith(f"{whole}_") and (subtasks := _shipped(whole).subtasks):
            by_word = {_word(part): part for part in subtasks}
            if (part := by_word.get(task_name.removeprefix(f"{whole}_"))) is not None:
                return replace(_shipped(whole), part=part)
            every += [f"{whole}_{word}" for word in by_word]
    if text in suites():
        names = ", ".join(suites()[text])
        raise SlimError(f"{text} is a suite, not a task", f"its tasks are {names}")
    raise SlimError(
        f"no task is called {text!r}",
        f"{did_you_mean(text, every)} (mlx-slim tasks lists them; a file of your own ends in "
        ".yaml)",
    )


def expand(names: Sequence[str], num_fewshot: int | None = None) -> list[Selection]:
    """Return the tasks that ``names`` mean, in order, each once.

    Args:
        names: Tasks, suites and files; or several, separated by commas.
        num_fewshot: Examples for every task; None takes each task's own. Suites have their own.

    Raises:
        SlimError: Unknown name, no name, one task with two numbers of shots, two tasks of one
            name, or ``num_fewshot`` with a suite or out of range.
    """
    if num_fewshot is not None and not 0 <= num_fewshot <= MOST_SHOTS:
        raise SlimError(
            f"num_fewshot is {num_fewshot}: expected a whole number from 0 to {MOST_SHOTS}"
        )
    every_suite = _suites()
    chosen: dict[str, Selection] = {}
    for name in (part.strip() for text in names for part in str(text).split(",")):
        if not name:
            continue
        if (suite := every_suite.get(name)) is not None:
            if num_fewshot is not None:
                raise SlimError(
                    f"the suite {name} has its own shots, but num_fewshot={num_fewshot} is given",
                    f"leave it out, or name the tasks: {','.join(suite.shots)}",
                )
            selections = [
                Selection(find_task(task), shots, suite.sampling)
                for task, shots in suite.shots.items()
            ]
        else:
            task = find_task(name)
            selections = [Selection(task, task.num_fewshot if num_fewshot is None else num_fewshot)]
        for selection in selections:
            other = chosen.setdefault(selection.task.name, selection)
            if other != selection:
                raise SlimError(
                    f"the task {other.task.name} is named twice, with different shots or files",
                    "score it in two runs, each with its own -o",
                )
    if not chosen:
        raise SlimError("no task is named", "give --task NAME (mlx-slim tasks lists them)")
    return list(chosen.values())
