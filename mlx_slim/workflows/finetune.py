"""Fine-tune: prepare → run → save → verify.

Invariant: the run folder appears only when a run can start, holds at every moment what ``resume``
needs, and gets ``run.json`` last, after the saved weights were loaded again and gave the same
logits. Bad input leaves no folder behind. Try it: ``mlx-slim train smollm2-lora -o runs/try``.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_slim import events
from mlx_slim.adapters.advice import rank_advice
from mlx_slim.adapters.stack import load_adapters, parse_adapters
from mlx_slim.adapters.store import save_adapter
from mlx_slim.analyze.memory import Prediction, predict
from mlx_slim.artifacts import SCHEMA_VERSION, provenance, read_json, write_json
from mlx_slim.config.load import Resolved
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import Interrupted, ResourceError, SlimError
from mlx_slim.models import anatomy
from mlx_slim.models.load import load
from mlx_slim.models.save import save_model
from mlx_slim.runtime import (
    dtype_name,
    human_bytes,
    memory_budget,
    number,
    resolve_dtype,
    world,
)
from mlx_slim.train import checkpoint
from mlx_slim.train.loop import Loop
from mlx_slim.train.metrics import MetricsFile
from mlx_slim.train.optim import trainable
from mlx_slim.train.remat import checkpointed
from mlx_slim.workflows.aware import save_quantized
from mlx_slim.workflows.held_out import watch
from mlx_slim.workflows.prepare import (
    Tuned,
    build_loop,
    prepare_base,
    prepare_data,
    prepare_model,
)
from mlx_slim.workflows.run_folder import (
    STATE_FILE,
    Result,
    claim,
    fresh,
    resume_command,
    state_record,
)

_CACHE_SHARE = 8  # MLX may keep 1/8 of the budget as free buffers


def finetune(
    resolved: Resolved, out: Path, *, observer: events.Observer, resume: bool = False
) -> Result:
    """Run a recipe into the folder ``out``.

    Args:
        resolved: The recipe and where its values come from.
        out: The run folder; must be new unless ``resume``.
        observer: Hears of every event.
        resume: Go on from the newest checkpoint, exactly.

    Raises:
        SlimError: Bad input, or a resume with another recipe or other data.
        ResourceError: Over the memory budget or out of disk, before training.
        Interrupted: Ctrl-C; the state is saved.
    """
    recipe = resolved.recipe
    started = claim(out, recipe, resume)
    if (out / "run.json").exists():
        return _finished(out, observer)
    budget = memory_budget(recipe.memory.budget)
    mx.set_cache_limit(budget // _CACHE_SHARE)
    with fresh(out, keep=started):
        tuned = prepare_model(recipe)
        data = prepare_data(recipe, tuned, out, unchanged=started)
        prediction = predict(tuned.config, recipe, lengths=data.train.lengths.tolist())
        metrics = MetricsFile(out / "metrics.jsonl")
        listeners = [metrics, observer] if world().rank() == 0 else []
        loud = events.Broadcast(listeners)
        tuned.companions += watch(recipe, tuned, loud)
        loop = build_loop(recipe, tuned, data, out, loud, budget)
        blocks = anatomy.blocks(tuned.model)
        with checkpointed(blocks, recipe.train.grad_checkpoint):
            if not started:
                _check_disk(out, prediction)
            _preflight(loop, prediction, budget)
            if not started and world().rank() == 0:
                write_json(out / STATE_FILE, state_record(resolved, data))
            newest = checkpoint.latest(out / "checkpoints") if started else None
            metrics.rewind(-1 if newest is None else int(newest.name[5:]))
            if newest is not None:
                loop.resume(newest)
            elif advice := rank_advice(recipe, loop.total):
                loud.notify(events.Notice(advice))
    with checkpointed(blocks, recipe.train.grad_checkpoint):
        done = loop.run()
    if done.reason == "interrupted":
        raise Interrupted(
            f"stopped after step {done.step} of {loop.total}; the state is saved",
            f"resume with: {resume_command(resolved, out)}",
        )
    result = Result(
        out=out,
        done=done,
        model=recipe.model,
        artifact="adapters" if tuned.injected and not recipe.quantize.aware else "model",
        trainable=sum(value.size for value in trainable(tuned.model).values()),
        total=tuned.total,
        predicted_peak_bytes=prediction.predicted_peak_bytes,
        ledger=data.ledger,
        on=recipe.adapter.on,
    )
    if world().rank() == 0:
        _save(recipe, tuned, result)
        if recipe.quantize.aware:
            save_quantized(out / result.artifact, recipe, tuned)
        else:
            _verify(recipe, tuned, result)
        write_json(out / "run.json", _record(resolved, tuned, result, budget))
    return result


def _finished(out: Path, observer: events.Observer) -> Result:
    """Return the result of a run that is complete."""
    record = read_json(out / "run.json")
    observer.notify(events.Notice(f"{out} is complete: nothing to do"))
    fields = record["result"]
    return Result(
        out=out,
        done=events.Done(**fields["done"]),
        ledger=read_json(out / "data_ledger.json"),
        **{key: value for key, value in fields.items() if key != "done"},
    )


# ------------------------------------------------------------------------------------ the guard


def _check_disk(out: Path, prediction: Prediction) -> None:
    """Refuse to start when the disk cannot hold the run."""
    free = shutil.disk_usage(out).free
    if free < prediction.disk_bytes:
        raise ResourceError(
            f"{out} will need {human_bytes(prediction.disk_bytes)} of disk, "
            f"{human_bytes(free)} are free",
            "free some space, choose another output folder, or keep less with train.keep=1",
        )


def _preflight(loop: Loop, prediction: Prediction, budget: int) -> None:
    """Run the largest micro-batch; refuse to start over the budget.

    A prediction of twice the budget is believed without a try, which could exhaust the machine.
    """
    over = prediction.predicted_peak_bytes > 2 * budget
    peak = prediction.predicted_peak_bytes if over else loop.preflight()
    if peak > budget:
        raise ResourceError(
            f"this run needs {human_bytes(peak)} ({'predicted' if over else 'measured'}), "
            f"the budget is {human_bytes(budget)}",
            _cheapest_fit(prediction, peak, budget),
        )


def _cheapest_fit(prediction: Prediction, peak: int, budget: int) -> str:
    """Return the cheapest suggestion that fits once corrected by what was measured."""
    correction = peak / prediction.predicted_peak_bytes
    for suggestion in prediction.suggestions:
        size = suggestion.predicted_peak_bytes * correction
        if size <= budget:
            return f"fits with {suggestion.set} (about {human_bytes(size)})"
    return "no single change fits: try a smaller model, or see mlx-slim plan"


# ---------------------------------------------------------------------------------------- saving


def _save(recipe: Recipe, tuned: Tuned, result: Result) -> None:
    """Write the best weights (the last ones without a validation split); quantized ones not yet."""
    done = result.done
    if done.kept_step != done.step:
        best = checkpoint.path_of(result.out / "checkpoints", done.kept_step)
        checkpoint.load_weights(best, tuned.model)
    target = result.out / result.artifact
    if tuned.injected is not None:
        save_adapter(
            result.out / "adapters",
            tuned.model,
            recipe.adapter,
            tuned.injected,
            dora=recipe.method == "dora",
            base=recipe.model,
        )
    elif not recipe.quantize.aware:
        shutil.rmtree(target, ignore_errors=True)
        save_model(target, tuned.model, tuned.loaded.tokenizer, tuned.config)


def _verify(recipe: Recipe, tuned: Tuned, result: Result) -> None:
    """Load what was saved as a user would, and compare logits.

    Raises:
        SlimError: If they differ.
    """
    tokens_BT = mx.arange(16)[None] % max(2, tuned.config.get("vocab_size", 16))
    tuned.model.eval()
    expected = tuned.model(tokens_BT).astype(mx.float32)
    mx.eval(expected)
    tuned.loaded = None  # type: ignore[assignment]  # free it before the second copy comes
    target = result.out / result.artifact
    if result.artifact == "adapters":
        again = prepare_base(recipe)[0].model
        load_adapters(again, parse_adapters([*recipe.adapter.on, target]))
    else:
        again = load(target).model
    again.eval()
    worst = number(mx.abs(again(tokens_BT).astype(mx.float32) - expected).max())
    scale = number(mx.abs(expected).max())
    tolerance = 1e-3 if resolve_dtype(recipe.train.dtype) == mx.float32 else 3e-2
    if not worst <= tolerance * scale:
        raise SlimError(
            f"{target}: reloaded logits differ by {worst:.3g} (largest logit {scale:.3g})",
            "this is a bug: please report it with run.json",
        )


def _record(resolved: Resolved, tuned: Tuned, result: Result, budget: int) -> dict[str, Any]:
    """Return ``run.json``."""
    files = [p for p in (result.out / result.artifact).rglob("*") if p.is_file()]
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "recipe": resolved.recipe.model_dump(mode="json"),
        "origins": resolved.origins,
        "dtype": dtype_name(resolve_dtype(resolved.recipe.train.dtype)),
        "provenance": provenance(),
        "budget_bytes": budget,
        "artifact_bytes": sum(path.stat().st_size for path in files),
        "result": {
            "done": asdict(result.done),
            "model": result.model,
            "artifact": result.artifact,
            "trainable": result.trainable,
            "total": result.total,
            "predicted_peak_bytes": result.predicted_peak_bytes,
            "on": result.on,
        },
    }
