"""Tasks and mirrors of the tests: small, written on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_slim.evaluation.tasks.spec import Task, find_task

CHOICE = """\
kind: multiple_choice
data: {path: rows.jsonl, shots: shots.jsonl}
prompt: "Q: {{ question }}\\nA:"
choices: "{{ options }}"
target: "{{ answer }}"
"""
GENERATION = """\
kind: generation
data: {path: rows.jsonl, shots: rows.jsonl}
prompt: "{{ prompt }}"
target: "{{ completion }}"
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_task(folder: Path, text: str, **rows: list[dict[str, Any]]) -> Task:
    """Write ``mine.yaml`` and its files (``rows=[...]`` is ``rows.jsonl``); return the task."""
    for name, content in rows.items():
        write_rows(folder / f"{name}.jsonl", content)
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return find_task(folder / "mine.yaml")


def quiz(number: int, answer: Any = 0) -> dict[str, Any]:
    return {"question": f"what is {number}?", "options": [f"n{number}", "x"], "answer": answer}


def mmlu_row(subject: str, number: int) -> dict[str, Any]:
    choices = [f"{letter}{number}" for letter in "abcd"]
    question = f" {subject} question {number} "
    return {"question": question, "subject": subject, "choices": choices, "answer": number % 4}
