"""Three real steps of a run's largest micro-batch: what ``plan --probe`` measures.

Invariant: model, rows, batches, optimizer and loop are those of ``finetune``; nothing is kept, and
the folder that the rows are tokenised in is temporary. Try it:
``mlx-slim plan smollm2-lora data.path=rows.jsonl --probe``.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from mlx_slim import events
from mlx_slim.config.schema import Recipe
from mlx_slim.finetuning.build import build_loop, prepare_data, prepare_model
from mlx_slim.models import structure
from mlx_slim.planner.run import Probe
from mlx_slim.runtime import memory_limits
from mlx_slim.training.grad_checkpoint import checkpointed

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
            seconds, positions, peak = loop.profile_steps(steps)
        return Probe(
            steps=steps,
            seconds_per_batch=statistics.median(seconds[1:] or seconds),
            computed_tokens=positions,
            length=loop.batcher.largest_batch().tokens_BT.shape[1],
            peak_memory_bytes=peak,
            batching=loop.batcher.mode,
            lengths=data.train.lengths.tolist(),
        )
