"""Groups of two tokenizers' tokens that cover the same bytes of an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_slim.data.formats import Example
from mlx_slim.data.templates import load_template
from mlx_slim.data.tokenize import unwrap
from mlx_slim.distillation.uld_alignment import (
    Answer,
    AnswerReader,
    Group,
    Part,
    byte_ends,
    contents,
    groups,
    positions_of,
    spelled,
)
from mlx_slim.models.load import load_tokenizer
from tests.support.vocabularies import BRACKETS, TAGS, bpe_tokenizer, student_of_words

TEXTS = ["alpha beta gamma", "Größe 🙂  naïve\n\nfour", " a  b ", "beta" * 5]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    student = load_tokenizer(student_of_words(folder / "student"))
    other = student_of_words(folder / "other")
    bpe_tokenizer(other, ["alpha beta be ta ta ıï ße our", " alpha"] * 4, 300, BRACKETS, "</s>")
    return [student, load_tokenizer(other)]


def _example(*answers: str) -> Example:
    messages: list[Any] = []
    for answer in answers:
        messages += [
            {"role": "user", "content": "beta?"},
            {"role": "assistant", "content": answer},
        ]
    return Example("chat", messages)


def _read(tokenizer: Any, example: Example, side: str) -> tuple[np.ndarray, Any]:
    rendered = load_template("auto", unwrap(tokenizer)).render(example)
    return AnswerReader(tokenizer, side).read([rendered], [contents(example)])[0]


def _bytes(tokenizer: Any, ids: np.ndarray) -> bytes:
    return b"".join(map(spelled, unwrap(tokenizer).convert_ids_to_tokens(ids.tolist())))


@pytest.mark.parametrize("answers", [[text] for text in TEXTS] + [TEXTS[:2]])
def test_both_sides_of_a_group_spell_the_same_text(
    tokenizers: list[Any], answers: list[str]
) -> None:
    example = _example(*answers)
    sides = [_read(*pair) for pair in zip(tokenizers, [example] * 2, ("s", "t"), strict=True)]
    total = 0
    for number, text in enumerate(answers):
        aligned = groups(*(side[1][number] for side in sides), extended=True)
        joined = []
        for pair in aligned:
            texts = [
                _bytes(tokenizer, ids_T[group.tokens])
                for tokenizer, (ids_T, _), group in zip(tokenizers, sides, pair, strict=True)
            ]
            assert texts[0] == texts[1]
            joined.append(texts[0])
            total += max(len(group.tokens) for group in pair) > 1
        assert b"".join(joined) == text.strip().encode()  # with nothing of what closes the answer
    assert total or answers == [TEXTS[2]]


def test_positions_are_aligned_one_by_one_without_the_bytes(tokenizers: list[Any]) -> None:
    sides = [_read(t, _example(TEXTS[0]), "s")[1][0] for t in tokenizers]
    aligned = groups(*sides, extended=False)
    assert len(aligned) == min(len(side.tokens) for side in sides)
    assert [group.tokens.tolist() for group, _ in aligned] == [
        [token] for token in sides[0].tokens[: len(aligned)].tolist()
    ]


def test_what_begins_or_ends_apart_is_in_no_group() -> None:
    one = Answer(np.array([5, 6, 7]), 0, np.array([2, 4, 9]))
    other = Answer(np.array([1, 2, 3]), 2, np.array([3, 4, 7]))  # its first token is missing
    ours, theirs = zip(*groups(one, other, extended=True), strict=True)
    assert [group.tokens.tolist() for group in ours] == [[6]]
    assert [group.tokens.tolist() for group in theirs] == [[1, 2]]


def test_the_two_ways_of_merging_take_the_positions_of_trl() -> None:
    ids_T = np.array([9, 8, 7, 6, 5])
    group = Group(np.array([1, 2, 3]))
    assert positions_of(group, 4, ids_T, "observed") == [
        Part(2, 4, -1),
        Part(3, 4, 7),
        Part(4, 4, 6),
    ]
    assert positions_of(group, 4, ids_T, "bayesian") == [
        Part(3, 4, -1),
        Part(2, 4, 7),
        Part(1, 4, 8),
    ]


def test_bytes_are_counted_where_a_tokenizer_changes_the_text() -> None:
    # SentencePiece: a space in front that the text lacks, and a character of several byte tokens.
    pieces = ["▁Hi", "▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "!"]
    offsets = np.array([[0, 2], [2, 3], *[[3, 4]] * 4, [4, 5]])
    assert byte_ends("Hi 🙂!", pieces, offsets).tolist() == [2, 3, 4, 5, 6, 7, 8]
    # Byte-level: tokens spell the text, whatever offsets of half characters say.
    pieces = ["Gr", "Ã", "¶", "ÃŁ", "eĠ"]
    offsets = np.array([[0, 2], [2, 3], [2, 3], [3, 4], [4, 5]])
    assert byte_ends("Größe ", pieces, offsets).tolist() == [2, 3, 4, 6, 8]


def test_an_answer_that_a_template_changes_is_not_aligned(tokenizers: list[Any]) -> None:
    student = unwrap(tokenizers[0])
    shouting = TAGS.replace("message['content']", "message['content'] | upper")
    student.chat_template, before = shouting, student.chat_template
    try:
        _, reason = _read(tokenizers[0], _example("alpha"), "student")
    finally:
        student.chat_template = before
    assert reason == "the student's template changes an answer's text"
