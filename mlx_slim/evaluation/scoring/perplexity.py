"""Perplexity of a text: bits per byte and bits per token.

Invariant: every token of every document is predicted exactly once, in windows of the model's
longest input, as the reference harness cuts them (``loglikelihood_rolling``): the first begins
after BOS (else EOS), the following ones after the token before them, and the last begins earlier so
that it is as long as the others. A tokenizer that adds BOS adds it there as well, so it is
predicted after the first one. Bits per byte do not depend on the tokenizer, so models can be
compared. Try it: ``mlx-slim eval MODEL --perplexity text.txt -o OUT``.

    longest input 4       tokens 0 1 2 3 4 5 6 7 8 9
    inputs   B 0 1 2      targets 0 1 2 3
    inputs   3 4 5 6      targets 4 5 6 7
    inputs   5 6 7 8      targets     8 9
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_slim.artifacts import hash_json
from mlx_slim.config.schema import SourceConfig
from mlx_slim.data.lines import open_data
from mlx_slim.data.readers import is_data, suffix_of
from mlx_slim.data.sources import RawRow, find
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.figures import TextSummary
from mlx_slim.evaluation.jobs import Computed, Engine, check_finite
from mlx_slim.evaluation.records import TEXT
from mlx_slim.evaluation.scoring.requests import Request, RequestEncoder
from mlx_slim.reading import JsonObject

WINDOWS = 8  # of a chunk


@dataclass(frozen=True)
class TextDocuments:
    """Documents to predict.

    Attributes:
        name: The file's name.
        documents: Not empty, each; in order.
        size: UTF-8 bytes of all of them.
        sha256: Of the documents.
    """

    name: str
    documents: list[str]
    size: int
    sha256: str


def read_texts(path: Path) -> TextDocuments:
    """Read a text file (one document) or a file of rows (``text`` of each is a document).

    Raises:
        SlimError: If the file is missing, empty, not UTF-8, or a row has no ``text``.
    """
    if is_data(path) and not suffix_of(path).startswith(".txt"):
        documents = [_text(row) for row in find(SourceConfig(path=str(path)))]
    else:
        documents = [_whole(path)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SlimError(f"{path} holds no text", "give a file with some text to predict")
    size = sum(len(document.encode()) for document in documents)
    return TextDocuments(path.name, documents, size, hash_json(documents))


def _whole(path: Path) -> str:
    with open_data(path) as handle:
        content = handle.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SlimError(
            f"{path} is not UTF-8: byte {error.start} is {content[error.start]:#04x}",
            "convert it: iconv -f ENCODING -t UTF-8",
        ) from error


def _text(row: RawRow) -> str:
    text = row.value.get("text")
    if not isinstance(text, str):
        raise SlimError(
            f"{row.place} has {', '.join(row.value) or 'no column'}, expected a string 'text'",
            "rename the column that holds the text",
        )
    return text


def windows(ids: Sequence[int], prefix: int, longest: int) -> list[Request]:
    """Return the requests that predict each of ``ids`` once.

    Args:
        ids: A document's tokens.
        prefix: Stands before the first: BOS, else EOS.
        longest: Most ids that the model may read at once.
    """
    everything = (prefix, *ids)
    requests = []
    done = 0
    while done < len(ids):
        new = min(len(ids) - done, longest)
        end = done + new
        part = everything[max(0, end - longest) : end + 1]
        requests.append(Request(part, len(part) - new))
        done = end
    return requests


class TextJob:
    """Documents cut into windows for one model.

    Args:
        texts: What to predict.
        encoder: The model's; its ``max_length`` is the window.

    Raises:
        SlimError: If the model cannot read a document, or would compute a window wrong.
    """

    name = TEXT

    def __init__(self, texts: TextDocuments, encoder: RequestEncoder) -> None:
        self.texts = texts
        self._window = encoder.max_length
        self._requests: list[tuple[int, Request]] = []
        for doc_id, text in enumerate(texts.documents):
            try:
                ids = encoder.document(text)
            except SlimError as error:
                where = f"{texts.name}, document {doc_id}"
                raise SlimError(f"{where}: {error.message}", error.hint) from error
            cut = windows(ids, encoder.prefix(), encoder.max_length)
            self._requests += [(doc_id, request) for request in cut]
        for number, (doc_id, request) in enumerate(self._requests):
            where = f"{texts.name}, document {doc_id}, window {number}"
            encoder.check(len(request.inputs), where)

    @property
    def chunks(self) -> list[range]:
        """Windows in order."""
        count = len(self._requests)
        return [range(i, min(i + WINDOWS, count)) for i in range(0, count, WINDOWS)]

    @property
    def positions(self) -> int:
        """Positions of the longest window."""
        return max(len(request.ids) for _, request in self._requests)

    def weight(self, chunk: range) -> int:
        """Return the work of a chunk in characters, about four a token."""
        return sum(4 * len(self._requests[i][1].ids) for i in chunk)

    def compute(self, chunk: range, engine: Engine) -> Computed:
        """Score the windows of a chunk.

        Raises:
            SlimError: If a score is not finite.
        """
        scorer = engine.scorer
        before = scorer.tokens_computed, scorer.tokens_minimum
        window_requests = [self._requests[i] for i in chunk]
        scores = scorer.score([request for _, request in window_requests])
        records = []
        for number, (doc_id, request), score in zip(chunk, window_requests, scores, strict=True):
            check_finite([score.loglikelihood], f"{self.texts.name}, window {number}")
            tokens = len(request.ids) - request.start
            record = {"doc_id": doc_id, "window": number, "tokens": tokens}
            records.append({**record, "loglikelihood": score.loglikelihood})
        computed, minimum = scorer.tokens_computed, scorer.tokens_minimum
        return Computed(records, computed - before[0], minimum - before[1], 0)

    def describe(self) -> JsonObject:
        """Return what a resume must match."""
        return {
            "file": self.texts.name,
            "text_sha256": self.texts.sha256,
            "window": self._window,
            "windows": len(self._requests),
        }

    def summarize(self, records: Sequence[JsonObject]) -> TextSummary:
        """Return bits per byte and per token over all records, and the counts behind them."""
        return summarize_text(self.texts, records)

    def running(self, records: Sequence[JsonObject]) -> tuple[str, float]:
        """Return bits per token over the windows so far."""
        tokens = sum(record["tokens"] for record in records)
        nats = -math.fsum(record["loglikelihood"] for record in records)
        return "bits_per_token", nats / math.log(2) / tokens


def summarize_text(texts: TextDocuments, records: Sequence[JsonObject]) -> TextSummary:
    """Return bits per byte and per token over all records, and the counts behind them.

    Args:
        texts: What was predicted.
        records: One a window: ``tokens`` and ``loglikelihood`` (nats).
    """
    nats = -math.fsum(record["loglikelihood"] for record in records)
    tokens = sum(record["tokens"] for record in records)
    return TextSummary(
        n=len(records),
        documents=len(texts.documents),
        bytes=texts.size,
        tokens=tokens,
        bits_per_byte=nats / math.log(2) / texts.size,
        bits_per_token=nats / math.log(2) / tokens,
        perplexity=math.exp(min(nats / tokens, 700.0)),
    )
