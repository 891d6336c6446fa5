"""Rows of a source on their way to tokens: read, rendered, tokenised, cut to length.

Invariant: every row given is returned or counted with a reason, and what is complained about is the
first row, in the source's order, that cannot be used. Chunks of rows know nothing of each other, so
that processes share them (``workers.py``). Try it: ``mlx-slim data preview smollm2-lora``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from mlx_slim.artifacts import public_name
from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.data.formats import Dropped, Example, check_columns, read_example
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.pieces import context_tokens, split
from mlx_slim.data.rendered import Rendered
from mlx_slim.data.sources import RawRow, Source
from mlx_slim.data.store import TokenRows
from mlx_slim.data.templates import Template, load_template
from mlx_slim.data.tokenize import RowEncoder, Tokens, check_ids, check_text, unwrap
from mlx_slim.data.workers import Workers
from mlx_slim.errors import RowLimit, SlimError
from mlx_slim.progress import stage

_CHUNK_ROWS = 256  # rows tokenised at once
_CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class PreparedRow:
    """One row on its way to disk: its place, its content, its rendered text, its tokens."""

    raw: RawRow
    example: Example
    rendered: Rendered
    tokens: Tokens
    length: int  # tokens before truncation
    piece: int = 0  # number of the piece, where the row is cut into several,
    pieces: int = 1  # of so many


class Pipeline:
    """Source → tokens, row by row; used by ``prepare`` and by the preview.

    Args:
        config: The ``data`` section.
        tokenizer: The model's.
        max_length: Longest row, tokens.
        limit: The longest row that the model computes right; a longer one is refused.

    Raises:
        SlimError: If the settings or the tokenizer cannot be used.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Any, *, max_length: int, limit: RowLimit | None = None
    ) -> None:
        check_columns(config.columns)
        self.config, self.max_length, self.limit = config, max_length, limit
        self.context = context_tokens(config.split_overlap, max_length)
        self.template: Template = load_template(config.template, unwrap(tokenizer))
        self.encoder = RowEncoder(tokenizer, mask_prompt=config.mask_prompt)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.config, self.max_length, self.limit, self.context, self.encoder

    def __setstate__(self, state: tuple[Any, ...]) -> None:  # in another process
        self.config, self.max_length, self.limit, self.context, self.encoder = state
        self.template = load_template(self.config.template, self.encoder.tokenizer)

    def rows(
        self, source: Source, config: SourceConfig, ledger: SourceLedger, limit: int | None = None
    ) -> Iterator[PreparedRow]:
        """Yield the usable rows of a source in order; count the others in ``ledger``."""
        for rows in _chunks(source, limit):
            yield from self.chunk(rows, config, ledger)
        ledger.blank_lines = source.blank_lines

    def chunk(
        self, rows: list[RawRow], config: SourceConfig, ledger: SourceLedger
    ) -> list[PreparedRow]:
        """Return the usable rows of some neighbouring ones; count the others in ``ledger``.

        Raises:
            SlimError: About the first row that cannot be used and may not be dropped.
        """
        texts: list[tuple[Example, Rendered] | str] = []  # or why the row is dropped
        failure: SlimError | None = None
        for raw in rows:
            ledger.rows_read += 1
            try:
                texts.append(self._text(raw, config, ledger))
            except Dropped as dropped:
                texts.append(dropped.reason)
            except SlimError as error:
                failure = error  # a row before it may be too long in tokens: that comes first
                break
        encoded = iter(self.encoder.encode([text[1] for text in texts if isinstance(text, tuple)]))
        prepared: list[PreparedRow] = []
        for raw, text in zip(rows, texts, strict=False):
            if isinstance(text, str):
                ledger.drop(text, raw)
                continue
            whole = next(encoded)
            length = len(whole.ids_T)
            try:
                if length > self.max_length and self.config.splits(text[0].kind):
                    prepared += self._pieces(raw, *text, whole, ledger)
                    continue
                tokens = self._fit(raw, whole)
            except Dropped as dropped:
                ledger.drop(dropped.reason, raw)
                continue
            if length > len(tokens.ids_T):
                ledger.truncate(raw, length - len(tokens.ids_T))
            prepared.append(PreparedRow(raw, *text, tokens, length))
        if failure is not None:
            raise failure
        return prepared

    def _text(
        self, raw: RawRow, config: SourceConfig, ledger: SourceLedger
    ) -> tuple[Example, Rendered]:
        if self.config.columns:
            ledger.columns |= raw.value.keys()
        example = read_example(
            raw,
            config.format or self.config.format,
            columns=self.config.columns,
            system=config.system or self.config.system,
            learn=self.config.learn,
        )
        rendered = self._render(raw, example)
        if not self.config.splits(example.kind):
            rendered = self._clip(raw, rendered, ledger)
        ledger.read(example)
        for note in (*example.notes, *rendered.notes):
            ledger.note(note, raw)
        return example, rendered

    def _render(self, raw: RawRow, example: Example) -> Rendered:
        try:
            rendered = self.template.render(example)
        except SlimError as error:
            raise SlimError(f"{raw.place}: {error.message}", error.hint) from error
        check_text(rendered.text, raw.place)
        return rendered

    def _clip(self, raw: RawRow, row: Rendered, ledger: SourceLedger) -> Rendered:
        """Apply the truncation policy to a text that is too long whatever its tokens are.

        Tokenising 10 MB to keep 512 tokens would take seconds and gigabytes.
        """
        most = self.max_length * self.encoder.most_characters
        if len(row.text) <= most:
            return row
        if self.config.truncation == "error":
            raise self._too_long(raw, f"{len(row.text):,} characters")
        if self.config.truncation == "drop":
            raise Dropped(self._reason)
        ledger.cut_characters += len(row.text) - most
        if self.config.truncation == "left":
            bos = self.encoder.tokenizer.bos_token or ""
            head = len(bos) if row.text.startswith(bos) else 0
            return row.cut(len(row.text) - most + head, len(row.text), head)
        return row.cut(0, most)

    @property
    def _reason(self) -> str:
        return f"longer than {self.max_length} tokens"

    def _too_long(self, raw: RawRow, size: str) -> SlimError:
        return SlimError(
            f"{raw.place}: {size}, longer than train.max_length={self.max_length} tokens",
            "raise train.max_length, or choose data.truncation=drop, left or right, or data.split",
        )

    def _fit(self, raw: RawRow, row: Tokens) -> Tokens:
        """Apply the truncation policy to a row; a BOS in front stays there."""
        if len(row.ids_T) > self.max_length:
            row = self._cut(raw, row)
        check_ids(self.encoder.tokenizer, row.ids_T, raw.place)
        if not row.supervised_T.any():
            raise Dropped("no supervised token left")
        if self.limit is not None:
            hint = f"set train.max_length={self.limit.tokens}, which drops or cuts longer rows"
            self.limit.check(len(row.ids_T), raw.place, hint)
        return row

    def _pieces(
        self, raw: RawRow, example: Example, rendered: Rendered, row: Tokens, ledger: SourceLedger
    ) -> list[PreparedRow]:
        """Return a long row as several, those with nothing to learn left out."""
        if not row.supervised_T.any():
            raise Dropped("no supervised token left")
        cut_rows = split(row, self.max_length, self.context, self.encoder.bos)
        learned = [part for part in cut_rows if part.supervised_T.any()]
        if len(learned) < len(cut_rows):
            ledger.note("pieces without a token to learn, left out", raw)
        ledger.cut(raw, sum(len(part.ids_T) for part in cut_rows) - len(row.ids_T))
        fitted = [self._fit(raw, part) for part in learned]
        return [
            PreparedRow(raw, example, rendered, part, len(part.ids_T), number, len(fitted))
            for number, part in enumerate(fitted)
        ]

    def _cut(self, raw: RawRow, row: Tokens) -> Tokens:
        length, limit = len(row.ids_T), self.max_length
        policy = self.config.truncation
        if policy == "error":
            raise self._too_long(raw, f"{length:,} tokens")
        if policy == "drop":
            raise Dropped(self._reason)
        indices = np.arange(limit)
        if policy == "left":
            head = int(row.ids_T[0] == self.encoder.bos)
            indices[head:] += length - limit
        supervised = row.supervised_T[indices]
        supervised[:1] = False
        weights = None if row.weights_T is None else row.weights_T[indices] * supervised
        return Tokens(row.ids_T[indices], supervised, weights)


