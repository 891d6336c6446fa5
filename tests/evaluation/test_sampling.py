"""Few-shot examples: the first rows, or the harness's own draws, whatever the limit."""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.prompts import build_questions
from mlx_slim.evaluation.tasks.rows import load_rows
from mlx_slim.evaluation.tasks.spec import FIRST, HARNESS, expand, suites
from tests.evaluation.support import CHOICE, quiz, write_task


def _shots(questions: Any) -> list[list[int]]:
    """Return the numbers of each question's examples, in their order."""
    return [
        [int(part.split("?")[0].split()[-1]) for part in q.context.split("Q: ")[1:-1]]
        for q in questions
    ]


def _task(folder: Path, text: Any = CHOICE, rows: Any = 6, shots: Any = 130):
    return write_task(
        folder, text, rows=[quiz(i) for i in range(rows)],
        shots=[quiz(100 + i) for i in range(shots)],
    )  # fmt: skip


def test_one_generator_a_task_and_one_draw_a_row_in_order(tmp_path: Path) -> None:
    task = _task(tmp_path)
    rows = load_rows(task, sampling=HARNESS)
    generator = random.Random(1234)
    expected = [[100 + i for i in generator.sample(range(130), 5)] for _ in range(6)]
    shots = _shots(build_questions(task, rows, 5, sampling=HARNESS))
    assert shots == expected
    assert _shots(build_questions(task, rows, 5, 2, sampling=HARNESS)) == expected[:2]
    assert _shots(build_questions(task, rows, 5)) == [[100, 101, 102, 103, 104]] * 6


def test_a_question_is_never_an_example_of_itself(tmp_path: Path) -> None:
    task = _task(tmp_path, CHOICE.replace("shots.jsonl", "rows.jsonl"))
    questions_shots = _shots(
        build_questions(task, load_rows(task, sampling=HARNESS), 4, sampling=HARNESS)
    )
    generator = random.Random(1234)
    for number, shots in enumerate(questions_shots):
        drawn = generator.sample(range(6), 5)
        assert shots == [i for i in drawn if i != number][:4]
    with pytest.raises(SlimError, match="has 6 rows for them"):
        build_questions(task, load_rows(task), 6, sampling=HARNESS)


def test_the_leaderboard_names_its_sampling() -> None:
    selections = expand(["leaderboard-v1"])
    assert {selection.sampling for selection in selections} == {HARNESS}
    assert {selection.sampling for selection in expand(["seed"])} == {FIRST}
    assert "sampling" not in suites()["leaderboard-v1"]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra bench")
@pytest.mark.parametrize("spare", [False, True])
def test_the_draws_are_those_of_the_harness(tmp_path: Path, spare: bool) -> None:
    from lm_eval.api.samplers import ContextSampler

    text = CHOICE.replace("shots.jsonl}", f"shots.jsonl, spare_shot: {str(spare).lower()}}}")
    task = _task(tmp_path, text)
    rows = load_rows(task, sampling=HARNESS)
    sampler = ContextSampler(list(rows.shots))
    sampler.set_rnd(1234)
    expected = [sampler.sample(5, eval_doc=row if spare else None) for row in rows.rows]
    numbers = [[int(r["question"].split()[-1][:-1]) for r in draw] for draw in expected]
    assert _shots(build_questions(task, rows, 5, sampling=HARNESS)) == numbers
