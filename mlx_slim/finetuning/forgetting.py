"""The general text of ``held_out``: read, cut into windows, measured by the scorer of ``eval``.

Invariant: bits per byte are those of ``mlx-slim eval --perplexity``
(``evaluation/scoring/perplexity.py``) in windows of ``train.max_length``, by the weights as the run
would save them: in evaluation mode, and rounded where it trains for quantization. Try it:
``mlx-slim train smollm2-lora held_out.path=task:openbookqa held_out.rows=100 -o runs/watched``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_slim import events
from mlx_slim.artifacts import hash_json
from mlx_slim.config.schema import HeldOutConfig, Recipe, SourceConfig
from mlx_slim.data.formats import Dropped, read_example
from mlx_slim.data.readers import suffix_of
from mlx_slim.data.sources import find
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.jobs import Engine
from mlx_slim.evaluation.scoring.loglikelihood import Scorer
from mlx_slim.evaluation.scoring.perplexity import TextJob, Texts, read_texts
from mlx_slim.evaluation.scoring.requests import Encoder, max_length
from mlx_slim.evaluation.tasks.prompts import Question, build_questions
from mlx_slim.evaluation.tasks.rows import load_rows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.finetuning.build import Tuned
from mlx_slim.models.limits import limit_of
from mlx_slim.training.callbacks import SAVE, Callback, computing
from mlx_slim.training.state import WATCHED, TrainState

_TASK = "task:"


def read_held_out(config: HeldOutConfig) -> Texts:
    """Return the documents of ``held_out``.

    Raises:
        SlimError: If there are none, or they cannot be read.
    """
    path = config.path
    if path.startswith(_TASK):
        task = find_task(path.removeprefix(_TASK))
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
        return question.context + question.choices[question.target]
    return f"{question.context} {question.target}"


def _texts(name: str, documents: list[str]) -> Texts:
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SlimError(f"held_out.path={name} holds no text", "give some text to watch")
    size = sum(len(document.encode()) for document in documents)
    return Texts(name, documents, size, hash_json(documents))


def watch(recipe: Recipe, tuned: Tuned, observer: events.Observer) -> list[HeldOut]:
    """Return the callback that watches the text of ``recipe.held_out``; none without one.

    Raises:
        SlimError: If the text cannot be read.
    """
    config = recipe.held_out
    if config is None:
        return []
    tokenizer = tuned.loaded.tokenizer
    longest = min(max_length(tuned.config, tokenizer), recipe.train.max_length)
    job = TextJob(read_held_out(config), Encoder(tokenizer, longest, limit=limit_of(tuned.config)))
    callbacks = list(tuned.callbacks)

    def measure() -> float:
        model = tuned.model
        training = model.training
        with computing(callbacks):
            engine = Engine(model, tokenizer, Scorer(model))
            records = [r for chunk in job.chunks for r in job.compute(chunk, engine).records]
        model.train(training)
        return float(job.summarize(records)["metrics"]["bits_per_byte"]["value"])

    return [HeldOut(config, measure, observer, job.texts.sha256)]


REASON = "held_out"


class HeldOut(Callback):
    """Watches one text.

    Args:
        config: Limit, interval and patience.
        measure: Returns bits per byte of the text, by the weights as they are now.
        observer: Hears every measurement.
        identity: Hash of the text, hexadecimal: a resumed run must watch the same.
    """

    def __init__(
        self,
        config: HeldOutConfig,
        measure: Callable[[], float],
        observer: events.Observer,
        identity: str,
    ) -> None:
        self.config, self._measure, self._observer = config, measure, observer
        self._identity = list(bytes.fromhex(identity))

    def begin(self, position: TrainState) -> str:
        """Measure the start, once a run; refuse to go on where the run was stopped already."""
        if position.held_out_start is None:
            began = time.perf_counter()
            position.held_out_start = self._measure()
            self._tell(position, position.held_out_start, 0.0, True, began)
        return REASON if position.held_out_over >= self.config.patience else ""

    def after(self, position: TrainState, last: bool) -> str:
        """Measure when it is time.

        Raises:
            SlimError: If it is time to stop and no measured weights were within the limit.
        """
        if not (last or position.step % self.config.every == 0):
            return ""
        if position.step % self.config.every:
            position.keep_open(WATCHED)
        began = time.perf_counter()
        bits, start = self._measure(), position.held_out_start
        assert start is not None
        rise = bits / start - 1
        within = rise <= self.config.max_rise  # NaN is not
        self._tell(position, bits, rise, within, began)
        if within:
            position.held_out_step, position.held_out_over = position.step, 0
            return SAVE
        position.held_out_over += 1
        if last:
            position.held_out_over = max(position.held_out_over, self.config.patience)
        if position.held_out_over < self.config.patience:
            return ""
        if position.held_out_step is None:
            raise SlimError(
                f"the held-out text costs {rise:.1%} more bits after step {position.step} "
                f"(limit {self.config.max_rise:.1%}), and no step before was within the limit",
                f"lower train.learning_rate, or measure before: held_out.every below "
                f"{self.config.every}",
            )
        return REASON

    def _tell(
        self, position: TrainState, bits: float, rise: float, within: bool, began: float
    ) -> None:
        seconds = time.perf_counter() - began
        self._observer.notify(events.HeldOutDone(position.step, bits, rise, within, seconds))

    def state(self) -> dict[str, mx.array]:
        """Return the text's hash."""
        return {"text": mx.array(self._identity, mx.uint8)}

    def load_state(self, flat: dict[str, mx.array]) -> None:
        """Compare the hash.

        Raises:
            SlimError: If the text is another one now.
        """
        if flat["text"].tolist() != self._identity:
            raise SlimError(
                f"held_out.path={self.config.path} is another text than when the run started",
                "resume with the text that it started with, or start a new run",
            )
