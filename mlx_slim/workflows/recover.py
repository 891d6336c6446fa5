"""Prune, tune what was pruned, and say what came back: one run folder, resumable in every phase.

Invariant: a phase that is complete on disk is never done again: scores (``prune_scores``), the
pruned model (``model/``), the recovery (``recover/``, with its own checkpoints), the answers
(``scores/``); ``report.json`` is written last. All rows of the report are judged on the same text,
which the recovery was not trained on where its recipe holds rows back. Try it:
``mlx-slim prune MODEL -o DIR --ratio 0.2 --recover smollm2-lora``.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slim.adapters.store import load_adapter
from mlx_slim.analyze import fidelity
from mlx_slim.artifacts import (
    SCHEMA_VERSION,
    check_writable,
    first_missing,
    provenance,
    read_json,
    write_json,
)
from mlx_slim.config.load import COMMAND_LINE, Resolved, load_recipe
from mlx_slim.data.prepare import prepare
from mlx_slim.data.sources import find
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.evaluate.results import STATE_FILE as EVAL_STATE
from mlx_slim.events import Notice, Observer
from mlx_slim.models.load import load, load_tokenizer, read_config
from mlx_slim.quantize.calibration import DEFAULT_SOURCE, read_calibration
from mlx_slim.workflows import run_folder
from mlx_slim.workflows.checked_save import compute_dtype
from mlx_slim.workflows.eval_plan import EvalOptions, read_tasks
from mlx_slim.workflows.evaluate import evaluate
from mlx_slim.workflows.finetune import finetune
from mlx_slim.workflows.prune import RECORD_FILE, SCORES_FILE, held_out_rows, prune
from mlx_slim.workflows.prune_plan import PruneOptions, plan
from mlx_slim.workflows.prune_report import add_recovery, task_figures

STATE_FILE, REPORT_FILE = "request.json", "report.json"
MODEL, RECOVER, SCORES = "model", "recover", "scores"


@dataclass(frozen=True)
class RecoverOptions:
    """What happens after pruning.

    Attributes:
        recipe: Name or file of the recipe that tunes the pruned model; None only scores.
        overrides: ``key=value`` for it.
        tasks: Names of tasks and suites to score before, after pruning and after recovery.
        limit: First rows of a task.
        data_dir: Data mirror of the tasks.
    """

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    data_dir: Path | None = None


def recovery_recipe(after: RecoverOptions, pruned: Path) -> Resolved | None:
    """Return the recipe that tunes the model in ``pruned``; None without one.

    Raises:
        SlimError: If the recipe or an override is wrong, or names another model.
    """
    if after.recipe is None:
        if after.overrides:
            raise SlimError(
                f"{after.overrides[0]!r} is for a recipe, and none is given",
                "give --recover RECIPE",
            )
        return None
    if any(text.partition("=")[0] in ("model", "revision") for text in after.overrides):
        raise SlimError(
            f"model ({COMMAND_LINE}): the recovery tunes the pruned model", "leave it out"
        )
    wanted = [*after.overrides, f"model={pruned}", "revision=null"]
    return load_recipe(after.recipe, wanted)


def run_recovery(resolved: Resolved, out: Path, observer: Observer, *, resume: bool) -> Path:
    """Tune the pruned model as ``resolved`` says; return the adapter's or the model's folder.

    Raises:
        SlimError, ResourceError, Interrupted: As ``finetune``.
    """
    result = finetune(resolved, out, observer=observer, resume=resume)
    return out / result.artifact


def prune_and_recover(
    source: str | Path,
    out: Path,
    options: PruneOptions,
    after: RecoverOptions,
    observer: Observer,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Prune ``source``, recover and score it in the run folder ``out``; return ``report.json``.

    Args:
        source: Dense model, folder or hub id.
        out: The run folder; must be new unless ``resume``.
        options: What to remove.
        after: How to go on.
        observer: Hears of every event.
        resume: Go on with a folder that was started with the same pruning.

    Raises:
        SlimError: Whatever is wrong with the input, before any weight is read.
        ResourceError: Not enough memory or disk.
        Interrupted: Ctrl-C; what is complete stays.
    """
    started = _claim(out, source, options, resume)
    if (out / REPORT_FILE).exists():
        observer.notify(Notice(f"{out} is complete: nothing to do"))
        return read_json(out / REPORT_FILE)
    resolved = recovery_recipe(after, out / MODEL)
    if resolved is not None:
        for data in resolved.recipe.data.sources:
            find(data)
    if after.tasks:
        read_tasks(list(after.tasks), EvalOptions(limit=after.limit, data_dir=after.data_dir))
    plan(read_config(source, options.revision), options, 2)
    try:
        record = _pruned(source, out, options, observer, started)
        tuned = None
        if resolved is not None:
            with _mended(out / RECOVER, run_folder.STATE_FILE) as begun:
                observer.notify(Notice(f"recovering with {resolved.name}"))
                tuned = run_recovery(resolved, out / RECOVER, observer, resume=begun)
        report = _report(source, out, options, after, record, resolved, tuned, observer)
    except Interrupted as stop:
        command = resume_command(source, out, options, after)
        raise Interrupted(stop.message, f"resume with: {command}") from stop
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"stopped; what is complete is kept in {out}",
            f"resume with: {resume_command(source, out, options, after)}",
        ) from stop
    write_json(out / REPORT_FILE, report)
    return report


