"""Every number of a cell, computed again from the lowest level that is stored.

Invariant: a level is checked against the one below it and nothing else. Log-likelihoods and texts
give each answer's marks; those give k, accuracies, macro F1, groups, standard errors; nats and
bytes give bits per byte; chunks give tokens and seconds; the events of training give what it cost.
A change that was made consistently to all of the files is not detected.
Used by ``compare/verify.py``.

    questions/<task>.jsonl, tasks.json                 the questions, the right answers
      samples_<task>.jsonl, progress.jsonl, eval.json  the model's answers, chunk by chunk
        eval/<task>/results.json, timings.json         figures over it
    run/metrics.jsonl → run/run.json                   training, event by event
          cells/<name>/cell.json                       the manifest
            results.json, report.md, report.html       what is published
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_slim.adapters.store import adapter_hash
from mlx_slim.artifacts import hash_file, read_records
from mlx_slim.compare.jobs import adapters, rounded_name, whole
from mlx_slim.compare.matrix import MatrixSpec, expand
from mlx_slim.compare.measured import measured
from mlx_slim.compare.questions import stored_questions, stored_task
from mlx_slim.compare.records import FORGETTING, MatrixRecord, SweepRecord, as_json
from mlx_slim.compare.store import StoredCell, StoredMatrix
from mlx_slim.config.aliases import MATRIX, rename
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.figures import Summary
from mlx_slim.evaluation.records import TEXT
from mlx_slim.evaluation.results import (
    PROGRESS_FILE,
    STATE_FILE,
    load_results,
    samples_name,
    whole_chunks,
)
from mlx_slim.evaluation.score import section, timing, told
from mlx_slim.evaluation.scoring.perplexity import read_texts, summarize_text
from mlx_slim.evaluation.tasks.metrics import record_choice, record_generation, summarize
from mlx_slim.evaluation.tasks.prompts import Question
from mlx_slim.evaluation.tasks.spec import Task
from mlx_slim.models.load import model_hash
from mlx_slim.reading import JsonObject, read_object

_NEAR = 1e-9
# Keys of the recipe that the manifest takes from the matrix, without paths of this machine.
_PLACES = ("model", "revision", "distill", "memory")


class Ledger:
    """What was compared: how many numbers agree, and a line for each that does not."""

    def __init__(self) -> None:
        self.numbers = 0
        self.problems: list[str] = []

    def compare(self, path: str, claimed: Any, again: Any) -> None:
        """Compare two JSON values, number by number."""
        if isinstance(claimed, dict) and isinstance(again, dict):
            self.problems += [f"{path}.{key}: missing" for key in claimed.keys() ^ again.keys()]
            for key in claimed.keys() & again.keys():
                self.compare(f"{path}.{key}", claimed[key], again[key])
            return
        if isinstance(claimed, list) and isinstance(again, list):
            if len(claimed) != len(again):
                self.problems.append(f"{path}: {len(claimed)} published, {len(again)} found")
            for index, (a, b) in enumerate(zip(claimed, again, strict=False)):
                self.compare(f"{path}[{index}]", a, b)
            return
        if isinstance(claimed, (int, float)) and isinstance(again, (int, float)):
            near = float in (type(claimed), type(again)) and bool not in (
                type(claimed),
                type(again),
            )
            if near and math.isclose(claimed, again, rel_tol=_NEAR):
                self.numbers += 1
                return
            if type(claimed) is type(again) and claimed == again:
                self.numbers += 1
                return
        elif claimed == again:
            return
        self.problems.append(f"{path}: {_short(claimed)} published, {_short(again)} found")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def recount(stored: StoredMatrix, ledger: Ledger) -> None:
    """Check everything below the manifests, and the manifests, into ``ledger``."""
    folder = stored.folder / "questions"
    for name, digest in stored.record.questions_sha256.items():
        if not (file := folder / f"{name}.jsonl").is_file() or hash_file(file) != digest:
            ledger.problems.append(f"{file} was changed: its hash is not the one in matrix.json")
    with _noted(ledger):
        ledger.problems += _dropped(stored.record)
    requests = stored.record.requests or {}
    forgetting = stored.record.forgetting
    if forgetting is not None:
        with _noted(ledger):
            texts = read_texts(folder / f"{FORGETTING}.jsonl")
            ledger.compare(f"matrix.json.{FORGETTING}.bytes", forgetting.bytes, texts.size)
    for cell in stored.cells:
        for task in cell.record.tasks:
            with _noted(ledger):
                _task(ledger, cell, task, folder, requests.get(task))
        if forgetting is not None:
            with _noted(ledger):
                _text(ledger, cell, folder, requests.get(FORGETTING))
        with _noted(ledger):
            _answered(ledger, stored.folder, cell)
        with _noted(ledger):
            _manifest(ledger, cell)
    for sweep in stored.sweeps:
        with _noted(ledger):
            _sweep(ledger, stored.folder, sweep)


def _dropped(record: MatrixRecord) -> Iterator[str]:
    """Yield a line for each cell of the matrix that its list of cells lacks."""
    if record.matrix is None:
        return
    values, _ = rename(record.matrix, MATRIX)  # of version 0.1
    layout = expand(MatrixSpec.model_validate(values), record.name)
    listed = {*record.cells, *(name for name, _ in record.refused)}
    left_out = [f"{entry.model}-{entry.method}" for entry in record.omitted]
    for name in (*(cell.name for cell in layout.cells), *(name for name, _ in layout.refused)):
        if name not in listed and not any(
            name == pair or name.startswith(f"{pair}-s") for pair in left_out
        ):
            yield f"matrix.json.cells: {name} is missing, though it is part of the matrix"


@contextlib.contextmanager
def _noted(ledger: Ledger) -> Iterator[None]:
    """Record the error of a missing or damaged file as a problem."""
    try:
        yield
    except SlimError as error:
        ledger.problems.append(error.message)
    except OSError as error:
        ledger.problems.append(f"{error.filename}: {error.strerror}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        ledger.problems.append(f"a file was changed after it was written: {error!r}")


# ------------------------------------------------------------------------------------ evaluations


def _task(
    ledger: Ledger, cell: StoredCell, name: str, folder: Path, request: JsonObject | None
) -> None:
    out, where = cell.folder / "eval" / name, f"{cell.name} {name}"
    published = load_results(out).tasks[name]
    records = list(read_records(out / samples_name(name)))
    task = stored_task(folder, name, published.questions.definition_sha256)
    questions = stored_questions(folder, name)
    if len(questions) != len(records):
        ledger.problems.append(f"{where}: {len(records)} answers to {len(questions)} questions")
    for question, record in zip(questions, records, strict=False):
        place = f"{where}, question {question.doc_id}"
        ledger.compare(place, record, _record(task, question, record))
    _evaluation(ledger, out, name, where, summarize(task, records))
    _same_request(ledger, where, published.compared(), request)


def _record(task: Task, question: Question, record: JsonObject) -> JsonObject:
    """Return a record computed again from the model's output."""
    if task.kind == "generation":
        return record_generation(task, question, record["generation"], record["stop_reason"])
    return record_choice(task, question, record["loglikelihoods"], record["greedy"])


