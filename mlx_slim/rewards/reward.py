"""Rewards of answers: the metric of an evaluation task, or a function in a file of the user.

Invariant: a reward is a finite number and depends on one question and its answers alone; what goes
wrong is one line that names the row. A function's file is read once: what runs is what was hashed.
It is named on the command line, never in a recipe, so that whoever starts the run decides to run
it. Try it: ``mlx-slim train smollm2-grpo --reward reward.py:length -o runs/grpo``.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol, final

from mlx_slim.config.reward import RewardConfig, RewardSource
from mlx_slim.data.lines import one_line
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.evaluation.tasks.metrics import first_metric, record_generation
from mlx_slim.evaluation.tasks.question import Question
from mlx_slim.evaluation.tasks.spec import Task, find_task
from mlx_slim.hashing import hash_bytes
from mlx_slim.reading import read_bytes
from mlx_slim.rewards.scored_rows import ScoredRow


class DrawnAnswer(Protocol):
    """An answer: ``Generation``, or ``SampledAnswer`` of a round."""

    @property
    def text(self) -> str:
        """Without special tokens, cut before a stop string."""
        ...

    @property
    def ids(self) -> list[int]:
        """Its token ids."""
        ...

    @property
    def stop_reason(self) -> str:
        """``eos``, ``until`` or ``length``."""
        ...


class Reward(Protocol):
    """What scores answers.

    Attributes:
        name: In messages and records.
        until: Texts that end an answer.
        tasks: Whose test questions may not be rows.
        source: The function that it is; None for a task's metric.
        metric: What the mean over rows is called; ``reward`` may be any number.
    """

    name: str
    until: tuple[str, ...]
    tasks: tuple[Task, ...]
    source: RewardSource | None
    metric: str

    def __call__(self, row: ScoredRow, answers: Sequence[DrawnAnswer]) -> list[float]:
        """Return the reward of each answer to the question of ``row``.

        Raises:
            SlimError: If there is none; the row is named.
        """
        ...


@final
class TaskReward:
    """A metric of an evaluation task, against the right answer of the row.

    Raises:
        SlimError: If the task has no such metric of a written answer.
    """

    source: RewardSource | None = None

    def __init__(self, name: str, metric: str | None = None) -> None:
        task = find_task(name)
        if task.kind != "generation":
            raise SlimError(
                f"reward.task={name} is of kind {task.kind}, whose metrics need no written answer",
                "name a task of kind generation, such as gsm8k, or your own YAML file of one",
            )
        if metric is not None and metric not in task.metrics:
            raise SlimError(
                f"reward.metric={metric} is no metric of {task.name}",
                did_you_mean(metric, task.metrics),
            )
        self.task, self.metric = task, metric or first_metric(task.metrics)
        self.name = task.name
        self.until = tuple(task.spec.until)
        self.tasks: tuple[Task, ...] = (task,)

    def __call__(self, row: ScoredRow, answers: Sequence[DrawnAnswer]) -> list[float]:
        """Return 1 for each right answer, 0 for the others."""
        question = Question(0, None, row.prompt, (), (), row.answer)
        return [
            float(
                record_generation(self.task, question, answer.text, answer.stop_reason)[self.metric]
            )
            for answer in answers
        ]


@final
class FunctionReward:
    """A function of the user: ``FILE.py:FUNCTION``.

    It is called once a question, as TRL calls its reward functions: ``prompts`` and
    ``completions`` (texts; for rows with ``messages`` lists of messages), ``completion_ids``, and
    a list for each field of the row, besides ``answer``, the right answer of the row; one entry an
    answer. It returns one number an answer, and may be async.

    Raises:
        SlimError: If the file does not run, or has no such function.
    """

    until: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    metric = "reward"

    def __init__(self, spec: str) -> None:
        file, colon, function = spec.rpartition(":")
        if not colon or not file.endswith(".py") or not function.isidentifier():
            raise SlimError(
                f"--reward {spec} names no function", "expected FILE.py:FUNCTION, as in score.py:f"
            )
        self.spec, self.name = spec, f"{Path(file).name}:{function}"
        try:
            source = read_bytes(Path(file).expanduser())
        except SlimError as error:
            raise SlimError(
                f"--reward {spec}: {error.message}", "expected FILE.py:FUNCTION, as in score.py:f"
            ) from error
        self.source: RewardSource | None = RewardSource(spec, hash_bytes(source))
        self._function = _load(Path(file), source, function)

    def __call__(self, row: ScoredRow, answers: Sequence[DrawnAnswer]) -> list[float]:
        """Return what the function returns for the answers to one question."""
        texts = [answer.text for answer in answers]
        prompts: list[Any] = [row.prompt] * len(answers)
        completions: list[Any] = texts
        if row.chat:
            prompts = _copies(row.messages, len(answers))
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        fields = {"answer": row.answer, **row.fields}
        columns = {
            name: _copies(value, len(answers))
            for name, value in fields.items()
            if name not in _RESERVED
        }
        with _users_code(f"{row.place}: {self.name}", _SIGNATURE):
            values = _in_order(
                self._function(
                    prompts=prompts,
                    completions=completions,
                    completion_ids=[list(answer.ids) for answer in answers],
                    **columns,
                )
            )
        if len(values) != len(answers):
            raise self._wrong(
                row, f"{len(values):,} rewards for {len(answers):,} answers", "expected one each"
            )
        return [self._number(row, value) for value in values]

    def _number(self, row: ScoredRow, value: Any) -> float:
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            number = float(value)
        except Exception:
            number = math.nan
        if not usable(number):
            seen = " ".join(repr(value).split())[:60]
            raise self._wrong(
                row, f"the reward is {seen}", f"expected a finite number, at most ±{LARGEST:g}"
            )
        return number

    def _wrong(self, row: ScoredRow, what: str, hint: str) -> SlimError:
        return SlimError(f"{row.place}: {self.name}: {what}", hint)


LARGEST = 1e15  # the square of an advantage, summed over a gradient, is still a float32


def usable(reward: float) -> bool:
    """Return whether a number can be learned from: it is finite, and so is its square."""
    return abs(reward) <= LARGEST


# Arguments of every function: a field of that name is not passed.
_RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids", "messages")
_SIGNATURE = "it is called as f(prompts, completions, completion_ids, answer, **fields)"


@contextmanager
def _users_code(what: str, hint: str) -> Iterator[None]:
    """Run a user's code: what it raises is one line, what it prints goes to standard error.

    Standard output is a command's own: with ``--json`` each of its lines is an event. ``sys.exit``
    would otherwise end the run with the code that it names, 0 too; an interrupt passes.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anything can be raised, also what is no Exception
        raise SlimError(f"{what}: {type(error).__name__}: {one_line(error)}", hint) from error