def _claim(out: Path, source: str | Path, options: PruneOptions, resume: bool) -> bool:
    """Return whether ``out`` was started; refuse what would lose or mix runs."""
    if out.exists() and not out.is_dir():
        raise SlimError(f"{out} is a file", "choose a folder for the run")
    check_writable(out)
    if not out.exists() or not any(out.iterdir()):
        if resume:
            raise SlimError(f"{out} holds no run to resume", "start it without --resume")
        return False
    if not (out / STATE_FILE).exists():
        raise SlimError(f"{out} is not empty and holds no run", "choose another output folder")
    if not resume:
        raise SlimError(
            f"{out} holds a run already", "go on with --resume, or choose another output folder"
        )
    old, new = read_json(out / STATE_FILE), _request(source, options)
    changed = [
        f"{key}: {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise SlimError(
            f"{out} was started with another pruning: {'; '.join(changed)}",
            "resume with the same values, or start a new run",
        )
    return True


def _request(source: str | Path, options: PruneOptions) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "source": str(source), **asdict(options)}


def _pruned(
    source: str | Path, out: Path, options: PruneOptions, observer: Observer, started: bool
) -> dict[str, Any]:
    """Return ``prune.json``; prune where that was not done yet."""
    if (out / MODEL / RECORD_FILE).exists():
        observer.notify(Notice(f"{out / MODEL} is pruned already"))
        record = read_json(out / MODEL / RECORD_FILE)
    else:
        made = None if started else first_missing(out)
        if not started:
            write_json(out / STATE_FILE, _request(source, options))
        try:
            result = prune(source, out / MODEL, options, observer, scores_at=out / SCORES_FILE)
        except SlimError:
            if not started:  # bad input leaves nothing behind
                (out / STATE_FILE).unlink(missing_ok=True)
                if made is not None:
                    shutil.rmtree(made, ignore_errors=True)
            raise
        record = result.record
        for line in result.lines():
            observer.notify(Notice(line))
    write_json(out / RECORD_FILE, record)
    return record


@contextlib.contextmanager
def _mended(folder: Path, state: str):
    """Yield whether ``folder`` holds a start of its own; what was killed before that is removed."""
    begun = (folder / state).exists()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    yield begun


# ----------------------------------------------------------------------------------------- report


def _report(
    source: str | Path,
    out: Path,
    options: PruneOptions,
    after: RecoverOptions,
    record: dict[str, Any],
    resolved: Resolved | None,
    tuned: Path | None,
    observer: Observer,
) -> dict[str, Any]:
    """Judge the original, the pruned and the recovered model on the same text and tasks."""
    adapter = tuned if tuned is not None and tuned.name == "adapters" else None
    full = tuned if adapter is None else None
    models: dict[str, tuple[str, Path | None]] = {
        "original": (str(source), None),
        "pruned": (str(out / MODEL), None),
    }
    if tuned is not None:
        models["recovered"] = (str(full or out / MODEL), adapter)
    judged_NT, text = _judged_rows(out, options, resolved, observer)
    rows: list[dict[str, Any]] = []
    for name, (model, worn) in models.items():
        pruned = name != "original"
        rows.append(
            {
                "name": name,
                "parameters": record["parameters_after" if pruned else "parameters_before"],
                "bytes": record["bytes_after" if pruned else "bytes_before"] + _bytes_of(worn),
                "adapter_parameters": _parameters_of(worn),
                "tasks": _scored(out / SCORES / name, model, worn, options, after, observer, name),
            }
        )
    if judged_NT is not None:
        observer.notify(Notice(f"comparing on {judged_NT.size:,} held-out tokens: {text}"))
        _judge(rows, models, judged_NT, options)
    add_recovery(rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "source": str(source),
        "prune": {key: record[key] for key in ("axis", "method", "calibration", "options")},
        "recipe": None if resolved is None else resolved.recipe.model_dump(mode="json"),
        "held_out": {"text": text, "tokens": 0 if judged_NT is None else judged_NT.size},
        "limit": after.limit,
        "rows": rows,
        "provenance": provenance(),
    }