def _text(ledger: Ledger, cell: StoredCell, folder: Path, request: JsonObject | None) -> None:
    out, where = cell.folder / "eval" / FORGETTING, f"{cell.name} {FORGETTING}"
    texts = read_texts(folder / f"{FORGETTING}.jsonl")
    records = list(read_records(out / samples_name(TEXT)))
    published = load_results(out).text
    if published is None:
        raise SlimError(f"{out} has no results for the text of forgetting")
    windows = [record["window"] for record in records]
    documents = [record["doc_id"] for record in records]
    ledger.compare(f"{where} windows", windows, list(range(published.windows or 0)))
    order = sorted({*documents, *range(len(texts.documents))})
    ledger.compare(f"{where} documents", sorted(set(documents)), order)
    ledger.compare(f"{where} text_sha256", published.text_sha256, texts.sha256)
    _evaluation(ledger, out, TEXT, where, summarize_text(texts, records))
    _same_request(ledger, where, published.compared(), request)


def _evaluation(ledger: Ledger, out: Path, name: str, where: str, summary: Summary) -> None:
    """Check ``results.json`` and ``timings.json`` of one evaluation."""
    results, state = read_object(out / "results.json"), read_object(out / STATE_FILE)
    chunks, length = whole_chunks(out)
    entries, samples = chunks.get(name, []), out / samples_name(name)
    whole = (out / PROGRESS_FILE).stat().st_size == length
    if not whole or not entries or entries[-1].end != samples.stat().st_size:
        ledger.problems.append(f"{where}: {samples.name} is not what was written chunk by chunk")
        return
    again = json.loads(json.dumps(section(state["tasks"][name], summary, entries, samples)))
    sections = {**results["tasks"], **({TEXT: results[TEXT]} if TEXT in results else {})}
    published = {key: value for key, value in sections[name].items() if key != "trained_on"}
    ledger.compare(where, published, again)
    reported = {key: value for key, value in results.items() if key not in ("tasks", TEXT)}
    ledger.compare(f"{where} settings", reported, told(state))
    timings = read_object(out / "timings.json")["tasks"]
    ledger.compare(f"{where} timings", timings, {name: asdict(timing(entries))})