def _copies(value: Any, count: int) -> list[Any]:
    """Return ``value`` for each answer: what a function changes in one is gone with the call."""
    return [copy.deepcopy(value) for _ in range(count)]


def _in_order(returned: Any) -> list[Any]:
    """Return the values that a function returned, or that it returns once it is awaited."""
    if inspect.iscoroutine(returned):
        with ThreadPoolExecutor(1) as thread:  # a notebook has a running loop in this one
            returned = thread.submit(asyncio.run, returned).result()
    if isinstance(returned, (Mapping, Set)):  # its keys, or in no order
        raise TypeError(f"a {type(returned).__name__} was returned, not a list")
    return list(returned)


def _load(file: Path, source: bytes, name: str) -> Callable[..., Any]:
    """Run a file and return its function."""
    module = types.ModuleType(f"_reward_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    with _users_code(f"--reward {file}", "the file must run by itself: python FILE.py"):
        exec(compile(source, str(file), "exec"), module.__dict__)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if isinstance(value, _FUNCTION)]
        raise SlimError(
            f"--reward {file}: no function is called {name!r}",
            did_you_mean(name, functions) if functions else "the file defines no function",
        )
    return function


_FUNCTION = types.FunctionType


def reward_of(config: RewardConfig, function: FunctionReward | None) -> Reward:
    """Return what scores the answers of a run.

    Args:
        config: The ``reward`` section.
        function: That of the command line, or None.

    Raises:
        SlimError: If there is none, or there are two.
    """
    if function is None and config.task is None:
        raise SlimError(
            "the recipe learns from rewards (reward:), and nothing gives one",
            "set reward.task=NAME, or give a function: --reward FILE.py:FUNCTION",
        )
    if config.task is None:
        assert function is not None
        return function
    if function is not None:
        raise SlimError(
            f"--reward {function.spec} and reward.task={config.task} are both given",
            "keep one: reward.task=null takes the function",
        )
    return TaskReward(config.task, config.metric)
