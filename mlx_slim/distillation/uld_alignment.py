"""Which tokens of two tokenizers cover the same bytes of a row's answers.

Invariant: only the answers' own text is compared; each model reads the row by its own chat
template. Both token sequences of an answer are cut into groups at every byte where both have a
border, and the last token of an answer (what closes it) is left out, as TRL's ``uld_skip_*_eos``.
What cannot be compared raises ``Unaligned`` with the reason that is counted. An example::

    bytes     0       4   6      9          groups   [0, 6): student 0 1, teacher 0
    student   ' wor'  'ld' ' is'                     [6, 9): student 2,   teacher 1 2
    teacher   ' world' ' i' 's'

A group of several tokens is one token to the other model. With ``observed`` (TRL's default) its
distribution is that *after* its first token, times the probability of its other tokens; with
``bayesian`` it is that *of* its last token, times the probability of those before it (their
product is exact). Try it: ``python -m pytest tests/distillation/test_uld_alignment.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from mlx_slim.data.formats import Example
from mlx_slim.data.rendered import Rendered
from mlx_slim.data.tokenize import RowEncoder, with_offsets

Merge = Literal["observed", "bayesian"]
NO_GROUP, BASE = -1, -1


class Unaligned(Exception):
    """The answers of a row cannot be compared; the text is the reason that is counted."""


@dataclass(frozen=True)
class Answer:
    """The tokens of one answer as one model reads it, without the last one.

    Attributes:
        tokens: Index of each in the row's ids.
        begin: Byte of the answer's text where the first one begins.
        ends: Byte where each one ends, ascending.
    """

    tokens: np.ndarray
    begin: int
    ends: np.ndarray


class Group(NamedTuple):
    """Tokens of one model that cover what a group of the other model covers: their indices."""

    tokens: np.ndarray


class Part(NamedTuple):
    """A position of a row that a group needs.

    Attributes:
        target: Index of the id that the position predicts.
        group: Number of the group in the row.
        token: The id whose probability scales the group; ``BASE`` where its distribution stands.
    """

    target: int
    group: int
    token: int


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = {chr(byte): byte for byte in shown}
    return characters | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


@lru_cache(maxsize=1 << 17)
def spelled(piece: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary; an added token is its own text."""
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return piece.encode("utf-8", "replace")