def _chunks(source: Source, limit: int | None) -> Iterator[list[RawRow]]:
    """Yield neighbouring rows, about a megabyte; then raise what the source raises."""
    rows: list[RawRow] = []
    characters = 0
    failure: SlimError | None = None  # the rows before it come first
    remaining = iter(islice(source, limit))
    while True:
        try:
            raw = next(remaining)
        except StopIteration:
            break
        except SlimError as error:
            failure = error
            break
        rows.append(raw)
        characters += _characters(raw.value)
        if len(rows) >= _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            yield rows
            rows, characters = [], 0
    if rows:
        yield rows
    if failure is not None:
        raise failure


def _characters(value: Any) -> int:
    """Return about how long the strings in a JSON value are."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


@dataclass(frozen=True)
class RowChunk:
    """Neighbouring rows of one source to be tokenised."""

    rows: list[RawRow]
    config: SourceConfig


@dataclass(frozen=True)
class TokenizedChunk:
    """Their tokens, what became of them, and their texts if requested."""

    tokens: TokenRows
    ledger: SourceLedger
    texts: list[tuple[RawRow, list[str]]]


@dataclass(frozen=True)
class ChunkTokenizer:
    """What is done with a chunk of rows, in this process or in another (see ``workers``)."""

    pipeline: Pipeline
    texts: bool  # whether they are compared with evaluation data

    def __call__(self, task: RowChunk) -> TokenizedChunk:
        """Tokenise one chunk."""
        ledger = SourceLedger("", "", 1.0, [])
        prepared = self.pipeline.chunk(task.rows, task.config, ledger)
        begins = [row.piece == 0 for row in prepared]
        tokens = TokenRows.of([row.tokens for row in prepared], begins)
        ledger.use(tokens)
        texts = [
            (row.raw._replace(value={}), row.example.texts) for row in prepared if row.piece == 0
        ]
        return TokenizedChunk(tokens, ledger, texts if self.texts else [])


def tokenize_source(
    workers: Workers[RowChunk, TokenizedChunk],
    source: Source,
    config: SourceConfig,
    ledger: SourceLedger,
    limit: int | None = None,
) -> Iterator[TokenizedChunk]:
    """Yield the tokens of a source in order; count every row in ``ledger``."""
    with stage(f"tokenising {public_name(source.name)}", limit, "rows") as reading:
        for answer in workers.map(RowChunk(rows, config) for rows in _chunks(source, limit)):
            ledger.merge(answer.ledger)
            reading.reach(ledger.rows_read)
            yield answer
    ledger.blank_lines = source.blank_lines
