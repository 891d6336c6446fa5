"""One trial: train its recipe, end early where the pruner says so, and write how it ended.

Invariant: ``outcome.json`` is written last; a killed trial resumes from its newest checkpoint, and
what it decides is a function of ``trial.json`` and its own losses. Files in its folder:
``recipe.yaml`` (to run by itself: ``mlx-slim train FOLDER/recipe.yaml -o RUN``), ``trial.json``,
``run/``, ``outcome.json``. Try it: ``mlx-slim sweep -o DIR --only trials/003``.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_slim.artifacts import write_json
from mlx_slim.config.load import Resolved, load_recipe
from mlx_slim.distillation.run import distill
from mlx_slim.errors import DivergedError, Interrupted, SlimError
from mlx_slim.events import Broadcast, Event, Observer, Started, ValidationDone
from mlx_slim.finetuning.report import events_of
from mlx_slim.finetuning.run_dir import STATE_FILE, Result, read_result
from mlx_slim.preferences.run import train as fine_tune
from mlx_slim.sweeping.folder import OUTCOME, RECIPE, REQUEST, RUN
from mlx_slim.sweeping.records import Curve, TrialOutcome, TrialRequest, read_json_record, to_json

# Of a run folder: what only a resume needs, and what only a user of the result does.
_SCRATCH = ("checkpoints", "tokens", "targets", "task_rows")
_RESULTS = ("adapters", "base", "model", "first", "first-base", "second", "second-base")


class PrunedTrial(Exception):
    """The pruner ends a trial after a validation."""


class PrunerWatch:
    """An observer that ends a run by raising ``PrunedTrial``.

    Args:
        request: What the pruner knows.
        run: The run folder, whose ``metrics.jsonl`` has the validations before a resume too.
    """

    def __init__(self, request: TrialRequest, run: Path) -> None:
        self._request, self._run = request, run
        self._total = 0

    def notify(self, event: Event) -> None:
        """Decide after a validation; not after the last step, when nothing is saved by it."""
        if isinstance(event, Started):
            self._total = event.total_steps
        elif isinstance(event, ValidationDone) and event.step < self._total:
            from mlx_slim.sweeping.study import should_prune

            if should_prune(self._request, curve_of(self._run)):
                raise PrunedTrial


def train(resolved: Resolved, run: Path, observer: Observer) -> Result:
    """Train a recipe with or without teachers, resuming where a killed run stopped.

    Raises:
        SlimError: As ``finetune`` and ``distill``.
    """
    started = (run / STATE_FILE).exists()
    learn = fine_tune if resolved.recipe.distill is None else distill
    result = learn(resolved, run, observer=observer, resume=started)
    free()
    return result


def free() -> None:
    """Release memory between two models."""
    gc.collect()
    mx.clear_cache()


def curve_of(run: Path) -> Curve:
    """Return the validations of a run that are finite, in order."""
    validations = [one for one in events_of(run) if one["event"] == ValidationDone.name]
    return [(int(one["step"]), float(one["loss"])) for one in validations]


def run_trial(folder: Path, observer: Observer) -> TrialOutcome:
    """Train the trial in ``folder``, from its checkpoint if it has one; return how it ended.

    Raises:
        Interrupted: Ctrl-C; the state is saved.
    """
    file, run = folder / OUTCOME, folder / RUN
    if file.exists():
        earlier = read_json_record(file, TrialOutcome)
        if earlier.state != "failed":
            return earlier
    request = read_json_record(folder / REQUEST, TrialRequest)
    watch = PrunerWatch(request, run)
    try:
        train(load_recipe(str(folder / RECIPE)), run, Broadcast([observer, watch]))
        outcome = completed(run)
    except PrunedTrial:
        outcome = _ended_early(run)
    except DivergedError as error:
        outcome = TrialOutcome("diverged", why=error.message)
    except Interrupted:
        raise
    except SlimError as error:
        works = any(one.state in ("complete", "pruned", "diverged") for one in request.past)
        state = "failed" if error.exit_code == SlimError.exit_code and not works else "infeasible"
        why = "; ".join([error.message, *error.details])
        outcome = TrialOutcome(state, why=why, hint=error.hint)
    free()
    write_json(file, to_json(outcome))
    return outcome


def completed(run: Path) -> TrialOutcome:
    """Return the outcome of the complete run in ``run``.

    Raises:
        SlimError: If it has no validation rows, or is not complete.
    """
    result = read_result(run)
    done = result.done
    if done.best_validation is None:
        return TrialOutcome("diverged", why="no validation loss is finite", steps=done.step)
    return TrialOutcome(
        state="complete",
        loss=done.best_validation,
        predicted_peak_bytes=result.predicted_peak_bytes,
        peak_memory_bytes=done.peak_memory_bytes,
        steps=done.step,
        seconds=done.seconds,
        validated_tokens=_validated(run),
        curve=curve_of(run),
    )


def _ended_early(run: Path) -> TrialOutcome:
    curve = curve_of(run)
    step = curve[-1][0]
    return TrialOutcome(
        state="pruned",
        loss=min(loss for _, loss in curve),
        steps=step,
        validated_tokens=_validated(run),
        curve=curve,
        why=f"pruned after step {step}",
    )


def _validated(run: Path) -> int | None:
    """Return the supervised tokens of the validation rows of a run."""
    validations = [one for one in events_of(run) if one["event"] == ValidationDone.name]
    return validations[-1].get("supervised_tokens") if validations else None


def tidy(folder: Path, *, keep: bool) -> None:
    """Remove what an ended trial needs no more: all that is large, with ``keep`` but the result."""
    for name in (*_SCRATCH, *(() if keep else _RESULTS)):
        shutil.rmtree(folder / RUN / name, ignore_errors=True)
