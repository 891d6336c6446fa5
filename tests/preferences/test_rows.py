"""Each prompt gets the answer of the nearest row before it that has another prompt."""

from __future__ import annotations

import numpy as np

from mlx_slim.preferences.rows import MismatchedRows
from tests.preferences.support import Rows


def _ids(rows: MismatchedRows, i: int) -> tuple[list[int], list[bool]]:
    ids_T, supervised_T = rows.row(i)
    assert len(ids_T) == rows.lengths[i]
    assert supervised_T.sum() == rows.supervised[i]
    return ids_T.tolist(), supervised_T.tolist()


def test_answers_are_rotated_by_one() -> None:
    rows = MismatchedRows(Rows([([1, 2], [3]), ([4], [5, 6]), ([7], [8])]), 64)
    assert len(rows) == 3
    assert _ids(rows, 0) == ([1, 2, 8], [False, False, True])
    assert _ids(rows, 1) == ([4, 3], [False, True])
    assert _ids(rows, 2) == ([7, 5, 6], [False, True, True])
    assert rows.weights(0) is None


def test_an_answer_to_the_same_prompt_is_no_mismatch() -> None:
    rows = MismatchedRows(Rows([([1], [9]), ([1], [8]), ([2], [7]), ([2], [6]), ([1], [5])]), 64)
    assert [_ids(rows, i)[0][1] for i in range(5)] == [6, 6, 8, 8, 6]
    alike = MismatchedRows(Rows([([1], [9]), ([1], [8])]), 64)
    assert [_ids(alike, i)[0][1] for i in range(2)] == [8, 9]


def test_a_row_that_gets_too_long_is_cut() -> None:
    rows = MismatchedRows(Rows([([1] * 6, [2]), ([3], [4] * 5)]), 8)
    assert _ids(rows, 0) == ([1] * 6 + [4] * 2, [False] * 6 + [True] * 2)
    assert np.array_equal(rows.lengths, [8, 2])