def _same_request(
    ledger: Ledger, where: str, published: JsonObject, request: JsonObject | None
) -> None:
    """Check that the request of a cell is the matrix's."""
    if request is None:
        ledger.problems.append(f"{where}: matrix.json does not record the request")
        return
    ledger.compare(f"{where} request", {key: published.get(key) for key in request}, request)


def _answered(ledger: Ledger, folder: Path, cell: StoredCell) -> None:
    """Check that the cell's own model gave its answers: those of another cell are refused."""
    weights, adapter = _hashes(folder, cell)
    names = [*cell.record.tasks]
    names += [FORGETTING] if (cell.folder / "eval" / FORGETTING).is_dir() else []
    for name in names:
        results, where = load_results(cell.folder / "eval" / name), f"{cell.name} {name}"
        if weights is not None:
            ledger.compare(f"{where} weights_sha256", results.weights_sha256, weights)
        if adapter is not None:
            ledger.compare(f"{where} adapter_sha256", results.adapter_sha256, adapter or None)


def _hashes(folder: Path, cell: StoredCell) -> tuple[str | None, str | None]:
    """Return the hashes of a cell's model and of its adapter; None where the files are gone.

    The second is empty where the model answers without an adapter.
    """
    record, parent = cell.record, cell.record.parent
    if cell.kind in ("fused", "pruned") or whole(cell.folder) is not None:
        return _hash(whole(cell.folder)), ""
    tuned = cell.kind == "tuned"
    place = adapters(cell.folder)
    adapter = (adapter_hash(place) if place.is_dir() else None) if tuned else ""
    if cell.kind == "quantized" or (tuned and record.recipe["method"] == "qlora"):
        quantize = record.recipe["quantize"]
        keys = ("bits", "group_size", "mode")
        name = rounded_name(parent or record.model, *(quantize[key] for key in keys))
        return _hash(folder / "models" / name), adapter
    if parent is None:
        return record.weights_sha256, adapter
    return _hash(whole(folder / "cells" / parent)), adapter


def _hash(model: Path | None) -> str | None:
    return model_hash(model) if model is not None and model.is_dir() else None


# ------------------------------------------------------------------------------------- manifests


