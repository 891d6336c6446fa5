"""Perplexity tasks: texts from a task's rows, whole documents or blocks of tokens.

Invariant: every token of a document is predicted once, in the windows of ``perplexity.windows``, as
the harness's ``loglikelihood_rolling`` has them; its record holds the words and bytes of the raw
text. Blocks are those of the pruning and quantization papers: all rows are one text, encoded once
and cut into whole blocks; what is left over is dropped, and a block's first token is not predicted.
Try it: ``mlx-slim eval MODEL --task wikitext --limit 2 -o OUT``.

    block of 4      tokens 0 1 2 3 | 4 5 6 7 | 8 9
    inputs   0 1 2      targets 1 2 3
    inputs   4 5 6      targets 5 6 7
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_slim.artifacts import hash_json
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.figures import TaskSummary
from mlx_slim.evaluation.jobs import Computed, Engine, check_finite, definition_record
from mlx_slim.evaluation.scoring.perplexity import WINDOWS, windows
from mlx_slim.evaluation.scoring.requests import Request, RequestEncoder
from mlx_slim.evaluation.tasks.metrics import Record, perplexity, record_document, summarize
from mlx_slim.evaluation.tasks.question import Question
from mlx_slim.evaluation.tasks.spec import Task
from mlx_slim.reading import JsonObject


@dataclass(frozen=True)
class _Piece:
    """A document or a block: what is predicted, and what its record holds besides."""

    question: Question
    requests: list[Request]
    counts: dict[str, int | str]


class DocumentsJob:
    """A perplexity task as one model reads it.

    Args:
        task: Of kind ``perplexity``.
        checksum: Of its rows.
        limit: First rows only, or None.
        questions: The texts, in row order.
        encoder: The model's; its ``max_length`` is the window.

    Raises:
        SlimError: If the model cannot read a text, would compute a window wrong, or has no room for
            a block.
    """

    def __init__(
        self,
        task: Task,
        checksum: str,
        limit: int | None,
        questions: list[Question],
        encoder: RequestEncoder,
    ) -> None:
        self.task, self._checksum, self._limit = task, checksum, limit
        self._window = encoder.max_length
        block = task.spec.block
        self._pieces = (
            _documents(task, questions, encoder)
            if block is None
            else _blocks(task, questions, encoder, block)
        )
        for piece in self._pieces:
            where = f"{task.name}, text {piece.question.doc_id}"
            encoder.check(max(len(request.inputs) for request in piece.requests), where)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def chunks(self) -> list[range]:
        """Consecutive texts of about ``WINDOWS`` windows."""
        chunks: list[range] = []
        begin = windows_so_far = 0
        for number, piece in enumerate(self._pieces):
            if begin < number and windows_so_far + len(piece.requests) > WINDOWS:
                chunks.append(range(begin, number))
                begin, windows_so_far = number, 0
            windows_so_far += len(piece.requests)
        return [*chunks, range(begin, len(self._pieces))]

    @property
    def positions(self) -> int:
        """Positions of the longest window."""
        return max(len(r.ids) for piece in self._pieces for r in piece.requests)

    def weight(self, chunk: range) -> int:
        """Return the work of a chunk in characters, about four a token."""
        return sum(4 * len(r.ids) for i in chunk for r in self._pieces[i].requests)

    def compute(self, chunk: range, engine: Engine) -> Computed:
        """Score the texts of a chunk.

        Raises:
            SlimError: If a score is not finite.
        """
        scorer, pieces = engine.scorer, [self._pieces[i] for i in chunk]
        before = scorer.tokens_computed, scorer.tokens_minimum
        scores = iter(scorer.score([request for piece in pieces for request in piece.requests]))
        records = []
        for piece in pieces:
            values = [next(scores).loglikelihood for _ in piece.requests]
            check_finite(values, f"{self.name}, text {piece.question.doc_id}")
            tokens = sum(len(request.ids) - request.start for request in piece.requests)
            records.append(
                record_document(piece.question, math.fsum(values), tokens, **piece.counts)
            )
        computed, minimum = scorer.tokens_computed, scorer.tokens_minimum
        return Computed(records, computed - before[0], minimum - before[1], 0)

    def cut_note(self) -> str:
        """Return into what the texts are cut: figures of other lengths do not compare."""
        count, block = sum(len(piece.requests) for piece in self._pieces), self.task.spec.block
        if block is not None:
            return f"{self.name}: {count:,} blocks of {block:,} tokens"
        texts = len(self._pieces)
        return (
            f"{self.name}: {texts:,} texts in {count:,} windows of at most {self._window:,} tokens"
        )

    def describe(self) -> JsonObject:
        """Return what a resume must match."""
        definition = definition_record(self.task, 0, self._limit, self._checksum, None)
        count = sum(len(piece.requests) for piece in self._pieces)
        return {**definition, "window": self._window, "windows": count}

    def summarize(self, records: Sequence[Record]) -> TaskSummary:
        """Return the task's metrics over all records."""
        return summarize(self.task, records)

    def running(self, records: Sequence[Record]) -> tuple[str, float]:
        """Return the last metric, bits per unit, over the texts so far."""
        name = self.task.metrics[-1]
        return name, perplexity(name, records)


def _documents(task: Task, questions: list[Question], encoder: RequestEncoder) -> list[_Piece]:
    pieces = []
    for question in questions:
        try:
            ids = encoder.document(question.context)
        except SlimError as error:
            where = f"{task.name}, row {question.doc_id}"
            raise SlimError(f"{where}: {error.message}", error.hint) from error
        words, size = question.lengths
        cut = windows(ids, encoder.prefix(), encoder.max_length)
        pieces.append(_Piece(question, cut, {"words": words, "bytes": size}))
    return pieces


def _blocks(
    task: Task, questions: list[Question], encoder: RequestEncoder, block: int
) -> list[_Piece]:
    if block - 1 > encoder.max_length:
        raise SlimError(
            f"{task.name} has blocks of {block:,} tokens, the model reads {encoder.max_length:,} "
            "at most",
            "set block in a copy of the task; figures of other blocks are others",
        )
    text = task.spec.separator.join(question.context for question in questions)
    try:
        ids = encoder.document(text)
    except SlimError as error:
        raise SlimError(f"{task.name}: {error.message}", error.hint) from error
    if len(ids) < block:
        raise SlimError(
            f"{task.name}: its rows are {len(ids):,} tokens, fewer than a block of {block:,}",
            "give more rows, or set block in a copy of the task",
        )
    pieces = []
    for number, begin in enumerate(range(0, len(ids) - block + 1, block)):
        part = tuple(ids[begin : begin + block])
        question = Question(number, None, "", (), (), "")
        pieces.append(_Piece(question, [Request(part, 1)], {"ids_sha256": hash_json(list(part))}))
    return pieces
