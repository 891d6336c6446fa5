"""Scoring jobs: a chunk of questions becomes records.

Invariant: a chunk's records and counts are a function of the chunk, the model and the settings
alone, never of the chunks computed before or in parallel: an evaluation that was resumed, or split
over several processes, gives the same bytes. Try it:
``mlx-slim eval MODEL --task openbookqa --limit 100 -o OUT``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import mlx.nn as nn

from mlx_slim.artifacts import hash_json
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.figures import Summary, TaskSummary
from mlx_slim.evaluation.scoring.generate import MOST_ANSWERS, GenerationCounts, generate_batch
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.requests import (
    Request,
    RequestEncoder,
    common_prefix,
    shared_length,
)
from mlx_slim.evaluation.tasks.metrics import (
    Record,
    figure,
    first_metric,
    record_choice,
    record_generation,
    summarize,
)
from mlx_slim.evaluation.tasks.prompts import Question
from mlx_slim.evaluation.tasks.spec import FIRST, Task
from mlx_slim.models.kv_cache import KVFormat
from mlx_slim.reading import JsonObject

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Questions of a chunk: a kill loses at most one. Answers end one by one, and others take their
# place; with no more than a batch has rows, few long answers would have it to themselves for long.
CHOICE_CHUNK = 128
GENERATION_CHUNK = 256


@dataclass
class Engine:
    """A loaded model with what is needed to score it.

    Attributes:
        model: In evaluation mode, with its adapters.
        tokenizer: mlx-lm's wrapper.
        scorer: Log-likelihoods.
        cache_bytes: Limit of the caches of generated answers; None takes the device's budget.
        batch_tokens: Most positions of a batch of answers; None: only ``cache_bytes`` limits them.
        kv_format: What keys and values of answers are rounded to; None leaves them.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    scorer: LoglikelihoodScorer
    cache_bytes: int | None = None
    batch_tokens: int | None = None
    kv_format: KVFormat | None = None


@dataclass(frozen=True)
class Computed:
    """The result of one chunk.

    Attributes:
        records: One a question, in row order.
        tokens_computed: Tokens that went through the model, those of ``root`` not counted.
        tokens_minimum: The fewest possible, every distinct prefix once, likewise.
        truncated: Requests cut on the left.
        root: Tokens of the prefix common to all chunks of the subject, computed once.
        group: The subject, or the empty string: ``root`` counts once for each.
    """

    records: list[Record]
    tokens_computed: int
    tokens_minimum: int
    truncated: int
    root: int = 0
    group: str = ""