def _manifest(ledger: Ledger, cell: StoredCell) -> None:
    """Check ``cell.json`` against the files of the cell's steps."""
    record, again = cell.record, as_json(measured(cell.folder))
    published = {key: value for key, value in as_json(record).items() if key in again}
    for values in (published, again):  # predicted from the current speed, which no file stores
        if values["train"] is not None:
            del values["train"]["predicted_seconds"]
    ledger.compare(f"{cell.name}", published, json.loads(json.dumps(again)))
    sizes = {"model": whole(cell.folder), "adapter": adapters(cell.folder)}
    for part, place in sizes.items():
        if place is not None and place.is_dir():
            size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
            ledger.compare(f"{cell.name}.disk.{part}", getattr(record.disk, part), size)
    if cell.kind == "tuned":
        _run(ledger, cell.name, cell.folder / "run")
        recipe = read_object(cell.folder / "run" / "run.json")["recipe"]
        recipes = [
            {key: value for key, value in values.items() if key not in _PLACES}
            for values in (record.recipe, recipe)
        ]
        ledger.compare(f"{cell.name}.recipe", *recipes)


def _run(ledger: Ledger, where: str, run: Path) -> None:
    """Check what a training cost against its events."""
    record = read_object(run / "run.json")
    events = list(read_records(run / "metrics.jsonl"))
    (done,) = [event for event in events if event["event"] == "done"]
    result = record["result"]["done"]
    ledger.compare(f"{where} run", result, {key: done.get(key) for key in result})
    steps = [event for event in events if event["event"] == "step"]
    if record["recipe"]["train"]["log_every"] == 1:
        tokens = sum(event["tokens"] for event in steps)
        ledger.compare(f"{where} run tokens", result["tokens"], tokens)
    losses = [event["loss"] for event in events if event["event"] == "validation"]
    ledger.compare(f"{where} best validation", result["best_validation"], min(losses, default=None))
    ledger.compare(f"{where} rows", *_rows(read_object(run / "data_ledger.json")))


def _rows(record: JsonObject) -> tuple[dict[str, int], dict[str, int]]:
    """Return the published counts of rows, and the sums over the sources."""
    sources = record["sources"]
    sums = {
        "rows_given": sum(source["rows_given"] for source in sources),
        "rows_used": sum(source["rows_used"] for source in sources),
        "rows_truncated": sum(source["rows_truncated"]["count"] for source in sources),
        "rows_dropped": sum(t["count"] for s in sources for t in s["rows_dropped"].values()),
    }
    return {key: record["totals"][key] for key in sums}, sums


def _sweep(ledger: Ledger, folder: Path, sweep: SweepRecord) -> None:
    """Check a sweep against its runs, and its choice against its losses."""
    name = f"{sweep.model}-{sweep.method}"
    for tried in sweep.rates:
        rate, loss = tried.learning_rate, tried.validation_loss
        run = folder / "sweeps" / name / f"{rate:g}"
        if loss is not None:
            _run(ledger, f"sweep {name} {rate:g}", run)
            done = read_object(run / "run.json")
            ledger.compare(
                f"sweep {name} {rate:g}", loss, done["result"]["done"]["best_validation"]
            )
            trained = done["recipe"]["train"]
            ledger.compare(f"sweep {name} rate", rate, trained["learning_rate"])
            ledger.compare(f"sweep {name} seed", sweep.seed, trained["seed"])
            if not isinstance(sweep.steps, str):
                ledger.compare(f"sweep {name} steps", sweep.steps, trained["steps"])
    losses = {r.learning_rate: r.validation_loss for r in sweep.rates}
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    ledger.compare(f"sweep {name} chosen", sweep.chosen, min(finite, key=lambda r: finite[r]))


def differing_texts(folder: Path, rendered: dict[str, str]) -> Iterator[str]:
    """Yield a line for each page that is not what the stored results give."""
    for name, text in rendered.items():
        file = folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            yield f"{name} differs from what the stored answers give"
