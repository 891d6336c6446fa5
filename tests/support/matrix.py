"""A matrix on disk without training anything: what the report reads, made of random answers.

Every file holds what the real steps would have written, so that all of it can be counted again.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import SCHEMA_VERSION, hash_bytes, hash_file, provenance, write_json
from mlx_slim.compare.measured import measured
from mlx_slim.compare.questions import stored_questions
from mlx_slim.compare.records import as_json
from mlx_slim.evaluation.figures import Summary
from mlx_slim.evaluation.jobs import definition_record
from mlx_slim.evaluation.results import Entry, Folder, encode, samples_name
from mlx_slim.evaluation.score import section, timing
from mlx_slim.evaluation.scoring.perplexity import read_texts, summarize_text
from mlx_slim.evaluation.tasks.metrics import record_choice, record_generation, summarize
from mlx_slim.evaluation.tasks.prompts import Question
from mlx_slim.evaluation.tasks.spec import find_task

ACCURACIES = {
    "base": 0.30,
    "quantized": 0.27,
    "full": 0.47,
    "lora": 0.45,
    "dora": 0.455,
    "qlora": 0.43,
}
WEIGHTS = "ab" * 32
TEXT = "A text that nothing was trained on. " * 30
CHOICES = [" one", " <script>alert(1)</script>", " three", " four"]
INTRUDERS = {
    "count": 3,
    "directions": 2100,
    "matrices": 210,
    "matrices_with": 2,
    "energy": 0.01,
    "relative_norm": 0.02,
    "effective_rank": 5.5,
    "k": 10,
    "epsilon": 0.5,
}


def write_matrix(
    folder: Path,
    *,
    models: int = 1,
    seeds: int = 1,
    questions: dict[str, int] | None = None,
    methods: tuple[str, ...] = ("base", "quantized", "full", "lora", "qlora", "dora", "fused"),
) -> Path:
    """Write a finished matrix: every file that ``mlx-slim report`` reads."""
    counts = questions or {"hellaswag": 200, "gsm8k": 20, "mmlu": 60}
    by_task = {task: _questions(task, count) for task, count in counts.items()}
    stored = folder / "questions"
    stored.mkdir(parents=True)
    for task, rows in by_task.items():
        lines = [json.dumps({**vars(q), "prompt": q.context}) for q in rows]
        (stored / f"{task}.jsonl").write_text("".join(line + "\n" for line in lines))
    (stored / "held_out.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    definitions = {
        task: {
            "part": None,
            "definition": find_task(task).spec.model_dump(mode="json", exclude_defaults=True),
        }
        for task in counts
    }
    write_json(stored / "tasks.json", definitions)
    names = []
    for index in range(models):
        for method in methods:
            trains = method not in ("base", "quantized")
            runs: list[int | None] = list(range(seeds)) if trains else [None]
            names += [_cell(folder, f"toy{index}", method, seed, by_task) for seed in runs]
    for method in ("lora", "qlora"):
        _sweep(folder, "toy0", method)
    write_json(
        folder / "matrix.json",
        {
            "schema_version": SCHEMA_VERSION,
            "name": "toy",
            "title": "A toy matrix",
            "note": "Random answers.",
            "models": {
                f"toy{i}": {
                    "source": "HuggingFaceTB/SmolLM2-135M-Instruct",
                    "revision": None,
                }
                for i in range(models)
            },
            "methods": list(methods),
            "tasks": list(counts),
            "cells": names,
            "refused": [["toy0-qlroa", "no method 'qlroa': did you mean 'qlora'?"]],
            "omitted": [{"model": "toy0", "method": "huge", "why": "does not fit"}],
            "asked": {
                **{task: _request(task, rows) for task, rows in by_task.items()},
                "held_out": {"text_sha256": read_texts(stored / "held_out.jsonl").sha256},
            },
            "questions_sha256": {f.stem: hash_file(f) for f in sorted(stored.glob("*.jsonl"))},
            "held_out": {"name": "text", "bytes": len(TEXT)},
            "provenance": {**provenance(), "machine": "a test, 2 cores"},
            "code": "0.1.0+abc",
        },
    )
    return folder


def _questions(task: str, count: int) -> list[Question]:
    subtasks = find_task(task).subtasks
    questions = []
    for i in range(count):
        is_text = task == "gsm8k"
        questions.append(
            Question(
                doc_id=i,
                subject=subtasks[i % len(subtasks)] if subtasks else None,
                context=f'Question {i} of {task}: <b>x</b> & "y"?',
                choices=() if is_text else tuple(CHOICES),
                lengths=() if is_text else (3, 25, 5, 4),
                target=f"So it is.\n#### {i}" if is_text else i % 4,
            )
        )
    return questions


def _request(task: str, questions: list[Question]) -> dict[str, Any]:
    shots = find_task(task).num_fewshot
    return definition_record(
        find_task(task), shots, len(questions), "0" * 64, "1" * 64 if shots else None
    )


def _cell(
    folder: Path, model: str, method: str, seed: int | None, by_task: dict[str, list[Question]]
) -> str:
    name = f"{model}-{method}" + ("" if seed is None else f"-s{seed}")
    cell = folder / "cells" / name
    kind = method if method in ("base", "quantized", "fused") else "tuned"
    draw = random.Random(name)
    for task, questions in by_task.items():
        answers = [_record(task, q, ACCURACIES.get(method, 0.43), draw) for q in questions]
        write_evaluation(cell / "eval" / task, task, _request(task, questions), answers)
    _text(folder, cell / "eval" / "held_out", draw)
    recipe = {
        "method": method if kind == "tuned" else "lora",
        "adapter": {"rank": 8},
        "quantize": {"bits": 4},
        "train": {
            "learning_rate": 1e-3 if method == "lora" else 2e-3,
            "seed": seed,
            "log_every": 1,
            "steps": 40,
        },
    }
    if kind == "tuned":
        _run(cell / "run", recipe, draw)
    if kind == "fused":
        effect = {"kl": 0.001, "top1": 0.99, "tokens": 512, "kept": 0.999}
        write_json(cell / "model" / "fuse.json", {"effect": effect})
    measurements = as_json(measured(cell))
    if measurements["train"]:
        measurements["train"]["predicted_seconds"] = 210.0
    write_json(
        cell / "cell.json",
        {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "model": model,
            "method": method,
            "kind": kind,
            "seed": seed,
            "parent": f"{model}-qlora-s{seed}" if kind == "fused" else None,
            "recipe": recipe,
            "dtype": "float32",
            "tasks": list(by_task),
            "disk": {"model": 270_000_000, "adapter": 9_000_000 if measurements["train"] else 0},
            **measurements,
            "intruders": INTRUDERS if kind == "tuned" else None,
            "keys": {},
            "weights_sha256": WEIGHTS,
            "code": "0.1.0+abc",
            "provenance": {**provenance(), "machine": "a test, 2 cores"},
        },
    )
    return name


def _run(run: Path, recipe: dict[str, Any], draw: random.Random) -> None:
    """Write what a training leaves: its events, its costs, its rows."""
    run.mkdir(parents=True)
    events: list[dict[str, Any]] = []
    steps = recipe["train"]["steps"]
    for step in range(1, steps + 1):
        loss = 2.5 / step**0.3 + draw.random() / 5
        events.append({"event": "step", "step": step, "loss": loss, "tokens": 400})
        if step % 20 == 0:
            events.append({"event": "validation", "step": step, "loss": 2.4 / step**0.3})
    done = {
        "step": steps,
        "reason": "steps",
        "tokens": 400 * steps,
        "seconds": 180.0 + draw.random() * 40,
        "peak_memory_bytes": int(1e9 * (1 + draw.random())),
        "best_validation": min(e["loss"] for e in events if e["event"] == "validation"),
    }
    events.append({"event": "done", **done})
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    result = {
        "done": done,
        "model": "toy",
        "artifact": "adapters",
        "trainable": 1000,
        "total": 50_000,
        "predicted_peak_bytes": int(1e9 * (1 + draw.random())),
    }
    write_json(run / "run.json", {"recipe": recipe, "result": result})
    source = {
        "rows_given": 100,
        "rows_used": 90,
        "rows_truncated": {"count": 4, "first": []},
        "rows_dropped": {"empty": {"count": 10, "first": []}},
    }
    totals = {"rows_given": 100, "rows_used": 90, "rows_truncated": 4, "rows_dropped": 10}
    write_json(run / "data_ledger.json", {"sources": [source], "totals": totals})


def write_evaluation(
    out: Path, task: str, request: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    """Write a finished evaluation with these answers."""
    _finish(out, task, request, summarize(find_task(task), records), records)


def answer(folder: Path, cell: str, task: str, right: int) -> None:
    """Let a cell of a written matrix get the first ``right`` questions of a task right, no more."""
    questions = stored_questions(folder / "questions", task)
    draw = random.Random(0)
    records = [_record(task, q, float(i < right), draw) for i, q in enumerate(questions)]
    out = folder / "cells" / cell / "eval" / task
    write_evaluation(out, task, _request(task, questions), records)


def _text(folder: Path, out: Path, draw: random.Random) -> None:
    texts = read_texts(folder / "questions" / "held_out.jsonl")
    records = [
        {"doc_id": 0, "window": i, "tokens": 90, "loglikelihood": -round(290 + draw.random(), 6)}
        for i in range(3)
    ]
    request = {"file": texts.name, "text_sha256": texts.sha256, "window": 512, "windows": 3}
    _finish(out, "perplexity", request, summarize_text(texts, records), records)


def _finish(
    out: Path,
    task: str,
    request: dict[str, Any],
    summary: Summary,
    records: list[dict[str, Any]],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    data = encode(records)
    samples = out / samples_name(task)
    samples.write_bytes(data)
    digest = hash_bytes(data)
    entries = [Entry(task, 0, len(data), digest, 900, 800, 0, 0, "", 20.0, int(8e8))]
    (out / "progress.jsonl").write_text(json.dumps(vars(entries[0])) + "\n")
    settings = {"schema_version": SCHEMA_VERSION, "model": "toy", "seed": 0, "max_length": 512}
    settings |= {"weights_sha256": WEIGHTS, "adapter_sha256": None}
    write_json(out / "eval.json", {**settings, "code": 1, "tasks": {task: request}})
    result = section(request, summary, entries, samples)
    results = {"tasks": {}, task: result} if task == "perplexity" else {"tasks": {task: result}}
    timings = {
        "schema_version": SCHEMA_VERSION,
        "ranks": 1,
        "tasks": {task: asdict(timing(entries))},
    }
    Folder(out).finish({**settings, **results}, timings)


def _record(task: str, question: Question, accuracy: float, draw: random.Random) -> dict[str, Any]:
    right = int(draw.random() < accuracy)
    if not question.choices:
        number = str(question.doc_id) if right else draw.choice(["none", "777"])
        text = f" so the answer is <i>{number}</i>\n#### {number}"
        return record_generation(
            find_task(task), question, text, draw.choice(["until", "length", "eos"])
        )
    scores = [round(-400 - 100 * draw.random(), 4) for _ in range(4)]
    target = int(question.target)
    scores[target if right else (target + 1) % 4] = -2.0
    return record_choice(find_task(task), question, scores, [False] * 4)


def _sweep(folder: Path, model: str, method: str) -> None:
    draw = random.Random(method)
    rates = []
    for rate in (1e-3, 2e-3):
        recipe = {
            "method": method,
            "quantize": {"bits": 4},
            "train": {"learning_rate": rate, "seed": 0, "log_every": 1, "steps": 20},
        }
        run = folder / "sweeps" / f"{model}-{method}" / f"{rate:g}"
        _run(run, recipe, draw)
        loss = json.loads((run / "run.json").read_text())["result"]["done"]["best_validation"]
        rates.append({"learning_rate": rate, "validation_loss": loss})
    write_json(
        folder / "sweeps" / f"{model}-{method}" / "sweep.json",
        {
            "schema_version": SCHEMA_VERSION,
            "model": model,
            "method": method,
            "steps": 20,
            "seed": 0,
            "rates": rates,
            "chosen": 1e-3,
        },
    )
