"""Rows: where they are found, what is checked, what the checksum covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.data import sources
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.rows import count_rows, load_rows, shots_checksum
from mlx_slim.evaluation.tasks.spec import find_task
from tests.evaluation.support import CHOICE, mmlu_row, quiz, write_rows, write_task

ARC = {
    "id": "a",
    "question": "Which?",
    "choices": {"text": ["one", "two"], "label": ["A", "B"]},
    "answerKey": "B",
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_SLIM_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_mirror_is_set_by_argument_or_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "arc_easy" / "test.jsonl", [ARC, ARC])
    task = find_task("arc_easy")
    by_argument = load_rows(task, tmp_path)
    assert [row["id"] for row in by_argument.rows] == ["a", "a"]
    assert by_argument.source == str(tmp_path / "arc_easy" / "test.jsonl")
    assert by_argument.place(1).endswith("test.jsonl, line 2")
    monkeypatch.setenv("MLX_SLIM_DATA", str(tmp_path))
    assert load_rows(task) == by_argument or load_rows(task).checksum == by_argument.checksum
    assert count_rows(task) == 2


def test_missing_rows_say_what_and_where(tmp_path: Path) -> None:
    for data_dir, words in ((None, "names a data mirror"), (tmp_path, "arc_easy/test.jsonl")):
        with pytest.raises(SlimError, match=words) as caught:
            load_rows(find_task("arc_easy"), data_dir)
        assert "allenai/ai2_arc" in caught.value.message
        assert "arc_easy/test.jsonl" in caught.value.hint
    assert count_rows(find_task("arc_easy"), tmp_path) is None
    with pytest.raises(SlimError, match="nowhere does not exist"):
        load_rows(find_task("arc_easy"), tmp_path / "nowhere")
    (tmp_path / "arc_easy").mkdir()
    with pytest.raises(SlimError, match=r"arc_easy/test\.jsonl does not exist"):
        load_rows(find_task("arc_easy"), tmp_path)


def test_missing_shots_do_not_matter_until_they_are_used(tmp_path: Path) -> None:
    write_rows(tmp_path / "arc_challenge" / "test.jsonl", [ARC])
    task_rows = load_rows(find_task("arc_challenge"), tmp_path)
    with pytest.raises(SlimError, match=r"split 'train': .*arc_challenge/train\.jsonl does not"):
        len(task_rows.shots)
    write_rows(tmp_path / "arc_challenge" / "train.jsonl", [ARC] * 3)
    assert len(task_rows.shots) == 3


def test_bioasq_reads_the_official_file_and_says_how_to_get_it(tmp_path: Path) -> None:
    task = find_task("bioasq")
    with pytest.raises(SlimError, match=r"bioasq/test\.jsonl") as caught:
        load_rows(task, tmp_path)
    assert "bioasq.org" in caught.value.hint
    yes = {"body": "Is it?", "type": "yesno", "snippets": [{"text": "It is."}]}
    questions = [{**yes, "exact_answer": "yes"}, {"body": "Which?", "type": "factoid"},
                 {**yes, "exact_answer": "no", "ideal_answer": ["x"]}]  # fmt: skip
    (tmp_path / "bioasq").mkdir()
    (tmp_path / "bioasq" / "test.json").write_text(json.dumps({"questions": questions}))
    task_rows = load_rows(task, tmp_path)
    assert [row["exact_answer"] for row in task_rows.rows] == ["yes", "no"]
    assert count_rows(task, tmp_path) == 2
    assert task_rows.place(1).endswith("test.json, questions, row 3")
    write_rows(tmp_path / "bioasq" / "test.jsonl", questions)
    assert load_rows(task, tmp_path).checksum == task_rows.checksum


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": None}, "question is null: expected text"),
        ({"answerKey": 1}, "answerKey is 1: expected text"),
        ({"choices": {"text": ["a"]}}, "no field 'choices.label': expected a list of texts"),
        ({"choices": {"text": [], "label": []}}, r"choices.text is \[\]: expected a list"),
        ({"choices": {"text": ["a", 2], "label": ["A"]}}, "expected a list of texts"),
        ({"choices": "a"}, "no field 'choices.text'"),
    ],
)
def test_a_wrong_row_is_one_line_with_file_line_field_and_expectation(
    tmp_path: Path, change: Any, words: str
) -> None:
    write_rows(tmp_path / "arc_easy" / "test.jsonl", [ARC, {**ARC, **change}])
    with pytest.raises(SlimError, match=words) as caught:
        load_rows(find_task("arc_easy"), tmp_path)
    assert "arc_easy/test.jsonl, line 2" in caught.value.message
    assert "\n" not in str(caught.value)


def test_other_wrong_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "mmlu" / "test.jsonl", [{**mmlu_row("anatomy", 1), "answer": "B"}])
    with pytest.raises(SlimError, match='answer is "B": expected a whole number'):
        load_rows(find_task("mmlu"), tmp_path)
    write_rows(tmp_path / "mmlu" / "test.jsonl", [{**mmlu_row("anatomy", 1), "answer": True}])
    with pytest.raises(SlimError, match="answer is true: expected a whole number"):
        load_rows(find_task("mmlu"), tmp_path)
    write_rows(tmp_path / "mmlu" / "test.jsonl", [mmlu_row("anatomie", 1)])
    with pytest.raises(SlimError, match="none of the 57 subtasks of mmlu") as caught:
        load_rows(find_task("mmlu"), tmp_path)
    assert "anatomy" in caught.value.hint
    scene = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d"], "label": 3}
    write_rows(tmp_path / "hellaswag" / "validation.jsonl", [scene])
    with pytest.raises(SlimError, match="label is 3: expected one of 0, 1, 2, 3"):
        load_rows(find_task("hellaswag"), tmp_path)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "a", "answer": "1"}\n{oops\n')
    with pytest.raises(SlimError, match="line 2, column 2: malformed JSON"):
        load_rows(find_task("gsm8k"), tmp_path)


def test_a_subtask_has_separate_rows_and_numbers(tmp_path: Path) -> None:
    rows = [mmlu_row("anatomy", 0), mmlu_row("virology", 1), mmlu_row("anatomy", 2)]
    write_rows(tmp_path / "mmlu" / "test.jsonl", rows)
    task_rows = load_rows(find_task("mmlu_anatomy"), tmp_path)
    assert task_rows.rows == [rows[0], rows[2]]
    assert task_rows.place(1).endswith("line 3")
    assert count_rows(find_task("mmlu_anatomy"), tmp_path) == 2
    with pytest.raises(SlimError, match="no row of philosophy"):
        load_rows(find_task("mmlu_philosophy"), tmp_path)


def test_the_checksum_covers_the_fields_that_the_task_names(tmp_path: Path) -> None:
    def checksum(row: Any):
        write_rows(tmp_path / "arc_easy" / "test.jsonl", [row])
        return load_rows(find_task("arc_easy"), tmp_path).checksum

    same = checksum(ARC)
    assert len(same) == 64
    assert checksum({**dict(reversed(ARC.items())), "id": "b", "more": 1}) == same
    assert checksum({**ARC, "answerKey": "A"}) != same


def test_files_of_a_users_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    task = write_task(tmp_path, CHOICE, rows=[quiz(1), quiz(2)], shots=[quiz(3)])
    task_rows = load_rows(task)
    assert (len(task_rows.rows), len(task_rows.shots)) == (2, 1)
    (tmp_path / "rows.json").write_text(json.dumps([quiz(1), quiz(2)]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([quiz(1), quiz(2)]),
                                tmp_path / "rows.parquet")  # fmt: skip
    for name in ("rows.json", "rows.parquet"):
        other = write_task(tmp_path, CHOICE.replace("rows.jsonl", name))
        assert load_rows(other).checksum == task_rows.checksum
    (tmp_path / "shots.jsonl").unlink()
    with pytest.raises(SlimError, match=r"shots\.jsonl does not exist"):
        len(load_rows(task).shots)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(SlimError, match=r"rows\.jsonl does not exist"):
        load_rows(task)


def test_a_users_task_can_name_a_data_set_of_the_mirror(tmp_path: Path) -> None:
    task = write_task(tmp_path, CHOICE.replace("rows.jsonl, shots: shots.jsonl", "some/quiz"))
    write_rows(tmp_path / "mirror" / "quiz" / "test.jsonl", [quiz(1)])
    assert load_rows(task, tmp_path / "mirror").rows == [quiz(1)]
    with pytest.raises(SlimError, match="no few-shot examples"):
        len(load_rows(task, tmp_path / "mirror").shots)
    text = CHOICE.replace("rows.jsonl, shots: shots.jsonl", "some/quiz, where: '{{ oops }}'")
    with pytest.raises(SlimError, match=r"line 1: data.where: 'oops' is undefined"):
        load_rows(write_task(tmp_path, text), tmp_path / "mirror")


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def load(match: Any, config: Any):
        requests.append((match["id"], match["config"], match["rev"], config.split))
        row = {"pubid": 1, "question": "q", "context": {"contexts": ["c"]}, "final_decision": "no"}
        return [row]

    monkeypatch.setattr(sources, "_load_hub", load)
    task = find_task("pubmedqa")
    task_rows = load_rows(task)
    revision = task.spec.data.revision
    assert requests == [("qiaojin/PubMedQA", "pqa_labeled", revision, "train")]
    assert task_rows.source == f"qiaojin/PubMedQA:pqa_labeled@{revision}"
    assert task_rows.place(0).endswith(", row 1")
    assert shots_checksum(task, task_rows, 0) is None
    assert shots_checksum(task, task_rows, 1) == task_rows.checksum
    with pytest.raises(SlimError, match="no field 'question_stem'"):
        load_rows(find_task("openbookqa"))