class ScoringJob(Protocol):
    """A task (or text) with its questions, ready to be scored."""

    @property
    def name(self) -> str:
        """Its name in ``results.json``."""
        ...

    @property
    def chunks(self) -> list[range]:
        """Question numbers, cut into chunks."""
        ...

    @property
    def positions(self) -> int:
        """Approximate positions of the longest request."""
        ...

    def weight(self, chunk: range) -> int:
        """Return the approximate work of a chunk in characters, for the remaining time."""
        ...

    def compute(self, chunk: range, engine: Engine) -> Computed:
        """Answer the questions of a chunk."""
        ...

    def describe(self) -> JsonObject:
        """Return what a resume must match."""
        ...

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Return the figures over all records."""
        ...

    def running(self, records: Sequence[Record]) -> tuple[str, float]:
        """Return the first metric and its value over the records so far."""
        ...


@dataclass(frozen=True)
class TaskJob:
    """A task of ``evaluate.spec`` as one model reads it; made before its weights are loaded.

    Attributes:
        task: Prompts, answers and metrics.
        checksum: Of its rows.
        num_fewshot: Solved examples before each question.
        limit: First rows only (of each subject), or None.
        questions: Prompts, in row order.
        encoder: Texts to ids.
        chat: The prompts went through the model's chat template.
        shots_checksum: Of the rows that the examples are; None without examples.
        sampling: How the examples were chosen: ``first`` or ``harness``.
    """

    task: Task
    checksum: str
    num_fewshot: int
    limit: int | None
    questions: list[Question]
    encoder: RequestEncoder
    chat: bool = False
    shots_checksum: str | None = None
    sampling: str = FIRST

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def chunks(self) -> list[range]:
        """Consecutive questions of one subject."""
        size = GENERATION_CHUNK if self.generates else CHOICE_CHUNK
        chunks: list[range] = []
        numbered = range(len(self.questions))
        for _, group in itertools.groupby(numbered, lambda i: self.questions[i].subject):
            members = list(group)
            chunks += [
                range(start, min(start + size, members[-1] + 1))
                for start in range(members[0], members[-1] + 1, size)
            ]
        return chunks

    @property
    def generates(self) -> bool:
        """Whether answers are texts, not choices."""
        return not self.questions[0].choices

    @property
    def positions(self) -> int:
        """Approximate positions of the longest question (in characters), its answer included."""
        cut = self.encoder.truncated
        longest = max(self.questions, key=lambda q: sum(map(len, q.longest)))
        if self.generates:
            positions = len(self._prompt(longest)) + self.task.spec.max_tokens
        else:
            positions = max(len(request.ids) for request in self._requests([longest]))
        self.encoder.truncated = cut
        return positions

    def weight(self, chunk: range) -> int:
        """Return the characters that a chunk computes; a common prefix counts once."""
        questions = [self.questions[i] for i in chunk]
        first, last = min(q.context for q in questions), max(q.context for q in questions)
        shared = shared_length(first, last)
        distinct = sum(len(q.context) - shared + sum(map(len, q.readable)) for q in questions)
        # A generated token costs about as much as ten prompt tokens: one forward pass each.
        answers = len(questions) * 40 * (self.task.spec.max_tokens if self.generates else 0)
        return shared + distinct + answers

    def check_questions(self) -> None:
        """Refuse a question that the model would compute wrong, before any is scored.

        Raises:
            SlimError: Names it.
        """
        if not self.encoder.checks:
            return
        cut, reserve = self.encoder.truncated, self.task.spec.max_tokens
        for question in self.questions:
            context, answer = question.longest
            if self.encoder.fits(context + (answer or "x" * reserve)):
                continue
            if question.choices:
                self._requests([question])
            else:
                self._prompt(question)
        self.encoder.truncated = cut

    def compute(self, chunk: range, engine: Engine) -> Computed:
        """Answer the questions of a chunk.

        Raises:
            SlimError: If a score is not finite.
        """
        questions = [self.questions[i] for i in chunk]
        answer = self._generate if self.generates else self._choose
        return answer(questions, engine)

    def _choose(self, questions: list[Question], engine: Engine) -> Computed:
        scorer, cut = engine.scorer, self.encoder.truncated
        requests = self._requests(questions)
        cut = self.encoder.truncated - cut
        before = scorer.tokens_computed, scorer.tokens_minimum, scorer.tokens_root
        root = scorer.shared_root(requests, self._root(questions[0].subject))
        scores = iter(scorer.score(requests, root))
        records = []
        for question in questions:
            choice_scores = list(itertools.islice(scores, len(question.choices)))
            values = [score.loglikelihood for score in choice_scores]
            check_finite(values, f"{self.name}, question {question.doc_id}")
            greedy = [score.greedy for score in choice_scores]
            records.append(record_choice(self.task, question, values, greedy))
        again = (
            scorer.tokens_root - before[2]
        )  # the root may be an earlier chunk's: not counted here
        return Computed(
            records,
            scorer.tokens_computed - before[0] - again,
            scorer.tokens_minimum - before[1] - again,
            cut,
            len(root),
            questions[0].subject or "",
        )

    def _requests(self, questions: list[Question]) -> list[Request]:
        requests = []
        for question in questions:
            with self._named(question):
                requests += [self.encoder.request(*pair) for pair in question.pairs]
        return requests

    def _prompt(self, question: Question) -> list[int]:
        with self._named(question):
            return self.encoder.prompt(question.context, self.task.spec.max_tokens)

    @contextlib.contextmanager
    def _named(self, question: Question) -> Iterator[None]:
        """Add the question to the message of an error."""
        try:
            yield
        except SlimError as error:
            where = f"{self.name}, question {question.doc_id}"
            raise SlimError(f"{where}: {error.message}", error.hint) from error

    def cut_note(self, truncated: int) -> str:
        """Return the warning that ``truncated`` of its prompts were cut."""
        longest, new = self.encoder.max_length, self.task.spec.max_tokens
        if self.generates:
            prompts, which = len(self.questions), "prompts"
            room = f"{longest - new:,} tokens, which leaves {new:,} for the answer"
        else:
            prompts = sum(len(question.choices) for question in self.questions)
            which, room = "prompts (one a choice)", f"{longest:,} tokens"
        return f"{self.name}: {truncated:,} of {prompts:,} {which} were cut on the left to {room}"

    def _root(self, subject: str | None) -> tuple[int, ...]:
        """Return the ids that all questions of a subject begin with: usually its examples."""
        siblings = [question for question in self.questions if question.subject == subject]
        cut = self.encoder.truncated
        root = common_prefix(
            self._requests([siblings[0], siblings[len(siblings) // 2], siblings[-1]])
        )
        self.encoder.truncated = cut
        return root if len(siblings) > 1 else ()

    def _generate(self, questions: list[Question], engine: Engine) -> Computed:
        task, cut = self.task, self.encoder.truncated
        longest = task.spec.max_tokens
        prompts = [self._prompt(question) for question in questions]
        batch = MOST_ANSWERS
        if engine.batch_tokens is not None:
            batch = max(1, min(batch, engine.batch_tokens // (max(map(len, prompts)) + longest)))
        tally = GenerationCounts()
        answers = generate_batch(
            engine.model,
            engine.tokenizer,
            prompts,
            longest,
            stops=task.spec.until,
            batch_size=batch,
            cache_bytes=engine.cache_bytes,
            tally=tally,
            kv_format=engine.kv_format,
        )
        records = [
            record_generation(task, question, answer.text, answer.stop_reason)
            for question, answer in zip(questions, answers, strict=True)
        ]
        return Computed(records, tally.computed, tally.minimum, self.encoder.truncated - cut)

    def describe(self) -> JsonObject:
        """Return what a resume must match."""
        definition = definition_record(
            self.task, self.num_fewshot, self.limit, self.checksum, self.shots_checksum
        )
        sampling = self.sampling if self.num_fewshot else None
        return {**definition, "chat_template": self.chat, "fewshot_sampling": sampling}

    def summarize(self, records: Sequence[Record]) -> TaskSummary:
        """Return the task's metrics over all records."""
        return summarize(self.task, records)

    def running(self, records: Sequence[Record]) -> tuple[str, float]:
        """Return the first metric of the records and its mean so far."""
        name = first_metric(self.task.metrics)
        return name, figure(name, records).value


def definition_record(
    task: Task, num_fewshot: int, limit: int | None, rows_sha256: str, shots_sha256: str | None
) -> JsonObject:
    """Return what identifies the questions of a task, independent of the model.

    Args:
        task: With its definition.
        num_fewshot: Solved examples before each question.
        limit: First rows only (of each subject), or None.
        rows_sha256: Checksum of the scored rows.
        shots_sha256: Of the rows that examples are taken from; None without examples.
    """
    return {
        "task_version": task.version,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "rows_sha256": rows_sha256,
        "shots_sha256": shots_sha256,
        "definition_sha256": hash_json(task.spec.model_dump(exclude_defaults=True)),
    }


def check_finite(values: Sequence[float], where: str) -> None:
    """Refuse log-likelihoods that are not finite.

    Raises:
        SlimError: Names ``where``.
    """
    if not all(map(math.isfinite, values)):
        raise SlimError(
            f"{where}: log-likelihoods are {list(values)}, expected finite numbers",
            "the model overflows in this dtype: try --dtype float32",
        )
