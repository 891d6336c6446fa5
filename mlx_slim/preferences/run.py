"""What ``mlx-slim train`` runs: a fine-tune on the rows' answers, or on a comparison of answers.

Invariant: the recipe decides: one with a ``preference`` section compares answers
(``strategy.py``), any other one learns them. Try it: ``mlx-slim train smollm2-dpo -o runs/dpo``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_slim import events
from mlx_slim.config.load import Resolved
from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batcher
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.run_dir import Result
from mlx_slim.finetuning.validate import validation_rows
from mlx_slim.preferences.scorer import RowScorer
from mlx_slim.preferences.strategy import PreferenceStrategy, allows_prefix_sharing
from mlx_slim.progress import tracked
from mlx_slim.runtime import default_num_threads


def train(
    resolved: Resolved, out: Path, *, observer: events.Observer, resume: bool = False
) -> Result:
    """Run a recipe without teachers into the folder ``out``; as ``finetuning.run.finetune``."""
    preference = resolved.recipe.preference
    strategy = None if preference is None else PreferenceStrategy(preference)
    return finetune(resolved, out, observer=observer, resume=resume, strategy=strategy)


@dataclass(frozen=True)
class PairAccuracy:
    """How often a model prefers the chosen answer.

    Attributes:
        model: Hub id or folder.
        accuracy: Share of pairs whose chosen answer has the higher mean log-probability.
        margin: Mean of the difference, nats per token.
        pairs: Validation pairs.
    """

    model: str
    accuracy: float
    margin: float
    pairs: int


def validate_pairs(recipe: Recipe) -> PairAccuracy:
    """Return how often ``recipe.model``, as it is, prefers the chosen answer of validation pairs.

    Raises:
        SlimError: If the model or the rows cannot be used, or there are no validation pairs.
    """
    if recipe.preference_rows != "pairs":
        raise SlimError(
            "--validate compares pairs, and rows with labels (kto) are none",
            "name pairs: preference.loss=sigmoid data.path=PAIRS",
        )
    train = recipe.train
    with validation_rows(recipe) as (loaded, rows):
        loaded.model.eval()
        settings = train.loss_chunk, loaded.config.get("vocab_size", 8), default_num_threads()
        sharing = allows_prefix_sharing(recipe, loaded.model)
        scorer = RowScorer(rows, loaded.model, *settings, prefix_sharing=sharing)
        sizes = train.batch_tokens, train.max_length
        plan = Batcher(rows, *sizes, "grouped", train.seed, unit=2).plan(0)
        means = np.empty(len(rows))
        for groups in tracked(plan, "scoring the pairs", "micro-batches"):
            numbers = [row for (row,) in groups]
            means[numbers] = scorer(loaded.model, numbers) / rows.supervised[numbers]
        margins = means[::2] - means[1::2]
        accuracy = float((margins > 0).mean())
        return PairAccuracy(recipe.model, accuracy, float(margins.mean()), len(margins))
