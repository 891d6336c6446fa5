"""Prune, fine-tune the pruned model, and compare: one run folder, resumable in every phase.

Invariant: a phase that is complete on disk is never repeated: scores (``prune_scores``), the pruned
model (``model/``), the recovery (``recover/``, with its checkpoints), the answers (``scores/``);
``report.json`` is written last. All models of the report are compared on the same text, which the
recovery was not trained on where its recipe has validation rows. Try it:
``mlx-slim prune MODEL -o DIR --ratio 0.2 --recover smollm2-lora``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

from mlx_slim.artifacts import SCHEMA_VERSION, write_json
from mlx_slim.config.layers import COMMAND_LINE
from mlx_slim.config.load import Resolved, load_recipe
from mlx_slim.data.sources import find
from mlx_slim.distillation.run import distill
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.options import EvalOptions
from mlx_slim.evaluation.plan import read_tasks
from mlx_slim.events import Notice, Observer
from mlx_slim.finetuning.run_dir import STATE_FILE as TUNE_STATE
from mlx_slim.models.load import read_config
from mlx_slim.preferences.run import train as fine_tune
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.plan import plan, weight_size
from mlx_slim.pruning.records import (
    MODEL,
    RECORD_FILE,
    RECOVER,
    REPORT_FILE,
    PruneRecord,
    RecoveryReport,
)
from mlx_slim.pruning.report import RecoverOptions, make_report
from mlx_slim.pruning.run import SCORES_FILE, prune
from mlx_slim.reading import JsonObject, library_errors, read_object
from mlx_slim.run_dir import RunDir, RunKind, changed_values, option_words

__all__ = ["RecoverOptions", "prune_and_recover", "recovery_recipe", "run_recovery"]

STATE_FILE = "request.json"
RUN = RunKind(
    command="prune",
    holds="run",
    state=STATE_FILE,
    before=(MODEL, RECORD_FILE, SCORES_FILE),
)


def recovery_recipe(
    after: RecoverOptions, pruned: Path, source: str | Path, revision: str | None
) -> Resolved | None:
    """Return the recipe that fine-tunes the model in ``pruned``; None without one.

    A teacher without a model is ``source``, the original.

    Raises:
        SlimError: If the recipe or an override is wrong, or names another model.
    """
    if after.recipe is None:
        if after.overrides:
            raise SlimError(
                f"{after.overrides[0]!r} changes a recipe, and none is given",
                "set --recover RECIPE",
            )
        return None
    if any(text.partition("=")[0] in ("model", "revision") for text in after.overrides):
        raise SlimError(
            f"model ({COMMAND_LINE}): the recovery trains the pruned model", "leave it out"
        )
    overrides = [*after.overrides, f"model={pruned}", "revision=null"]
    resolved = load_recipe(after.recipe, overrides)
    if resolved.recipe.distill is None:
        return resolved
    teachers = [
        {**teacher.model_dump(mode="json"), "model": str(source), "revision": revision}
        if teacher.model is None
        else teacher.model_dump(mode="json")
        for teacher in resolved.recipe.distill.teachers
    ]
    return load_recipe(after.recipe, [*overrides, f"distill.teachers={json.dumps(teachers)}"])


def run_recovery(resolved: Resolved, out: Path, observer: Observer, *, resume: bool) -> Path:
    """Fine-tune the pruned model; return the folder of the adapter or the model.

    Raises:
        SlimError, ResourceError, Interrupted: As ``finetune`` and ``distill``.
    """
    train = fine_tune if resolved.recipe.distill is None else distill
    result = train(resolved, out, observer=observer, resume=resume)
    return out / result.artifact


def prune_and_recover(
    source: str | Path,
    out: Path,
    options: PruneOptions,
    after: RecoverOptions,
    observer: Observer,
    *,
    resume: bool = False,
) -> RecoveryReport:
    """Prune ``source``, recover and score it in the run folder ``out``.

    Args:
        source: Dense model, folder or hub id.
        out: The run folder; must be new unless ``resume``.
        options: What to remove.
        after: Recipe and tasks after it.
        observer: Gets every event.
        resume: Resume a folder that was started with the same pruning.

    Raises:
        SlimError: Bad input, before any weight is read.
        ResourceError: Not enough memory or disk.
        Interrupted: Ctrl-C; complete phases are kept.
    """
    match = partial(_check_same, out, source, options)
    with RunDir(out, RUN).claim(resume=resume, match=match) as claimed:
        if claimed.note:
            observer.notify(Notice(claimed.note))
        return _run(source, out, options, after, observer, claimed.started)


def _run(
    source: str | Path,
    out: Path,
    options: PruneOptions,
    after: RecoverOptions,
    observer: Observer,
    started: bool,
) -> RecoveryReport:
    """Prune, recover and score in the folder that this process holds."""
    if (out / REPORT_FILE).exists():
        observer.notify(Notice(f"{out} is complete: nothing to do"))
        return _read(out / REPORT_FILE, RecoveryReport.from_json)
    resolved = recovery_recipe(after, out / MODEL, source, options.revision)
    if resolved is not None:
        for data in resolved.recipe.data.sources:
            find(data)
    if after.tasks:
        read_tasks(list(after.tasks), EvalOptions(limit=after.limit, data_dir=after.data_dir))
    config = read_config(source, options.revision)
    plan(config, options, weight_size(config))
    with RunDir(out, RUN).resumable(partial(command_words, source, options, after)):
        record = _pruned(source, out, options, observer, started)
        tuned = None
        if resolved is not None:
            resumed = (out / RECOVER / TUNE_STATE).exists()
            observer.notify(Notice(f"recovering with {resolved.name}"))
            tuned = run_recovery(resolved, out / RECOVER, observer, resume=resumed)
        report = make_report(source, out, options, after, record, resolved, tuned, observer)
    write_json(out / REPORT_FILE, report.as_json())
    return report


_Record = TypeVar("_Record")


def _read(file: Path, from_json: Callable[[JsonObject], _Record]) -> _Record:
    """Return the record in ``file``.

    Raises:
        SlimError: If it is damaged.
    """
    values = read_object(file)
    with library_errors(f"{file} is damaged", "start a new run"):
        return from_json(values)


def _check_same(out: Path, source: str | Path, options: PruneOptions) -> None:
    old = {**_request(source, PruneOptions()), **read_object(out / STATE_FILE)}
    new = _request(source, options)
    if changed := changed_values(old, new):
        raise SlimError(
            f"{out} was started with other pruning options: {'; '.join(changed)}",
            "resume with the same values, or start a new run",
        )


def _request(source: str | Path, options: PruneOptions) -> JsonObject:
    return {"schema_version": SCHEMA_VERSION, "source": str(source), **asdict(options)}


def _pruned(
    source: str | Path, out: Path, options: PruneOptions, observer: Observer, started: bool
) -> PruneRecord:
    """Return the record of the pruned model; prune where that was not done yet."""
    if (out / MODEL / RECORD_FILE).exists():
        observer.notify(Notice(f"{out / MODEL} is pruned already"))
        record = _read(out / MODEL / RECORD_FILE, PruneRecord.from_json)
    else:
        if not started:
            write_json(out / STATE_FILE, _request(source, options))
        try:
            result = prune(source, out / MODEL, options, observer, scores_at=out / SCORES_FILE)
        except SlimError:
            if not started:  # bad input leaves nothing behind
                (out / STATE_FILE).unlink(missing_ok=True)
            raise
        record = result.details
        for line in result.lines():
            observer.notify(Notice(line))
    write_json(out / RECORD_FILE, record.as_json())
    return record


def command_words(source: str | Path, options: PruneOptions, after: RecoverOptions) -> list[str]:
    """Return the command that started a run, without its folder: for ``RunDir.resumable``."""
    words = ["prune", str(source), *option_words(options)]
    words += [] if after.recipe is None else ["--recover", after.recipe]
    for name in after.tasks:
        words += ["--task", name]
    words += [] if after.limit is None else ["--limit", str(after.limit)]
    words += [] if after.data_dir is None else ["--data-dir", str(after.data_dir)]
    return [*words, *after.overrides]
