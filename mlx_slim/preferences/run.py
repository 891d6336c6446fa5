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


@dataclass(frozen=True)
class LabelAccuracy:
    """How well a model tells desirable answers from others.

    Attributes:
        model: Hub id or folder.
        accuracy: Share of comparisons of a desirable answer with another one in which it has the
            higher mean log-probability; equals count half (the area under the ROC curve).
        margin: Mean of desirable answers less that of the others, nats per token.
        desirable: Validation rows with ``label: true``.
        undesirable: With ``label: false``.
    """

    model: str
    accuracy: float
    margin: float
    desirable: int
    undesirable: int


def validate_pairs(recipe: Recipe) -> PairAccuracy:
    """Return how often ``recipe.model``, as it is, prefers the chosen answer of validation pairs.

    Raises:
        SlimError: If the model or the rows cannot be used, or there are no validation pairs.
    """
    means, _ = _mean_log_probs(recipe, 2)
    margins = means[::2] - means[1::2]
    accuracy = float((margins > 0).mean())
    return PairAccuracy(recipe.model, accuracy, float(margins.mean()), len(margins))


def validate_labels(recipe: Recipe) -> LabelAccuracy:
    """Return how well ``recipe.model``, as it is, tells desirable validation rows from the others.

    Raises:
        SlimError: As ``validate_pairs``, and if all labels are alike.
    """
    means, labels = _mean_log_probs(recipe, 1)
    assert labels is not None
    desirable_R, others_R = means[labels], means[~labels]
    if not (len(desirable_R) and len(others_R)):
        counts = f"{len(desirable_R):,} validation rows have label true and {len(others_R):,}"
        raise SlimError(
            f"{counts} have false: a comparison needs both",
            "set data.validation to more rows, or to a file with both labels",
        )
    gaps = desirable_R[:, None] - others_R
    accuracy = float((gaps > 0).mean() + 0.5 * (gaps == 0).mean())
    return LabelAccuracy(
        recipe.model, accuracy, float(gaps.mean()), len(desirable_R), len(others_R)
    )


def _mean_log_probs(recipe: Recipe, unit: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the mean log-probability of the answer of each validation row, and the labels."""
    train = recipe.train
    with validation_rows(recipe) as (loaded, rows):
        loaded.model.eval()
        settings = train.loss_chunk, loaded.config.get("vocab_size", 8), default_num_threads()
        sharing = allows_prefix_sharing(recipe, loaded.model)
        scorer = RowScorer(rows, loaded.model, *settings, prefix_sharing=sharing)
        sizes = train.batch_tokens, train.max_length
        plan = Batcher(rows, *sizes, "grouped", train.seed, unit=unit).plan(0)
        means = np.empty(len(rows))
        for groups in tracked(plan, "scoring the answers", "micro-batches"):
            numbers = [row for (row,) in groups]
            means[numbers] = scorer(loaded.model, numbers) / rows.supervised[numbers]
        return means, rows.labels
