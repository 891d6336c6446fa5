"""Responses of teachers, one JSON line each: a cache that a person can read and edit.

Invariant: a line is on disk before the next response is waited for; a torn last line is repaired, a
resume requests only what is missing and ends with the same file. A line is valid for exactly one
teacher, one prompt and one set of generation settings (it stores their hashes), so a changed prompt
invalidates its lines and no others; a ``generation`` that a person edited is used. Of two lines for
one request the later one is valid. Try it: ``mlx-slim distill tinyllm-openbookqa -o runs/try``,
then edit ``runs/try/answers.jsonl``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import disk_errors, fsync, hash_bytes, json_lines
from mlx_slim.distillation.local_teacher import Teacher, UnreadableRequest
from mlx_slim.errors import SlimError
from mlx_slim.reading import ChatMessage, JsonObject, parse_json

_DIGITS = 16  # characters of a hash in a line: enough to differ, short enough to skip
_REPEATED = 0.5  # below this fraction of distinct runs of words a text repeats itself
_RUN, _MIN_WORDS = 4, 32
_KEYS = ("id", "teacher", "generation", "stop_reason", "prompt_hash", "settings_hash")


@dataclass(frozen=True)
class TeacherRequest:
    """One request to a teacher.

    Attributes:
        id: Of the training row.
        messages: What the teacher reads.
        answer: The row's own answer, for people who read the file.
        place: File and line of the row.
    """

    id: str
    messages: list[ChatMessage]
    answer: str
    place: str


@dataclass(frozen=True)
class TeacherResponse:
    """One response, as the file has it.

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
    def problem(self) -> str:
        """Why this cannot be learned from; empty if it can.

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
        path: The file; created with its first line.

    Raises:
        SlimError: A line that is no response; file and line are named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[tuple[str, str, str, str], JsonObject] = {}
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
                handle.write(b"\n")  # some editors write no newline at the end
            except SlimError:
                handle.truncate(start)

    def _take(self, line: JsonObject) -> None:
        key = (line["id"], line["teacher"], line["prompt_hash"], line["settings_hash"])
        self._lines[key] = line

    def find(self, teacher: Teacher, request: TeacherRequest) -> TeacherResponse | None:
        """Return the response of ``teacher`` to exactly this request, None if there is none."""
        line = self._lines.get(self._key(teacher, request))
        if line is None:
            return None
        text = line["generation"]
        edited = line.get("generation_hash") != short_hash(text)
        return TeacherResponse(request.id, text, line["stop_reason"], edited)

    @staticmethod
    def _key(teacher: Teacher, request: TeacherRequest) -> tuple[str, str, str, str]:
        prompt, settings = short_hash(request.messages), short_hash(teacher.settings)
        return (request.id, teacher.name, prompt, settings)

    def append(
        self, teacher: Teacher, request: TeacherRequest, text: str, stop_reason: str
    ) -> None:
        """Append one response to the file, flushed to the disk."""
        _, name, prompt, settings = self._key(teacher, request)
        text = text.encode("utf-8", "replace").decode()  # half a character cannot be written
        single = len(request.messages) == 1
        line = {
            "id": request.id,
            "teacher": name,
            "prompt": request.messages[0]["content"] if single else request.messages,
            "answer": request.answer,
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
        requests: Sequence[TeacherRequest],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[TeacherResponse]:
        """Return the response to every request, in order; request what is not in the file.

        Requests go in chunks of the teacher's size that do not depend on what is in the file. Where
        a response is missing, a teacher whose responses depend on the batch (another batch is
        rounded otherwise) answers its whole chunk again.

        Args:
            teacher: Called only if a response is missing.
            requests: All of them.
            progress: Hears (responses, requests) after each chunk that the teacher answered.

        Raises:
            SlimError: If the teacher cannot read a request (its row is named), or does not answer.
        """
        for start in range(0, len(requests), teacher.chunk):
            chunk = requests[start : start + teacher.chunk]
            missing = [request for request in chunk if self.find(teacher, request) is None]
            if not missing:
                continue
            again = list(chunk) if teacher.batch_dependent else missing
            responses = teacher.answer([request.messages for request in again])
            try:
                for request, (text, reason) in zip(again, responses, strict=True):
                    if self.find(teacher, request) is None:
                        self.append(teacher, request, text, reason)
            except UnreadableRequest as error:
                place = f"{again[error.index].place}, for teacher {teacher.name}"
                raise SlimError(f"{place}: {error.message}", error.hint) from error
            progress(start + len(chunk), len(requests))
        stored = [self.find(teacher, request) for request in requests]
        return [response for response in stored if response is not None]


def _parsed(path: Path, number: int, raw: bytes) -> JsonObject:
    where = f"{path}, line {number}"
    line = parse_json(raw, where)
    wrong = _KEYS if not isinstance(line, dict) else [
        key for key in _KEYS if not isinstance(line.get(key), str)
    ]  # fmt: skip
    if wrong:
        raise SlimError(
            f"{where} has no text for {', '.join(wrong)}",
            "correct the line, or remove it to request it again",
        )
    return line
