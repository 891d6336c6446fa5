"""Three real steps of a run's largest micro-batch: what ``plan --probe`` measures.

Invariant: model, rows, batches, optimizer and loop are those of ``finetune``; nothing is kept, and
the folder that the rows are tokenised in is temporary. Try it:
``mlx-slim plan smollm2-lora data.path=rows.jsonl --probe``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from mlx_slim import events
from mlx_slim.config.schema import Recipe
from mlx_slim.finetuning.build import build_loop, prepare_data, prepare_model
from mlx_slim.models import structure
from mlx_slim.planner.run import Probe
from mlx_slim.runtime import memory_limits
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.loop import Loop

STEPS = 3


@memory_limits()
def probe(recipe: Recipe, observer: events.Observer | None = None, *, steps: int = STEPS) -> Probe:
    """Load the model and the rows of ``recipe`` and take ``steps`` steps of its largest batch.

    Raises:
        SlimError: As ``finetune`` does for input that cannot be used.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tuned = prepare_model(recipe)
        data = prepare_data(recipe, tuned, folder, unchanged=False)
        loop = build_loop(recipe, tuned, data, folder, observer or events.Broadcast([]), budget=0)
        with checkpointed(structure.blocks(tuned.model), recipe.train.grad_checkpoint):
            seconds, positions, peak = profile_steps(loop, steps)
        return Probe(
            steps=steps,
            seconds_per_batch=statistics.median(seconds[1:] or seconds),
            computed_tokens=positions,
            length=loop.batcher.largest_batch().tokens_BT.shape[1],
            peak_memory_bytes=peak,
            batching=loop.batcher.mode,
            lengths=data.train.lengths.tolist(),
        )


def profile_steps(loop: Loop, steps: int) -> tuple[list[float], int, int]:
    """Take real steps of the largest micro-batch; the model is changed, the train state is not.

    A step has two micro-batches at most: more of them only take longer.

    Args:
        loop: A run.
        steps: How many.

    Returns:
        Seconds of one micro-batch in each step, positions computed in it, peak in bytes.
    """
    loop.model.train()
    mx.eval(loop.optimizer.arrays())
    mx.reset_peak_memory()
    largest = loop.batcher.largest_batch()
    batches = [largest] * min(2, loop.config.accumulate)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        loop.update(batches)
        seconds.append((time.perf_counter() - began) / len(batches))
    return seconds, largest.computed_tokens, mx.get_peak_memory()
