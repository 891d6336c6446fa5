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
from mlx_slim.config.preference import PreferenceRows
from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.data.formats import Dropped, Example, check_columns, read_example
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.pieces import context_tokens, split
from mlx_slim.data.preference_rows import SAME_ANSWERS, read_answers
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
    answer: int = 0  # number of the answer, where the row has several

    @property
    def begins(self) -> bool:
        """Whether it is the first of its row."""
        return self.piece == 0 and self.answer == 0


_Text = tuple[Example, Rendered]


class Pipeline:
    """Source → tokens, row by row; used by ``prepare`` and by the preview.

    Args:
        config: The ``data`` section.
        tokenizer: The model's.
        max_length: Longest row, tokens.
        limit: The longest row that the model computes right; a longer one is refused.
        preference: What a row is where answers are compared (``Recipe.preference_rows``).

    Raises:
        SlimError: If the settings or the tokenizer cannot be used.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        *,
        max_length: int,
        limit: RowLimit | None = None,
        preference: PreferenceRows | None = None,
    ) -> None:
        check_columns(config.columns)
        self.config, self.max_length, self.limit = config, max_length, limit
        self.preference: PreferenceRows | None = preference
        self.context = context_tokens(config.split_overlap, max_length)
        self.template: Template = load_template(config.template, unwrap(tokenizer))
        self.encoder = RowEncoder(tokenizer, mask_prompt=config.mask_prompt)

    def __getstate__(self) -> tuple[Any, ...]:
        settings = self.config, self.max_length, self.limit, self.preference
        return *settings, self.context, self.encoder

    def __setstate__(self, state: tuple[Any, ...]) -> None:  # in another process
        self.config, self.max_length, self.limit, self.preference = state[:4]
        self.context, self.encoder = state[4:]
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

        Both answers of a row that compares two are used, or neither.

        Raises:
            SlimError: About the first row that cannot be used and may not be dropped.
        """
        texts: list[list[_Text] | str] = []  # or why the row is dropped
        failure: SlimError | None = None
        for raw in rows:
            ledger.rows_read += 1
            try:
                texts.append(self._texts(raw, config, ledger))
            except Dropped as dropped:
                texts.append(dropped.reason)
            except SlimError as error:
                failure = error  # a row before it may be too long in tokens: that comes first
                break
        answers = [text for one in texts if isinstance(one, list) for text in one]
        encoded = iter(self.encoder.encode([rendered for _, rendered in answers]))
        prepared: list[PreparedRow] = []
        for raw, text in zip(rows, texts, strict=False):
            if isinstance(text, str):
                ledger.drop(text, raw)
                continue
            whole = [next(encoded) for _ in text]
            lengths = [len(row.ids_T) for row in whole]
            try:
                if lengths[0] > self.max_length and self.config.splits(text[0][0].kind):
                    prepared += self._pieces(raw, *text[0], whole[0], ledger)
                    continue
                fitted = self._fit(raw, whole)
            except Dropped as dropped:
                ledger.drop(dropped.reason, raw)
                continue
            if missing := sum(lengths) - sum(len(row.ids_T) for row in fitted):
                ledger.truncate(raw, missing)
            for number, (one, tokens) in enumerate(zip(text, fitted, strict=True)):
                prepared.append(PreparedRow(raw, *one, tokens, lengths[number], answer=number))
        if failure is not None:
            raise failure
        return prepared

    def _texts(self, raw: RawRow, config: SourceConfig, ledger: SourceLedger) -> list[_Text]:
        """Return the text of a row; of one that compares two answers, the text with each."""
        if self.config.columns:
            ledger.columns |= raw.value.keys()
        named = {
            "columns": self.config.columns,
            "system": config.system or self.config.system,
        }
        if self.preference is None:
            format = config.format or self.config.format
            examples = [read_example(raw, format, learn=self.config.learn, **named)]
        else:
            examples = read_answers(raw, self.preference, **named)
        texts = [(example, self._render(raw, example)) for example in examples]
        # Both answers are cut on the left by as many tokens: those are known later.
        if not self.config.splits(examples[0].kind) and (
            len(texts) == 1 or self.config.truncation != "left"
        ):
            texts = [(example, self._clip(raw, row, ledger)) for example, row in texts]
        ledger.read(examples[0])
        notes = (note for example, row in texts for note in (*example.notes, *row.notes))
        for note in dict.fromkeys(notes):
            ledger.note(note, raw)
        return texts

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

    def _fit(self, raw: RawRow, rows: list[Tokens]) -> list[Tokens]:
        """Apply the truncation policy to the texts of a row; a BOS in front stays there."""
        longest = max(len(row.ids_T) for row in rows)
        if longest > self.max_length:
            rows = [self._cut(raw, row, longest) for row in rows]
        for row in rows:
            check_ids(self.encoder.tokenizer, row.ids_T, raw.place)
            if not row.supervised_T.any():
                raise Dropped("no supervised token left")
            if self.limit is not None:
                hint = f"set train.max_length={self.limit.tokens}, which drops or cuts longer rows"
                self.limit.check(len(row.ids_T), raw.place, hint)
        if len(rows) == 2 and np.array_equal(rows[0].ids_T, rows[1].ids_T):
            raise Dropped(SAME_ANSWERS)
        return rows

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
        fitted = [self._fit(raw, [part])[0] for part in learned]
        return [
            PreparedRow(raw, example, rendered, part, len(part.ids_T), number, len(fitted))
            for number, part in enumerate(fitted)
        ]

    def _cut(self, raw: RawRow, row: Tokens, longest: int) -> Tokens:
        """Return a text cut; on the left, of as many tokens as the ``longest`` of its row."""
        length, limit = len(row.ids_T), self.max_length
        policy = self.config.truncation
        if policy == "error":
            raise self._too_long(raw, f"{longest:,} tokens")
        if policy == "drop":
            raise Dropped(self._reason)
        excess = longest - limit if policy == "left" else max(0, length - limit)
        indices = np.arange(max(1, length - excess))
        if policy == "left":
            head = int(row.ids_T[0] == self.encoder.bos)
            indices[head:] += length - len(indices)
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
        labels = [row.example.label for row in prepared]
        begins = [row.begins for row in prepared]
        tokens = TokenRows.of([row.tokens for row in prepared], begins, labels)
        ledger.use(tokens)
        texts: list[tuple[RawRow, list[str]]] = []
        for row in prepared if self.texts else ():
            if row.begins:
                texts.append((row.raw._replace(value={}), row.example.texts))
            elif row.answer:
                texts[-1][1].extend(row.example.texts)
        return TokenizedChunk(tokens, ledger, texts)


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
