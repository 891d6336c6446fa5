"""The loss of a model on a recipe's validation rows, without training it.

Invariant: the rows, their template and their order are those of a run of the same recipe, and the
loss is computed by the loop's code; so it is comparable with a run's ``validation`` lines.
Try it: ``mlx-slim train smollm2-lora model=runs/other/model --validate``.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batcher
from mlx_slim.data.store import TokenStore
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.build import Tuned, prepare_data
from mlx_slim.models.load import Loaded, load
from mlx_slim.runtime import default_num_threads, resolve_dtype
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.validation import LossScorer, validation_loss


@dataclass(frozen=True)
class Validated:
    """A validation loss.

    Attributes:
        model: Hub id or folder.
        loss: Σ NLL / Σ supervised tokens, nats.
        supervised: Those tokens.
        rows: Validation rows.
    """

    model: str
    loss: float
    supervised: int
    rows: int


@contextlib.contextmanager
def validation_rows(recipe: Recipe) -> Iterator[tuple[Loaded, TokenStore]]:
    """Yield ``recipe.model`` as it is, dense or quantized, and the rows that a run validates on.

    Raises:
        SlimError: If the model or the rows cannot be used, or there are no validation rows.
    """
    loaded = load(recipe.model, revision=recipe.revision, dtype=resolve_dtype(recipe.train.dtype))
    tuned = Tuned(loaded, loaded.config, None, 0)
    with tempfile.TemporaryDirectory() as name:
        rows = prepare_data(recipe, tuned, Path(name), unchanged=False).validation
        if not rows:
            raise SlimError("this recipe has no validation rows", "set data.validation=0.02")
        yield loaded, rows


def validate(recipe: Recipe) -> Validated:
    """Return the loss of ``recipe.model`` as it is, dense or quantized, on the validation rows.

    Raises:
        SlimError: If the model or the rows cannot be used, or there are no validation rows.
    """
    with validation_rows(recipe) as (loaded, rows):
        config = recipe.train
        batcher = Batcher(rows, config.batch_tokens, config.max_length, "grouped", config.seed)
        objective = CrossEntropy(
            loaded.model, config.loss_chunk, loaded.config.get("vocab_size", 8)
        )
        scorer = LossScorer(loaded.model, objective, num_threads=default_num_threads())
        loss, _, supervised = validation_loss(scorer, batcher)
        return Validated(recipe.model, loss, supervised, len(rows))