def _judged_rows(
    out: Path, options: PruneOptions, resolved: Resolved | None, observer: Observer
) -> tuple[mx.array | None, str]:
    """Return token ids (N, T) and what they are: the recipe's validation rows, if it has any."""
    tokenizer = load_tokenizer(out / MODEL)
    if resolved is not None:
        recipe = resolved.recipe
        data = prepare(
            recipe.data,
            tokenizer,
            max_length=recipe.train.max_length,
            seed=recipe.train.seed,
            folder=out / RECOVER,
            unchanged=True,
        )
        store = data.validation
        if store is not None:
            ids = np.concatenate([store.row(i)[0] for i in range(len(store))])[: options.held_out]
            return held_out_rows(mx.array(ids.astype(np.int32))), "the recipe's validation rows"
        observer.notify(
            Notice(
                "the recipe holds no rows back (data.validation=0): perplexity is that of "
                "calibration text, which it may have been trained on",
                "warning",
            )
        )
    try:
        found = read_calibration(
            options.calibration or DEFAULT_SOURCE,
            tokenizer,
            length=64,
            seen=0,
            held_out=max(1, options.held_out // 64),
        )
    except SlimError as error:
        observer.notify(Notice(f"no held-out text: {error.message}", "warning"))
        return None, "none"
    return held_out_rows(found.held_out_NT.reshape(-1)), "calibration text"


def _bytes_of(adapter: Path | None) -> int:
    files = [] if adapter is None else adapter.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _parameters_of(adapter: Path | None) -> int:
    if adapter is None:
        return 0
    from mlx_slim.artifacts import load_tensors

    return sum(value.size for value in load_tensors(adapter / "adapters.safetensors").values())


def _scored(
    folder: Path,
    model: str,
    adapter: Path | None,
    options: PruneOptions,
    after: RecoverOptions,
    observer: Observer,
    name: str,
) -> dict[str, Any]:
    """Return each task's figures of one model; nothing without tasks."""
    if not after.tasks:
        return {}
    wanted = EvalOptions(
        adapter=adapter,
        limit=after.limit,
        data_dir=after.data_dir,
        revision=options.revision if name == "original" else None,
    )
    with _mended(folder, EVAL_STATE) as begun:
        (results,) = evaluate(
            model, list(after.tasks), folder, wanted, resume=begun, observer=observer
        )
    return task_figures(results, folder)


def _judge(
    rows: list[dict[str, Any]],
    models: dict[str, tuple[str, Path | None]],
    judged_NT: mx.array,
    options: PruneOptions,
) -> None:
    """Add perplexity and distance from the original to each row; two models at a time."""
    dense = load(models["original"][0], revision=options.revision, dtype=compute_dtype()).model
    dense.eval()
    for row in rows:
        model, adapter = models[row["name"]]
        other: Callable[..., Any] = dense
        if row["name"] != "original":
            loaded = load(model, dtype=compute_dtype()).model
            if adapter is not None:
                load_adapter(loaded, adapter)
            loaded.eval()
            other = loaded
        found = fidelity.compare(dense, other, judged_NT)
        row["perplexity"] = math.exp(min(found.nll_model, 700.0))
        row["kl"], row["top1"] = found.kl, found.top1


def resume_command(
    source: str | Path, out: Path, options: PruneOptions, after: RecoverOptions
) -> str:
    """Return the command that goes on with a run, with the options it was started with."""
    words = ["mlx-slim", "prune", str(source)]
    for field in fields(options):
        value, flag = getattr(options, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    words += [] if after.recipe is None else ["--recover", after.recipe]
    for name in after.tasks:
        words += ["--task", name]
    words += [] if after.limit is None else ["--limit", str(after.limit)]
    words += [] if after.data_dir is None else ["--data-dir", str(after.data_dir)]
    return shlex.join([*words, *after.overrides, "-o", str(out), "--resume"])
