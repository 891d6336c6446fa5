"""A matrix on disk without training anything: what the report reads, made of random answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import SCHEMA_VERSION, hash_file, provenance, write_json

SHARES = {"base": 0.30, "quantized": 0.27, "full": 0.47, "lora": 0.45, "dora": 0.455, "qlora": 0.43}

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
    questions = questions or {"hellaswag": 200, "gsm8k": 20, "mmlu": 60}
    names = []
    for index in range(models):
        for method in methods:
            trains = method not in ("base", "quantized")
            runs: list[int | None] = list(range(seeds)) if trains else [None]
            names += [_cell(folder, f"toy{index}", method, seed, questions) for seed in runs]
    for task, count in questions.items():
        path = folder / "questions" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as handle:
            for i in range(count):
                row = {"doc_id": i, "prompt": f'Question {i} of {task}: <b>x</b> & "y"?'}
                if task != "gsm8k":
                    row["choices"] = [" one", " <script>alert(1)</script>", " three", " four"]
                    row["lengths"] = [3, 25, 5, 4]
                handle.write(json.dumps(row) + "\n")
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
            "tasks": list(questions),
            "cells": names,
            "refused": [["toy0-qlroa", "no method 'qlroa': did you mean 'qlora'?"]],
            "omitted": [{"model": "toy0", "method": "huge", "why": "does not fit"}],
            "held_out": {"name": "text", "bytes": 1000},
            "provenance": {**provenance(), "machine": "a test, 2 cores"},
            "code": "0.1.0+abc",
        },
    )
    return folder


def _cell(
    folder: Path, model: str, method: str, seed: int | None, questions: dict[str, int]
) -> str:
    name = f"{model}-{method}" + ("" if seed is None else f"-s{seed}")
    cell = folder / "cells" / name
    kind = method if method in ("base", "quantized", "fused") else "tuned"
    draw = random.Random(name)
    for task, count in questions.items():
        share = SHARES.get(method, 0.43)
        _evaluation(cell / "eval" / task, task, count, share, draw)
    train = None
    if kind == "tuned":
        way = method
        train = {
            "method": way,
            "bits": 4 if way == "qlora" else None,
            "trainable": 1000,
            "total": 50_000,
            "tokens": 16_000,
            "seconds": 200.0,
            "tokens_per_second": 80.0 + draw.random() * 20,
            "peak_memory_bytes": int(1e9 * (1 + draw.random())),
            "predicted_peak_bytes": int(1e9 * (1 + draw.random())),
            "predicted_seconds": 210.0,
            "steps": 40,
            "best_validation": 1.2,
        }
        (cell / "run").mkdir(parents=True)
        with (cell / "run" / "metrics.jsonl").open("w") as handle:
            for step in range(1, 41):
                loss = 2.5 / step**0.3 + draw.random() / 5
                handle.write(json.dumps({"event": "step", "step": step, "loss": loss}) + "\n")
                if step % 20 == 0:
                    record = {"event": "validation", "step": step, "loss": 2.4 / step**0.3}
                    handle.write(json.dumps(record) + "\n")
    recipe = {
        "method": method if kind == "tuned" else "lora",
        "adapter": {"rank": 8},
        "train": {"learning_rate": 1e-3 if method == "lora" else 2e-3, "seed": seed},
    }
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
            "learning_rate": recipe["train"]["learning_rate"] if kind == "tuned" else None,
            "train": train,
            "tasks": list(questions),
            "disk": {"model": 270_000_000, "adapter": 9_000_000 if train else 0},
            "bits_per_byte": 1.2 + draw.random() / 10,
            "eval_peak_memory_bytes": int(8e8),
            "eval_seconds": 60.0,
            "predicted": {"peak_bytes": int(9e8), "seconds": 80.0},
            "fidelity": {"kl": 0.001, "top1": 0.99, "tokens": 512} if kind == "fused" else None,
            "intruders": INTRUDERS if kind == "tuned" else None,
            "keys": {},
            "weights_sha256": "ab" * 32,
            "code": "0.1.0+abc",
            "provenance": {**provenance(), "machine": "a test, 2 cores"},
        },
    )
    return name


def _evaluation(out: Path, task: str, count: int, share: float, draw: random.Random) -> None:
    out.mkdir(parents=True)
    path = out / f"samples_{task}.jsonl"
    totals: dict[str, int] = {}
    with path.open("w") as handle:
        for i in range(count):
            record = _record(i, task, share, draw)
            for metric in ("acc", "acc_norm", "strict_match", "flexible_match"):
                if metric in record:
                    totals[metric] = totals.get(metric, 0) + record[metric]
            handle.write(json.dumps(record) + "\n")
    metrics = {}
    for metric, k in totals.items():
        value = k / count
        error = (value * (1 - value) / max(1, count - 1)) ** 0.5
        metrics[metric] = {"value": value, "stderr": error, "k": k}
    section = {
        "task_version": 1,
        "num_fewshot": 5 if task != "hellaswag" else 0,
        "limit": count,
        "rows_sha256": "0" * 64,
        "n": count,
        "metrics": metrics,
        "samples_sha256": hash_file(path),
    }
    write_json(
        out / "results.json", {"schema_version": 1, "model": "toy", "tasks": {task: section}}
    )


def _record(i: int, task: str, share: float, draw: random.Random) -> dict[str, Any]:
    right = int(draw.random() < share)
    if task == "gsm8k":
        found = str(i) if right else draw.choice(["[invalid]", "7"])
        return {
            "doc_id": i,
            "generation": f" so the answer is <i>{found}</i>\n#### {found}",
            "stop_reason": draw.choice(["until", "length", "eos"]),
            "strict": found,
            "flexible": found,
            "target": str(i),
            "strict_match": right,
            "flexible_match": right,
        }
    target = i % 4
    scores = [round(-40 - 10 * draw.random(), 4) for _ in range(4)]
    scores[target if right else (target + 1) % 4] = -20.0
    record = {
        "doc_id": i,
        "loglikelihoods": scores,
        "greedy": [False] * 4,
        "prediction": target if right else (target + 1) % 4,
        "target": target,
        "acc": right,
    }
    if task == "mmlu":
        return {**record, "subject": f"subject_{i % 57}"}
    return {**record, "acc_norm": right}


def _sweep(folder: Path, model: str, method: str) -> None:
    rates = [{"learning_rate": r, "validation_loss": v} for r, v in ((1e-3, 1.31), (2e-3, 1.27))]
    write_json(
        folder / "sweeps" / f"{model}-{method}" / "sweep.json",
        {
            "schema_version": SCHEMA_VERSION,
            "model": model,
            "method": method,
            "steps": 20,
            "seed": 0,
            "rates": rates,
            "chosen": 2e-3,
        },
    )
