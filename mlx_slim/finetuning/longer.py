"""A fine-tune that is given more steps than it had, finished or not.

Invariant: nothing in its folder changes until the longer run can start. Then ``recipe.json`` says
the new length and how the run began, and after that ``run.json`` goes, so that a kill between the
two leaves a ``run.json`` of fewer steps than ``recipe.json`` asks for, which is recognised.
``training/extension.py`` decides which checkpoint the longer run resumes from. Try it:
``mlx-slim train smollm2-lora -o runs/try --resume train.steps=200``, after one of 100.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.run_dir import RECORD, STATE_FILE, extended_run, fewer_steps, trained_as
from mlx_slim.training.callbacks import Monitor
from mlx_slim.training.extension import describe
from mlx_slim.training.loop import Loop
from mlx_slim.training.optim import Extended, warmup_steps
from mlx_slim.training.state import read_state
from mlx_slim.training.step_plan import check_train_state, total_steps


@dataclass(frozen=True)
class ResumePlan:
    """How a run resumes.

    Attributes:
        start: The checkpoint; None begins with the first step.
        extended: How it began, if it was given more steps since.
        complete: There is nothing to do.
        grown: It is longer than ``recipe.json`` says.
        note: What the user should know; empty if nothing.
    """

    start: Path | None
    extended: Extended | None = None
    complete: bool = False
    grown: bool = False
    note: str = ""


def plan_resume(out: Path, recipe: Recipe, loop: Loop, reached: Path | None) -> ResumePlan:
    """Return how the run in ``out`` resumes with ``recipe``, and give ``loop`` its rates.

    Args:
        out: A run that was started.
        recipe: Of a resume: as it was started, but for the length.
        loop: Built from it.
        reached: The newest checkpoint there.

    Raises:
        SlimError: If it has fewer steps than the run was to take, has more and cannot be resumed,
            or its steps hold other micro-batches than those that the run took.
    """
    resume = _plan(out, recipe, loop, reached)
    if resume.start is not None and not resume.complete:
        check_train_state(loop.batcher, recipe.train, read_state(resume.start))
    return resume


def _plan(out: Path, recipe: Recipe, loop: Loop, reached: Path | None) -> ResumePlan:
    before = _steps(out / STATE_FILE, loop)
    done = _steps(out / RECORD, loop) if (out / RECORD).exists() else 0
    if loop.total < before:
        raise fewer_steps(out, f"{before:,} steps", f"{loop.total:,}")
    if done == loop.total:
        return ResumePlan(reached, complete=True)
    grown = loop.total > before
    if reached is None:
        if done:
            raise _cannot(out, "its checkpoints were removed")
        return ResumePlan(None, grown=grown)
    extended = extended_run(out)
    if grown:
        if recipe.adapter.adaptive:
            raise _cannot(out, f"adapter.adaptive scheduled its ranks for {before:,} steps")
        warmup = extended.warmup if extended else warmup_steps(recipe.train, before)
        extended = Extended(warmup, (*(extended.totals if extended else ()), before))
    loop.extend(extended)
    start = loop.newest()
    if start is None:
        midst = " or in the midst of its last round" if loop.rounds is not None else ""
        raise _cannot(out, f"no checkpoint is left from before its learning rate decayed{midst}")
    if extended is None:
        return ResumePlan(start)
    if read_state(start).total == loop.total:  # of the longer run already
        return ResumePlan(start, extended)
    state, _ = loop.peek(start)
    stopped_by = [one.name for one in loop.callbacks if isinstance(one, Monitor) and one.stopped()]
    patience = recipe.train.early_stopping
    if patience is not None and state.since_best >= patience:
        stopped_by.append("train.early_stopping")
    if stopped_by:
        raise _cannot(out, f"{stopped_by[0]} stopped it after step {state.step:,}")
    steps = state.step, read_state(reached).step
    note = describe(recipe.train, extended, loop.total, *steps)
    return ResumePlan(start, extended, grown=grown, note=note)


def _steps(file: Path, loop: Loop) -> int:
    """Return the steps that the recipe in ``file`` asks for."""
    config = trained_as(file)
    same = (config.steps, config.epochs) == (loop.config.steps, loop.config.epochs)
    return loop.total if same else total_steps(config, loop.batcher)[0]


def _cannot(out: Path, why: str) -> SlimError:
    return SlimError(f"{out} cannot take more steps: {why}", "start a new run of that length")
