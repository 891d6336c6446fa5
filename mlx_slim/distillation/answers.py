"""What teachers wrote, one JSON line an answer: a cache that a person can read and edit.

Invariant: a line is on disk before the next answer is waited for; a torn last line is repaired, a
resume asks only what is missing and ends with the same file. A line counts for exactly one teacher,
one prompt and one way of asking (their hashes stand in it), so a changed prompt invalidates its
lines and no others; what a person wrote into ``generation`` is kept and used. Of two lines for one
answer the later one counts. Try it: ``mlx-slim distill tinyllm-openbookqa -o runs/try``, then edit
``runs/try/answers.jsonl``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import disk_errors, fsync, hash_bytes, json_lines
from mlx_slim.distillation.local_teacher import Message, Teacher, Unreadable
from mlx_slim.errors import SlimError
from mlx_slim.reading import parse_json

_DIGITS = 16  # of a hash in a line: enough to tell, short enough to read past
_REPEATED = 0.5  # below this share of distinct runs of words a text repeats itself
_RUN, _MIN_WORDS = 4, 32
_KEYS = ("id", "teacher", "generation", "stop_reason", "prompt_hash", "settings_hash")


@dataclass(frozen=True)
class TeacherRequest:
    """One question to a teacher.

    Attributes:
        id: Of the training row.
        messages: What the teacher reads.
        answer: The row's own answer, for whoever reads the file.
        place: Where the row stands: file and line.
    """

    id: str
    messages: list[Message]
    answer: str
    place: str


@dataclass(frozen=True)
class TeacherResponse:
    """One answer as it stands in the file.

    Attributes:
        id: Of the training row.
        generation: The text, edited or not.
        stop_reason: ``eos``, ``until`` or ``length``, as the teacher ended it.
        edited: A person changed the text.
    """

    id: str
    generation: str
    stop_reason: str
    edited: bool

    @property
    def trouble(self) -> str:
        """Why this is nothing to learn from; empty for a good answer.

        An edited text is only checked for being there.
        """
        if not self.generation.strip():
            return "empty"
        if self.edited:
            return ""
        if self.stop_reason == "length":
            return "cut at the longest answer"
        return "repeats itself" if _repeats(self.generation) else ""


def _repeats(text: str) -> bool:
    words = re.findall(r"\S+", text)
    if len(words) < _MIN_WORDS:
        return False
    runs = [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]
    return len(set(runs)) < _REPEATED * len(runs)


def short_hash(value: Any) -> str:
    """Return the first characters of the SHA-256 of a JSON value."""
    return hash_bytes(json.dumps(value, sort_keys=True).encode())[:_DIGITS]


class AnswerFile:
    """The lines of all teachers of a run.

    Args:
        path: The file; made with its first line.

    Raises:
        SlimError: A line that is no answer; file and line are named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        self._repair()
        for number, raw in json_lines(path) if path.exists() else ():
            if raw.strip():
                self._take(_parsed(path, number, raw))

    def _repair(self) -> None:
        """End the file with a whole line: drop what a kill left half-written."""
        if not self.path.exists():
            return
        with disk_errors(self.path), self.path.open("r+b") as handle:
            data = handle.read()
            start = data.rfind(b"\n") + 1
            last = data[start:]
            if not last:
                return
            try:
                parse_json(last, "")
                handle.write(b"\n")  # an editor that ends no last line
            except SlimError:
                handle.truncate(start)

    def _take(self, line: dict[str, Any]) -> None:
        key = (line["id"], line["teacher"], line["prompt_hash"], line["settings_hash"])
        self._lines[key] = line

    def find(self, teacher: Teacher, asked: TeacherRequest) -> TeacherResponse | None:
        """Return the answer of ``teacher`` to exactly this question, None if there is none."""
        line = self._lines.get(self._key(teacher, asked))
        if line is None:
            return None
        text = line["generation"]
        edited = line.get("generation_hash") != short_hash(text)
        return TeacherResponse(asked.id, text, line["stop_reason"], edited)

    @staticmethod
    def _key(teacher: Teacher, asked: TeacherRequest) -> tuple[str, str, str, str]:
        return (asked.id, teacher.name, short_hash(asked.messages), short_hash(teacher.settings))

    def append(self, teacher: Teacher, asked: TeacherRequest, text: str, stop_reason: str) -> None:
        """Write one answer to the end of the file, and to the disk."""
        _, name, prompt, settings = self._key(teacher, asked)
        text = text.encode("utf-8", "replace").decode()  # half a character cannot be written
        alone = len(asked.messages) == 1
        line = {
            "id": asked.id,
            "teacher": name,
            "prompt": asked.messages[0]["content"] if alone else asked.messages,
            "answer": asked.answer,
            "generation": text,
            "stop_reason": stop_reason,
            "prompt_hash": prompt,
            "settings_hash": settings,
            "generation_hash": short_hash(text),
        }
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as handle:
                handle.write(data)
                handle.flush()
                fsync(handle.fileno())
        self._take(json.loads(data))

    def collect(
        self,
        teacher: Teacher,
        questions: Sequence[TeacherRequest],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[TeacherResponse]:
        """Return the teacher's answer to every question, in order; ask what is not in the file.

        Questions go in chunks of the teacher's size that do not depend on what is answered already.
        Where one is missing, a teacher whose answers may depend on their neighbours (sums are
        rounded otherwise in another batch) answers its whole chunk again.

        Args:
            teacher: Asked only if an answer is missing.
            questions: All of them.
            progress: Hears (answered, all) after each chunk that was asked.

        Raises:
            SlimError: If a question cannot be read (its row is named), or is not answered.
        """
        for start in range(0, len(questions), teacher.chunk):
            chunk = questions[start : start + teacher.chunk]
            missing = [asked for asked in chunk if self.find(teacher, asked) is None]
            if not missing:
                continue
            again = list(chunk) if teacher.batch_dependent else missing
            answers = teacher.answer([asked.messages for asked in again])
            try:
                for asked, (text, reason) in zip(again, answers, strict=True):
                    if self.find(teacher, asked) is None:
                        self.append(teacher, asked, text, reason)
            except Unreadable as error:
                place = f"{again[error.index].place}, as {teacher.name} reads it"
                raise SlimError(f"{place}: {error.message}", error.hint) from error
            progress(start + len(chunk), len(questions))
        found = [self.find(teacher, asked) for asked in questions]
        return [written for written in found if written is not None]


def _parsed(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    where = f"{path}, line {number}"
    line = parse_json(raw, where)
    wrong = _KEYS if not isinstance(line, dict) else [
        key for key in _KEYS if not isinstance(line.get(key), str)
    ]  # fmt: skip
    if wrong:
        raise SlimError(
            f"{where}: no text under {', '.join(wrong)}", "mend the line, or remove it to ask again"
        )
    return line
