"""The file of answers: appended line by line, repaired, edited, and valid for one prompt only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.distillation.answers import AnswerFile, TeacherRequest, TeacherResponse
from mlx_slim.errors import SlimError
from mlx_slim.reading import ChatMessage


class Parrot:
    """A teacher that repeats the question, and counts."""

    truncated = 0

    def __init__(
        self,
        name: str = "parrot",
        *,
        chunk: int = 2,
        batch_dependent: bool = False,
        settings: dict[str, Any] | None = None,
        fail: str | None = None,
    ) -> None:
        self.name, self.chunk, self.batch_dependent = name, chunk, batch_dependent
        self.settings = settings or {"model": "parrot"}
        self.prompts: list[str] = []
        self._fail = fail

    def answer(self, prompts: Sequence[list[ChatMessage]]) -> Iterator[tuple[str, str]]:
        for prompt in prompts:
            text = prompt[-1]["content"]
            if text == self._fail:
                raise SlimError("the parrot is dead")
            self.prompts.append(text)
            yield f"{text}, says {self.name}", "eos"

    def close(self) -> None:
        pass


def questions(count: int = 5, suffix: str = "") -> list[TeacherRequest]:
    return [
        TeacherRequest(
            f"row-{i}", [{"role": "user", "content": f"q{i}{suffix}"}], f"a{i}", f"line {i}"
        )
        for i in range(count)
    ]


def test_every_question_is_asked_once_and_the_lines_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    first = AnswerFile(path).collect(Parrot(), questions())
    assert [w.generation for w in first] == [f"q{i}, says parrot" for i in range(5)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["id"], line["prompt"], line["answer"]) for line in lines] == [
        (f"row-{i}", f"q{i}", f"a{i}") for i in range(5)
    ]
    again = Parrot()
    assert AnswerFile(path).collect(again, questions()) == first
    assert again.prompts == []


def test_two_teachers_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path)
    file.collect(Parrot("one"), questions(2))
    file.collect(Parrot("two"), questions(2))
    assert [w.generation for w in AnswerFile(path).collect(Parrot("one"), questions(2))] == [
        "q0, says one", "q1, says one",
    ]  # fmt: skip


def test_a_failure_keeps_what_came_before_and_a_resume_gives_the_same_file(tmp_path: Path) -> None:
    straight, path = tmp_path / "straight.jsonl", tmp_path / "answers.jsonl"
    AnswerFile(straight).collect(Parrot(), questions())
    with pytest.raises(SlimError, match="dead"):
        AnswerFile(path).collect(Parrot(fail="q3"), questions())
    assert len(path.read_text().splitlines()) == 3
    AnswerFile(path).collect(Parrot(), questions())
    assert path.read_bytes() == straight.read_bytes()


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_torn_last_line_is_repaired(tmp_path: Path, cut: int) -> None:
    straight, path = tmp_path / "straight.jsonl", tmp_path / "answers.jsonl"
    AnswerFile(straight).collect(Parrot(), questions())
    path.write_bytes(straight.read_bytes()[:-cut])
    parrot = Parrot()
    AnswerFile(path).collect(parrot, questions())
    assert path.read_bytes() == straight.read_bytes()
    assert len(parrot.prompts) == (0 if cut == 1 else 1)  # without its newline the line is whole


def test_a_batch_dependent_teacher_answers_a_whole_chunk_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path).collect(Parrot(), questions())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[4]]))
    parrot = Parrot(batch_dependent=True)
    AnswerFile(path).collect(parrot, questions())
    assert parrot.prompts == ["q2", "q3"]
    assert len(path.read_text().splitlines()) == 5


def test_an_edited_answer_is_used_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path).collect(Parrot(), questions(3))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["generation"] = "By hand, and better."
    text = "\n".join(json.dumps(line, indent=None) for line in lines)
    path.write_text(f"\n{text}")  # an editor's blank line, and no newline at the end
    parrot = Parrot()
    responses = AnswerFile(path).collect(parrot, questions(3))
    assert parrot.prompts == []
    assert [(w.generation, w.edited) for w in responses] == [
        ("q0, says parrot", False), ("By hand, and better.", True), ("q2, says parrot", False),
    ]  # fmt: skip


def test_what_changed_is_asked_again_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path).collect(Parrot(), questions(3))
    changed = [*questions(2), *questions(3, suffix="!")[2:]]
    parrot = Parrot()
    AnswerFile(path).collect(parrot, changed)
    assert parrot.prompts == ["q2!"]
    other = Parrot(settings={"model": "parrot", "max_tokens": 9})
    AnswerFile(path).collect(other, questions(3))
    assert other.prompts == ["q0", "q1", "q2"]
    assert AnswerFile(path).collect(Parrot(), questions(3))[2].generation == "q2, says parrot"


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path).collect(Parrot(), questions(3))
    good = path.read_text().splitlines()
    for bad, what in (
        ("{no", "cannot be read as JSON"),
        ('{"id": "x"}', "teacher, generation"),
        ("3", "no text"),
    ):
        path.write_text("\n".join([good[0], bad, good[2], ""]))
        with pytest.raises(SlimError, match=what) as caught:
            AnswerFile(path)
        assert "line 2" in caught.value.message


@pytest.mark.parametrize(
    ("text", "reason", "edited", "problem"),
    [
        ("It rains because clouds cool.", "eos", False, ""),
        ("It rains because clouds cool.", "until", False, ""),
        (" \n", "eos", False, "empty"),
        ("", "eos", True, "empty"),
        ("It rains because", "length", False, "cut at the longest answer"),
        ("It rains because", "length", True, ""),
        ("and the cat sat " * 12, "eos", False, "repeats itself"),
        ("and the cat sat " * 12, "eos", True, ""),
        (" ".join(f"word{i}" for i in range(200)), "eos", False, ""),
    ],
)
def test_the_problem_of_a_response(text: str, reason: str, edited: bool, problem: str) -> None:
    assert TeacherResponse("id", text, reason, edited).problem == problem
