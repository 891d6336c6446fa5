"""Forgetting: a general text, cut into windows, measured between steps by the scorer of ``eval``.

Invariant: bits per byte are those of ``mlx-slim eval --perplexity``
(``evaluation/scoring/perplexity.py``) in windows of ``train.max_length``, by the weights as the run
would save them: in evaluation mode, and rounded where it trains for quantization. Try it:
``mlx-slim train smollm2-lora forgetting.path=task:openbookqa forgetting.rows=100 -o runs/try``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, final

from mlx_slim import events
from mlx_slim.artifacts import hash_json
from mlx_slim.config.schema import ForgettingConfig, Recipe, SourceConfig
from mlx_slim.config.values import TASK
from mlx_slim.data.formats import Dropped, read_example
from mlx_slim.data.readers import suffix_of
from mlx_slim.data.sources import find
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.jobs import Engine
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.perplexity import TextDocuments, TextJob, read_texts
from mlx_slim.evaluation.scoring.requests import RequestEncoder, max_length
from mlx_slim.evaluation.tasks.prompts import Question, build_questions
from mlx_slim.evaluation.tasks.rows import load_rows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.finetuning.build import Tuned
from mlx_slim.models.row_limits import row_limit
from mlx_slim.reading import JsonObject, field
from mlx_slim.training.callbacks import (
    Action,
    CallbackState,
    Monitor,
    Verdict,
    computing,
)
from mlx_slim.training.legacy import FORGETTING


def read_texts_of(config: ForgettingConfig) -> TextDocuments:
    """Return the documents of the section ``forgetting``.

    Raises:
        SlimError: If there are none, or they cannot be read.
    """
    path = config.path
    if path.startswith(TASK):
        task = find_task(path.removeprefix(TASK))
        questions = build_questions(task, load_rows(task), 0, config.rows)
        return _texts(path, [_document(question) for question in questions])
    if suffix_of(path) == ".txt":
        return read_texts(Path(path).expanduser())
    source = SourceConfig(path=path)
    documents = []
    for row in itertools.islice(find(source), config.rows):
        try:
            example = read_example(row, "auto", columns={}, system=None)
        except Dropped:
            continue
        documents.append("\n\n".join(example.texts))
    return _texts(path, documents)


def _document(question: Question) -> str:
    """Return a question with its right answer."""
    if isinstance(question.target, int):
        return "".join(question.pairs[question.target])
    return f"{question.context} {question.target}"


def _texts(name: str, documents: list[str]) -> TextDocuments:
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SlimError(f"forgetting.path={name} holds no text", "name a file or a task with text")
    size = sum(len(document.encode()) for document in documents)
    return TextDocuments(name, documents, size, hash_json(documents))


def measure_forgetting(recipe: Recipe, tuned: Tuned, observer: events.Observer) -> list[Forgetting]:
    """Return the callback that measures the text of ``recipe.forgetting``; none without one.

    Raises:
        SlimError: If the text cannot be read.
    """
    config = recipe.forgetting
    if config is None:
        return []
    tokenizer = tuned.loaded.tokenizer
    longest = min(max_length(tuned.config, tokenizer), recipe.train.max_length)
    encoder = RequestEncoder(tokenizer, longest, limit=row_limit(tuned.config))
    job = TextJob(read_texts_of(config), encoder)
    callbacks = list(tuned.callbacks)

    def measure() -> float:
        model = tuned.model
        training = model.training
        with computing(callbacks):
            engine = Engine(model, tokenizer, LoglikelihoodScorer(model))
            records = [r for chunk in job.chunks for r in job.compute(chunk, engine).records]
        model.train(training)
        return job.summarize(records).bits_per_byte

    return [Forgetting(config, measure, observer, job.texts.sha256)]


@dataclass(frozen=True)
class Limit:
    """The measurements so far against the limit.

    Attributes:
        step: Newest step within it.
        over: Measurements above it since then.
    """

    step: int | None = None
    over: int = 0


@final
class Forgetting(Monitor):
    """Measures one text between steps, and ends the run when it costs too many bits.

    Args:
        config: Limit, interval and patience.
        measure: Returns bits per byte of the text, by the weights as they are now.
        observer: Gets every measurement.
        identity: Hash of the text, hexadecimal: a resumed run must measure the same text.
    """

    name: ClassVar[str] = FORGETTING

    def __init__(
        self,
        config: ForgettingConfig,
        measure: Callable[[], float],
        observer: events.Observer,
        identity: str,
    ) -> None:
        self.config, self._measure, self._observer = config, measure, observer
        self._identity = identity
        self.start: float | None = None  # bits per byte before the first step
        self.latest = Limit()
        self._open: Limit | None = None  # before a measurement that only the last step made

    def begin(self, step: int) -> Verdict:
        """Measure the start, once a run; stop where the run was stopped already."""
        if self.start is None:
            began = time.perf_counter()
            self.start = self._measure()
            self._notify(step, self.start, 0.0, True, began)
        return self._stop() if self.stopped() else Verdict()

    def after(self, step: int, last: bool) -> Verdict:
        """Measure when it is time.

        Raises:
            SlimError: If it is time to stop and no measured weights were within the limit.
        """
        if not (last or step % self.config.every == 0):
            return Verdict()
        if step % self.config.every:
            self._open = self.latest
        began = time.perf_counter()
        bits = self._measure()
        assert self.start is not None
        rise = bits / self.start - 1
        within = rise <= self.config.max_rise  # NaN is not
        self._notify(step, bits, rise, within, began)
        if within:
            self.latest = Limit(step, 0)
            return Verdict(Action.SAVE)
        over = self.latest.over + 1
        if last:
            over = max(over, self.config.patience)
        self.latest = replace(self.latest, over=over)
        if not self.stopped():
            return Verdict()
        if self.latest.step is None:
            raise SlimError(
                f"the text of forgetting.path needs {rise:.1%} more bits per byte "
                f"after step {step} "
                f"(limit {self.config.max_rise:.1%}), and no earlier step was within the limit",
                f"lower train.learning_rate, or measure earlier: forgetting.every below "
                f"{self.config.every}",
            )
        return self._stop()

    def stopped(self) -> bool:
        """Return whether the text was above the limit as often as ``patience`` allows."""
        return self.latest.over >= self.config.patience

    def _stop(self) -> Verdict:
        return Verdict(Action.STOP, self.name, self.latest.step or 0)

    def _notify(self, step: int, bits: float, rise: float, within: bool, began: float) -> None:
        seconds = time.perf_counter() - began
        self._observer.notify(events.ForgettingMeasured(step, bits, rise, within, seconds))

    def required_steps(self) -> set[int]:
        """Return the newest step within the limit: of this run, and of a longer one."""
        steps = (self.latest.step, None if self._open is None else self._open.step)
        return {step for step in steps if step is not None}

    def reopen(self, undo: bool) -> set[str]:
        """Forget a measurement that only the last step of a shorter run made."""
        before, self._open = self._open, None
        if before is None or not undo:
            return set()
        self.latest = before
        return {events.ForgettingMeasured.name, events.FORGETTING_OF_0_1}

    def state(self) -> CallbackState:
        """Return the hash of the text and the measurements so far."""
        values = {"text": self._identity, "start": self.start, **asdict(self.latest)}
        if self._open is not None:
            values["open"] = asdict(self._open)
        return CallbackState(values=values)

    def load_state(self, state: CallbackState) -> None:
        """Restore what ``state`` returned.

        Raises:
            SlimError: If it is damaged, or the text is another one now.
        """
        values, where = state.values, f"checkpoint: callbacks.{self.name}"
        if field(values, where, "text", str) != self._identity:
            raise SlimError(
                f"forgetting.path={self.config.path} is another text than when the run started",
                "resume with the text that it started with, or start a new run",
            )
        self.start = field(values, where, "start", float, None)
        self.latest = _read_limit(values, where)
        opened = field(values, where, "open", dict, None)
        self._open = None if opened is None else _read_limit(opened, f"{where}: open")


def _read_limit(values: JsonObject, where: str) -> Limit:
    step = field(values, where, "step", int, None, low=0)
    return Limit(step, field(values, where, "over", int, 0, low=0))
