"""Small evaluations for tests: tasks of one's own, and processes that kill themselves."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import yaml

from mlx_slim.evaluation.results import read_samples
from mlx_slim.evaluation.scoring.plain import plain_score
from mlx_slim.evaluation.scoring.requests import RequestEncoder
from mlx_slim.evaluation.tasks.prompts import build_questions
from mlx_slim.evaluation.tasks.rows import load_rows
from mlx_slim.evaluation.tasks.spec import find_task
from tests.support.runs import run_script

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
CHUNK = 8  # questions of a chunk in these tests: several chunks without many questions


def write_tasks(folder: Path, questions: int = 24) -> tuple[Path, Path, Path]:
    """Write a multiple-choice task with parts, a generation task and a text; return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "part": ["one", "two"][i * 3 // (2 * questions)],
            "question": f"{i} {' '.join(WORDS[: 1 + i % 5])}?",
            "choices": [WORDS[(i + j) % 10] for j in range(2 + i % 3)],
            "answer": i % 2,
            "text": WORDS[i % 10],
        }
        for i in range(questions)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = {
        "kind": "multiple_choice",
        "data": {"path": "rows.jsonl", "shots": "rows.jsonl"},
        "fields": {"question": "text", "choices": "texts", "answer": "integer"},
        "description": "Questions and answers about {{ part }}.\n\n",
        "prompt": "Question: {{ question }}\nAnswer:",
        "choices": "{{ choices }}",
        "target": "{{ answer }}",
        "subgroups": {"field": "part", "categories": {"all": ["one", "two"]}},
    }
    generation = {
        "kind": "generation",
        "data": {"path": "rows.jsonl"},
        "prompt": "Say {{ question }}:",
        "target": "{{ text }}",
        "until": ["\n", "a"],
        "max_tokens": 12,
    }
    (folder / "toy_choice.yaml").write_text(yaml.safe_dump(choice))
    (folder / "toy_answer.yaml").write_text(yaml.safe_dump(generation))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return folder / "toy_choice.yaml", folder / "toy_answer.yaml", folder / "text.txt"


# Scores like the command line, with small chunks, and kills itself where it is told to.
SCORE = """
import os, signal, sys
from pathlib import Path
import mlx_slim
from mlx_slim.evaluation import jobs, results
from mlx_slim.evaluation.scoring import perplexity
from mlx_slim.evaluation.run import EvalOptions, evaluate

model, tasks, text, out, chunk, moment, count, resume = sys.argv[1:9]
jobs.CHOICE_CHUNK = jobs.GENERATION_CHUNK = int(chunk)
perplexity.WINDOWS = 2
calls = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

append = results.Folder.append

def killing(self, task, data, **measured):
    calls.append(task)
    if len(calls) == int(count):
        if moment == "samples":  # half of the chunk's samples, to the middle of a line
            with open(self.path / results.samples_name(task), "ab") as handle:
                handle.write(data[: len(data) // 2])
            die()
        if moment == "progress":  # the samples are whole, the line that counts them is not
            def half(path):
                with open(path, "ab") as handle:
                    handle.write(b'{"task": "toy_choi')
                die()
            real_open = Path.open
            def opened(path, *words, **options):
                if path.name == results.PROGRESS_FILE:
                    half(path)
                return real_open(path, *words, **options)
            Path.open = opened
    return append(self, task, data, **measured)

results.Folder.append = killing
options = EvalOptions(perplexity=Path(text), num_fewshot=None)
evaluate(model, tasks, Path(out), options, resume=resume == "1")
"""


def score_in_process(
    model: Path,
    tasks: list[Path],
    text: Path,
    out: Path,
    *,
    moment: str = "",
    count: int = 0,
    resume: bool = False,
    ranks: int = 1,
) -> None:
    """Score in a process of its own, or in several ranks; with ``moment`` it must die there."""
    names = ",".join(map(str, tasks))
    words = [model, names, text, out, CHUNK, moment, count, int(resume)]
    done = run_script(SCORE, *words, ranks=ranks)
    expected = -signal.SIGKILL if moment else 0
    assert done.returncode == expected, done.stdout + done.stderr


def result_files(out: Path) -> dict[str, bytes]:
    """Return the samples of a folder by name, and ``results.json`` without its seconds."""
    contents = {path.name: path.read_bytes() for path in sorted(out.glob("samples_*.jsonl"))}
    results = json.loads((out / "results.json").read_text())
    for section in [*results["tasks"].values(), results.get("perplexity", {})]:
        section.pop("seconds", None)
    return {**contents, "results.json": json.dumps(results).encode()}


def samples_of(out: Path, task: str) -> list[dict]:
    return read_samples(out / f"samples_{task}.jsonl")


def differences(out: Path, loaded: Any, tasks: Any) -> list[str]:
    """Return where the choices scored in ``out`` are over 1e-3 nats from the plain scorer."""
    task = find_task(str(tasks[0]))
    questions = build_questions(task, load_rows(task), 0)
    encoder = RequestEncoder(loaded.tokenizer, 512)
    samples = samples_of(out, "toy_choice")
    offences = []
    for question, sample in list(zip(questions, samples, strict=True))[::7]:
        for choice, value in zip(question.choices, sample["loglikelihoods"], strict=True):
            request = encoder.request(question.context, choice)
            expected, _ = plain_score(loaded.model, request.ids, request.start)
            if sample["doc_id"] != question.doc_id or not abs(value - expected) <= 1e-3:
                offences.append(f"{question.doc_id}{choice}: {value}, expected {expected}")
    return offences