def byte_ends(text: str, pieces: Sequence[str], offsets_T2: np.ndarray) -> np.ndarray:
    """Return the byte of ``text`` (UTF-8) behind each token, int64 (T,), ascending.

    Args:
        text: What was tokenized.
        pieces: The tokens as the vocabulary writes them.
        offsets_T2: Start and end character of each, as the tokenizer reports them.
    """
    data = text.encode("utf-8", "replace")
    spellings = [spelled(piece) for piece in pieces]
    if b"".join(spellings) == data:
        return np.cumsum([len(piece) for piece in spellings], dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    bytes_C = np.concatenate([[0], np.cumsum(sizes)])
    start_T, end_T = bytes_C[offsets_T2[:, 0]], bytes_C[offsets_T2[:, 1]]
    # A character of several tokens: each byte is one, where their numbers agree.
    for run in np.split(np.arange(len(pieces)), np.flatnonzero(np.diff(end_T)) + 1):
        same = run[start_T[run] == start_T[run[-1]]] if len(run) else run
        if len(same) > 1 and end_T[same[0]] - start_T[same[0]] == len(same):
            end_T[same] = start_T[same[0]] + 1 + np.arange(len(same))
    return np.maximum.accumulate(end_T)


def contents(example: Example) -> list[str]:
    """Return the text of every answer of a row, without the white space around it."""
    if example.kind == "text":
        return [example.fields["text"].strip()]
    return [m["content"].strip() for m in example.messages if m["role"] == "assistant"]


class AnswerReader:
    """Finds the tokens of a row's answers for one model.

    Args:
        tokenizer: Of the model; a fast one.
        side: ``student`` or ``teacher``, for the reasons.
    """

    def __init__(self, tokenizer: Any, side: str) -> None:
        self.encoder = RowEncoder(tokenizer, mask_prompt=True)
        self._side = side

    def read(
        self, rows: Sequence[Rendered], answers: Sequence[Sequence[str]]
    ) -> list[tuple[np.ndarray, list[Answer] | str]]:
        """Return the ids of each row, int32 (T,), and its answers, or why it has none."""
        numbered = [
            replace(row, weights=[float(1 + number) for number in range(len(row.spans))])
            for row in rows
        ]
        encoded = self.encoder.encode(numbered)
        ends = self._ends([row.text for row in rows])
        results: list[tuple[np.ndarray, list[Answer] | str]] = []
        for row, tokens, (ids_T, ends_T), texts in zip(rows, encoded, ends, answers, strict=True):
            number_T = tokens.supervised_T if tokens.weights_T is None else tokens.weights_T
            # BOS and EOS may stand around what was tokenized.
            head = int(not np.array_equal(tokens.ids_T[: len(ids_T)], ids_T))
            tail = len(tokens.ids_T) - head - len(ids_T)
            last = len(row.text.encode("utf-8", "replace"))
            ends_T = np.concatenate([[0] * head, ends_T, [last] * tail]).astype(np.int64)
            try:
                answers_read: list[Answer] | str = self._answers(row, number_T, ends_T, texts)
            except Unaligned as error:
                answers_read = str(error)
            results.append((tokens.ids_T, answers_read))
        return results

    def _ends(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        tokenizer = self.encoder.tokenizer
        ends = []
        for text, (ids_T, offsets_T2) in zip(texts, with_offsets(tokenizer, texts), strict=True):
            pieces = tokenizer.convert_ids_to_tokens(ids_T.tolist())
            ends.append((ids_T, byte_ends(text, pieces, offsets_T2)))
        return ends

    def _answers(
        self, row: Rendered, number_T: np.ndarray, ends_T: np.ndarray, texts: Sequence[str]
    ) -> list[Answer]:
        if len(row.spans) != len(texts):
            raise Unaligned(f"the {self._side}'s template shows other answers than the row has")
        answers_read = []
        for number, ((start, stop), text) in enumerate(zip(row.spans, texts, strict=True), 1):
            at = row.text.find(text, start, stop) if text else -1
            if at < 0:
                what = "changes an answer's text" if text else "shows an answer without text"
                raise Unaligned(f"the {self._side}'s template {what}")
            first = len(row.text[:at].encode("utf-8", "replace"))
            size = len(text.encode("utf-8", "replace"))
            answers_read.append(_answer(np.flatnonzero(number_T == number), ends_T - first, size))
        return answers_read


def _answer(tokens: np.ndarray, ends_T: np.ndarray, size: int) -> Answer:
    """Return the tokens of an answer of ``size`` bytes; ``ends_T`` count from its beginning."""
    tokens = tokens[:-1]
    before = np.where(tokens > 0, ends_T[tokens - 1], 0)
    inside = (ends_T[tokens] > 0) & (before < size)
    tokens, before = tokens[inside], before[inside]
    begin = max(0, int(before[0])) if len(tokens) else 0
    return Answer(tokens, begin, np.clip(ends_T[tokens], 0, size))


def groups(one: Answer, other: Answer, *, extended: bool) -> list[tuple[Group, Group]]:
    """Return the groups of two models' tokens of one answer, in order.

    Args:
        one: As one model reads it.
        other: As the other does.
        extended: Align by bytes; else the i-th tokens of both, whatever they cover.
    """
    if not extended:
        pairs = zip(one.tokens, other.tokens, strict=False)
        return [(Group(a[None]), Group(b[None])) for a, b in pairs]
    common = np.intersect1d(np.append(one.ends, one.begin), np.append(other.ends, other.begin))
    sides = []
    for side in (one, other):
        cuts = np.searchsorted(side.ends, common, "right")
        sides.append([side.tokens[a:b] for a, b in pairwise(cuts)])
    return [(Group(a), Group(b)) for a, b in zip(*sides, strict=True)]


def positions_of(group: Group, number: int, ids_T: np.ndarray, merge: Merge) -> list[Part]:
    """Return the positions that a group needs, its base first.

    Args:
        group: Of one model.
        number: Of the group in its row.
        ids_T: The row's ids.
        merge: ``observed`` takes the distributions behind the group's tokens (that of token j
            stands at position j, which predicts j + 1), ``bayesian`` those that predict them.
    """
    first, *others = group.tokens.tolist() if merge == "observed" else group.tokens.tolist()[::-1]
    shift = int(merge == "observed")
    scaling = [Part(token + shift, number, int(ids_T[token])) for token in others]
    return [Part(first + shift, number, BASE), *scaling]
