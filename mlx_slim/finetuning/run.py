"""Fine-tune: prepare → run → save → verify.

What is minimised, a ``TrainingStrategy`` says (``strategy.py``). Invariant: the run folder appears
only when a run can start, holds at every moment what ``resume`` needs, and gets ``run.json`` last,
after the saved weights were loaded again and gave the same logits. Bad input leaves no folder
behind. Try it: ``mlx-slim train smollm2-lora -o runs/try``.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim import events
from mlx_slim.adapters.advice import rank_advice
from mlx_slim.artifacts import write_json
from mlx_slim.config.load import Resolved
from mlx_slim.config.schema import Recipe
from mlx_slim.data.ledger import notes
from mlx_slim.data.prepare import Prepared
from mlx_slim.errors import Interrupted, ResourceError, SlimError
from mlx_slim.finetuning.answers import answer_after, answer_before
from mlx_slim.finetuning.build import Tuned, build_loop
from mlx_slim.finetuning.conditions import ConditionsWatch
from mlx_slim.finetuning.forgetting import measure_forgetting
from mlx_slim.finetuning.guard import check_disk, check_folder, check_loading, preflight
from mlx_slim.finetuning.longer import ResumePlan, plan_resume
from mlx_slim.finetuning.rank_facts import refuse_unlike_ranks
from mlx_slim.finetuning.report import write_page
from mlx_slim.finetuning.rounds import AnswerRounds, WithoutNotices
from mlx_slim.finetuning.run_dir import (
    RECORD,
    Result,
    begin,
    claim,
    command_words,
    is_complete,
    read_result,
    run_dir,
    state_record,
)
from mlx_slim.finetuning.run_record import run_record
from mlx_slim.finetuning.sharding import resolve as resolve_sharding
from mlx_slim.finetuning.strategy import (
    Student,
    TargetGeneration,
    TrainingStrategy,
    base_folder,
    plain_strategy,
)
from mlx_slim.finetuning.task_metric import validation_metric
from mlx_slim.models import structure
from mlx_slim.models.class_errors import class_errors
from mlx_slim.models.logits_close import Change, logits_close, rounding
from mlx_slim.models.recorded_logits import free_weights
from mlx_slim.planner.memory import Prediction
from mlx_slim.planner.suggest import changed
from mlx_slim.power import keep_awake
from mlx_slim.progress import stage
from mlx_slim.runtime import (
    from_first_rank,
    memory_budget,
    memory_limits,
    world,
)
from mlx_slim.training import checkpoint, rotation
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.loop import Loop
from mlx_slim.training.metrics import MetricsFile
from mlx_slim.training.step_plan import rows_read


def finetune(
    resolved: Resolved,
    out: Path,
    *,
    observer: events.Observer,
    resume: bool = False,
    strategy: TrainingStrategy | None = None,
) -> Result:
    """Run a recipe into the folder ``out``.

    Args:
        resolved: The recipe and where its values come from.
        out: The run folder; must be new unless ``resume``.
        observer: Receives every event.
        resume: Resume from the newest checkpoint, exactly; or with more steps than it had.
        strategy: What is minimised; None is the cross-entropy of the rows.

    Raises:
        SlimError: Bad input, or a resume with another recipe or other data.
        ResourceError: Over the memory budget or out of disk, before training.
        Interrupted: Ctrl-C; the state is saved.
    """
    recipe = resolved.recipe
    refuse_unlike_ranks(recipe)
    strategy = strategy or plain_strategy(resolved)
    for notice in resolved.notices:
        observer.notify(events.Notice(notice, "warning"))
    with (
        claim(out, recipe, observer, resume=resume, reward=resolved.reward) as started,
        run_dir(out).resumable(partial(command_words, resolved)),
        memory_limits(memory_budget(recipe.memory.budget)),
        keep_awake(recipe.train.keep_awake),
        nullcontext() if strategy.scorer is None else closing(strategy.scorer),
    ):
        return _run(resolved, out, observer, strategy, started)


def _run(
    resolved: Resolved,
    out: Path,
    observer: events.Observer,
    strategy: TrainingStrategy,
    started: bool,
) -> Result:
    """Run a recipe in the folder that this process holds."""
    recipe = resolved.recipe
    if started:
        check_folder(out)
        if is_complete(out, recipe):  # else what is there is of another rank's disk
            return _finished(out, observer)
    budget = memory_budget(recipe.memory.budget)
    metrics = MetricsFile(out / "metrics.jsonl")
    watchers = [metrics, observer, ConditionsWatch(observer)]
    listeners = events.Broadcast(watchers if world().rank() == 0 else [])
    newest = rotation.latest(out / "checkpoints") if started else None
    first = world().rank() == 0
    if first and newest is None and not (out / RECORD).exists():
        metrics.clear()
    strategy.check(recipe)
    recipe, expected = resolve_sharding(recipe, strategy.student.expect, budget, listeners)
    check_loading(recipe, expected, budget)
    built = _build(recipe, strategy, out, listeners, budget, unchanged=started)
    resume_plan = ResumePlan(None)
    if started:
        resume_plan = plan_resume(out, recipe, built.loop, newest)
        if resume_plan.complete:
            return _finished(out, observer)
    newest = resume_plan.start
    with checkpointed(structure.blocks(built.tuned.model), recipe.train.grad_checkpoint):
        if not (out / "checkpoints").exists():
            check_disk(out, built.prediction)
            if strategy.targets is not None:
                strategy.targets.check_disk(out)
        with _training(recipe, built.tuned):
            preflight(built.loop, built.prediction, budget)

    fresh = not started or resume_plan.grown
    state = state_record(resolved, built.data, resume_plan.extended) if fresh else None
    from_first_rank(partial(begin, out, state, "" if started else resolved.text))
    if strategy.targets is not None or strategy.scorer is not None:
        check_folder(out)  # rank 0 writes what all read
    if strategy.targets is not None and strategy.targets.missing():
        if strategy.targets.from_student:
            _generate(strategy.targets, observer, built.tuned)
        else:
            del built  # the student makes room
            gc.collect()
            mx.clear_cache()
            _generate(strategy.targets, observer, None)
            if first and newest is None:
                metrics.clear()  # its events are written again
            built = _build(recipe, strategy, out, listeners, budget, unchanged=True)
            built.loop.extend(resume_plan.extended)
    tuned, loop = built.tuned, built.loop
    tokenizer, validation = tuned.loaded.tokenizer, built.data.prompted
    if first and newest is not None:
        saved = events.Saved(int(newest.name[5:]), f"{newest.parent.name}/{newest.name}")
        metrics.rewind(saved, loop.peek(newest)[1])
    with checkpointed(structure.blocks(tuned.model), recipe.train.grad_checkpoint):
        if newest is not None:
            if resume_plan.note:
                listeners.notify(events.Notice(resume_plan.note))
            loop.resume(newest)
        else:
            advice = rank_advice(recipe, loop.total)
            for line in notes(built.data.ledger):
                listeners.notify(events.Notice(line, "warning"))
            if advice:
                listeners.notify(events.Notice(advice))
            prediction = built.prediction
            listeners.notify(
                events.Predicted(prediction.predicted_peak_bytes, prediction.breakdown)
            )
            if first and tuned.sharded is None:
                count = recipe.report_answers
                peak = mx.get_peak_memory()
                model = strategy.student.responder(tuned.model)
                answer_before(out, model, tokenizer, validation, count, budget)
                del model
                if mx.get_peak_memory() > peak:  # what is reported is the training's
                    loop.preflight()
        done = loop.run()
    while done is None:  # a round of answers is scored while the model is not in memory
        assert strategy.scorer is not None
        del built, tuned, loop
        gc.collect()
        mx.clear_cache()
        if not strategy.scorer.score_alone(observer):
            raise Interrupted("stopped while answers were scored; the state is saved")
        mx.clear_cache()
        rebuilding = WithoutNotices(listeners)
        built = _build(recipe, strategy, out, rebuilding, budget, unchanged=True)
        rebuilding.active = False
        built.loop.extend(resume_plan.extended)
        tuned, loop = built.tuned, built.loop
        with checkpointed(structure.blocks(tuned.model), recipe.train.grad_checkpoint):
            saved = rotation.latest(out / "checkpoints")
            assert saved is not None
            loop.resume(saved, report=False)
            done = loop.run(again=True)
    if done.reason == "interrupted":
        raise Interrupted(f"stopped after step {done.step} of {loop.total}; the state is saved")
    artifact = strategy.student.artifact(recipe, tuned)
    result = Result(
        out=out,
        done=done,
        model=recipe.model,
        artifact=artifact,
        trainable=tuned.trainable_count(),
        total=tuned.total,
        predicted_peak_bytes=built.prediction.predicted_peak_bytes,
        ledger=built.data.ledger,
        on=recipe.adapter.on,
        base=None if tuned.base is None else base_folder(Path(artifact)).name,
    )
    del built, loop  # optimizer, batches, objectives: what follows needs the model alone
    if strategy.scorer is not None:
        strategy.scorer.close()
    gc.collect()
    mx.clear_cache()
    if first or tuned.sharded is not None:  # whose slices are on all ranks
        _best_weights(tuned, result)
        with stage(f"saving {result.artifact}"):
            strategy.student.save(recipe, tuned, out)
    if first:
        again = None
        if tuned.sharded is None:
            with stage(f"loading {result.artifact} again and comparing"):
                again = _verify(recipe, strategy.student, tuned, result)
        record = run_record(resolved, strategy, result, budget, resume_plan.extended)
        try:
            if again is not None:  # of a sharded run, no rank could load it
                answer_after(out, strategy.student.responder(again), tokenizer, validation, budget)
            write_page(out, record)
        except ResourceError:
            raise
        except SlimError as error:  # the run is worth more than its page
            text = f"the run is complete, its page was not written: {error.message}"
            observer.notify(events.Notice(text, "warning"))
        write_json(out / RECORD, record)
    return result


def _generate(targets: TargetGeneration, observer: events.Observer, student: Tuned | None) -> None:
    """Compute the missing targets.

    Raises:
        Interrupted: Ctrl-C.
    """
    if not targets.generate(observer, student):
        raise Interrupted("stopped while targets were computed; the targets so far are saved")
    mx.clear_cache()
    mx.reset_peak_memory()


@dataclass
class _Built:
    """A run that is ready to start."""

    tuned: Tuned
    data: Prepared
    prediction: Prediction
    loop: Loop


def _training(recipe: Recipe, tuned: Tuned) -> AbstractContextManager[None]:
    """Let what a model class cannot do in training be one line."""
    kind = tuned.config["model_type"]
    return class_errors(f"{kind} models cannot be trained here with method={recipe.method}")


def _build(
    recipe: Recipe,
    strategy: TrainingStrategy,
    out: Path,
    observer: events.Observer,
    budget: int,
    *,
    unchanged: bool,
) -> _Built:
    tuned = strategy.student.prepare(recipe)
    for note in tuned.loaded.notes:
        observer.notify(events.Notice(note))
    data = strategy.rows(recipe, tuned, out, unchanged=unchanged)
    if data.note:
        observer.notify(events.Notice(data.note))
    measured = measure_forgetting(recipe, tuned, observer)
    tuned.callbacks += [*measured, *validation_metric(recipe, tuned, out, observer)]
    with _training(recipe, tuned):
        loop = build_loop(recipe, tuned, data, out, observer, budget, strategy.objectives)
    batched = changed(recipe, {"train.batching": loop.batcher.mode})  # memory depends on it
    prediction = strategy.student.predict(batched, tuned, data.train.lengths.tolist())
    if strategy.scorer is not None:
        prediction = strategy.scorer.place(prediction, budget, observer)
        loop.rounds = AnswerRounds(
            tuned.model,
            tuned.loaded.tokenizer,
            data.train,
            out,
            recipe.rounds,
            recipe.train,
            loop.batcher.max_length,
            strategy.scorer,
            observer,
            compiled=loop.compiled,
            budget=min(budget, prediction.predicted_peak_bytes),
        )
    if strategy.targets is not None:
        read_N = rows_read(loop.batcher, loop.config, loop.total, loop.rounds)
        strategy.targets.need(read_N)
    return _Built(tuned, data, prediction, loop)


def _finished(out: Path, observer: events.Observer) -> Result:
    """Return the result of a run that is complete."""
    result = read_result(out)
    observer.notify(events.Notice(f"{out} is complete: nothing to do"))
    return result


# ---------------------------------------------------------------------------------------- saving


def _best_weights(tuned: Tuned, result: Result) -> None:
    """Go back to the best step (the last one without a validation split)."""
    done = result.done
    if done.result_step not in (None, done.step):
        best = rotation.path_of(result.out / "checkpoints", done.result_step)
        checkpoint.load_weights(best, tuned.model, tuned.sharded)


def _verify(recipe: Recipe, student: Student, tuned: Tuned, result: Result) -> nn.Module:
    """Load what was saved as a user would, and compare logits; return it.

    Raises:
        SlimError: If they differ.
    """
    tokens_BT = mx.arange(16)[None] % max(2, tuned.config.get("vocab_size", 16))
    tuned.model.eval()
    trained = tuned.model(tokens_BT)
    mx.eval(trained)
    free_weights(tuned.model)  # before the second copy comes
    tuned.callbacks.clear()
    again = student.load_again(recipe, tuned, result.out)
    again.eval()
    loaded = again(tokens_BT)
    tolerance = rounding(len(structure.blocks(again)), trained.dtype, loaded.dtype)
    difference = logits_close(loaded, trained, Change.WEIGHTS, tolerance=tolerance)
    if not difference.close:
        raise SlimError(
            f"{result.out / result.artifact}: reloaded {difference}",
            "this is a bug: please report it with run.json",
        )
    return again
