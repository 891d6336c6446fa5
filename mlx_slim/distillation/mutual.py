"""Mutual distillation: two students learn from the rows and from each other (arXiv 1706.00384).

Invariant: L = Σ_i CE_i + λ·T²·D(other ‖ self) over both, the other's distribution constant: each
student's gradient is the one it would have if the other were its teacher. Nothing is cached and
full logits never exist: the other's logits are computed from its hidden states, chunk by chunk.
Both are loaded, adapted, saved (``first/``, ``second/``) and verified as a single student is; a
checkpoint holds both, so a run resumes exactly. Legend: C positions of one chunk, N supervised
positions, D width, V vocabulary. Try it:
``mlx-slim distill smollm2-lora distill.method=mutual "distill.teachers=[{}]" -o runs/mutual``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, final

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.artifacts import public_name
from mlx_slim.config.distill import DistillConfig, TeacherConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batch
from mlx_slim.data.prepare import Prepared
from mlx_slim.distillation.losses import FLOOR, Divergence, between, bucket_gradient
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.build import Tuned, prepare_data, prepare_model
from mlx_slim.finetuning.strategy import load_tuned, planned_config, save_tuned
from mlx_slim.models import structure
from mlx_slim.models.load import read_config
from mlx_slim.models.logits import logsumexp, row_sums
from mlx_slim.models.tokenizer import vocabulary_size
from mlx_slim.planner.memory import Prediction, predict
from mlx_slim.planner.students import combined, predict_run, second_recipe
from mlx_slim.reading import JsonObject
from mlx_slim.training.chunk_size import chunk_size
from mlx_slim.training.cross_entropy import batch_arrays, supervised_rows, target_weights
from mlx_slim.training.losses import NLL, LogitsGradient, linear_loss, weighted_sum
from mlx_slim.training.objective import Arrays, Objective


class ModelPair(nn.Module):
    """Two models as one: their parameters are ``first.*`` and ``second.*``."""

    first: nn.Module
    second: nn.Module

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks of both."""
        return [*structure.blocks(self.first), *structure.blocks(self.second)]

    def __call__(self, tokens_BT: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Return the logits of both, concatenated (B, T, 2V)."""
        count = len(structure.blocks(self.first))
        caches = (None, None) if cache is None else (cache[:count], cache[count:])
        logits = [self.first(tokens_BT, caches[0]), self.second(tokens_BT, caches[1])]
        return mx.concatenate(logits, axis=-1)


@dataclass(frozen=True)
class PeerLoss:
    """The token loss CE + λ·T²·D(other ‖ self); Σ CE and Σ D are reported after it.

    Columns: ``targets_C``, the other's hidden states (its logits if it does not split), and
    ``weights_C`` if not ones.

    Attributes:
        other: Maps the other's hidden states to logits.
        divergence: ``forward`` is KL(other ‖ self).
        temperature: T.
        weight: λ.
    """

    other: Callable[[mx.array], mx.array]
    divergence: Divergence
    temperature: float
    weight: float
    beta: float = 0.5

    def _logs(self, logits_CV: mx.array) -> mx.array:
        scaled_CV = logits_CV.astype(mx.float32) / self.temperature
        return mx.maximum(scaled_CV - logsumexp(scaled_CV), FLOOR)

    def _sums(self, nll: mx.array, apart: mx.array) -> mx.array:
        return mx.stack([nll + self.weight * self.temperature**2 * apart, nll, apart])

    def value(self, logits_CV: mx.array, *columns: mx.array) -> mx.array:
        """Return Σ loss, Σ CE and Σ D, float32 (3,), nats."""
        targets_C, rows_CX, *weights = columns
        log_p_CV = mx.stop_gradient(self._logs(self.other(rows_CX)))
        apart_C = between(log_p_CV, self._logs(logits_CV), self.divergence, self.beta)
        nll = NLL().value(logits_CV, targets_C, *weights)
        return self._sums(nll, weighted_sum(apart_C, *weights))

    def value_and_gradient(
        self, logits_CV: mx.array, *columns: mx.array
    ) -> tuple[mx.array, LogitsGradient]:
        """Return the same, and the gradient of the loss by this student's logits."""
        targets_C, rows_CX, *weights = columns
        nll, plain = NLL().value_and_gradient(logits_CV, targets_C, *weights)
        log_p_CV, log_q_CV = self._logs(self.other(rows_CX)), self._logs(logits_CV)
        apart_C = between(log_p_CV, log_q_CV, self.divergence, self.beta)
        u_CV = bucket_gradient(log_p_CV, log_q_CV, self.divergence, self.beta)
        apart_CV = u_CV - mx.exp(log_q_CV) * row_sums(u_CV)
        probs_CV = plain.probs_CV / row_sums(plain.probs_CV)
        probs_CV = probs_CV + self.weight * self.temperature * apart_CV
        logits_gradient = LogitsGradient(
            probs_CV, None, plain.normalizer_C, targets_C, plain.label_weight_C
        )
        return self._sums(nll, weighted_sum(apart_C, *weights)), logits_gradient


class MutualObjective:
    """The objective of a ``ModelPair``: both cross-entropies, and both divergences.

    Args:
        model: The pair.
        divergence: ``forward`` is KL(other ‖ self).
        temperature: T.
        weight: λ.
        chunk: Positions whose logits exist at a time; None chooses.
        vocabulary: Token ids below this may be used for the probe.
        num_threads: Shards of a batch that are computed concurrently.
        beta: β of ``jsd``.
    """

    metrics: tuple[str, ...] = ("first", "second", "divergence")

    def __init__(
        self,
        model: ModelPair,
        divergence: Divergence,
        temperature: float,
        weight: float,
        chunk: int | None = None,
        vocabulary: int = 8,
        num_threads: int = 1,
        beta: float = 0.5,
    ) -> None:
        self._splits = [structure.split(one, vocabulary) for one in (model.first, model.second)]
        self._settings = (divergence, temperature, weight, beta)
        self._chunk = chunk_size(vocabulary, chunk, 2 * num_threads)  # logits of both exist

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays`` and, of a padded batch, the weights of its targets."""
        return (*batch_arrays(batch), *target_weights(batch))

    def weight(self, batch: Batch) -> float:
        """Return the sum of the targets' loss weights."""
        return batch.total_weight

    def begin_step(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Do nothing: a token's loss needs no other token."""

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ loss of both, Σ CE of each, and the mean of both Σ D, float32 (4,), nats."""
        tokens_BT, positions_N, targets_N, segments_BT, *weights = arrays
        pair = cast(ModelPair, model)
        rows = [
            supervised_rows(one, split, tokens_BT, positions_N, segments_BT)
            for one, split in zip((pair.first, pair.second), self._splits, strict=True)
        ]
        sums = []
        for student, other in ((0, 1), (1, 0)):
            if sums:  # one student after the other, or chunks of both would exist at a time
                rows[student] = mx.depends([rows[student]], [sums[0]])[0]
            token_loss = PeerLoss(self._head(other), *self._settings)
            columns = (targets_N, mx.stop_gradient(rows[other]), *weights)
            hidden, split = rows[student], self._splits[student]
            if split is None:
                sums.append(token_loss.value(hidden, *columns))
                continue
            sums.append(
                linear_loss(
                    hidden, split.head, token_loss, columns, chunk=self._chunk, gradient=gradient
                )
            )
        first, second = sums
        apart = 0.5 * (first[2] + second[2])
        return mx.stack([first[0] + second[0], first[1], second[1], apart])

    def _head(self, number: int) -> Callable[[mx.array], mx.array]:
        split = self._splits[number]
        return (lambda logits: logits) if split is None else split.head


class MutualValidation(MutualObjective):
    """The mean cross-entropy of both on validation rows; that of each and D are reported."""

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return the mean Σ CE, Σ CE of each, and the mean of both Σ D, float32 (4,), nats."""
        _, first, second, apart = super().__call__(model, arrays, gradient=gradient)
        return mx.stack([0.5 * (first + second), first, second, apart])


FIRST, SECOND = "first", "second"


@final
class StudentPair:
    """Two students as one model, saved as two.

    Args:
        second: The second student.
    """

    def __init__(self, second: TeacherConfig) -> None:
        self.second = second
        self._other: Tuned | None = None  # the second student, without its weights

    def prepare(self, recipe: Recipe) -> Tuned:
        """Return both as one model."""
        first = prepare_model(recipe)
        second = prepare_model(second_recipe(recipe, self.second))
        pair = ModelPair(first.model, second.model)
        self._other = replace(second, loaded=replace(second.loaded, model=nn.Module()))
        return Tuned(
            loaded=replace(first.loaded, model=pair),
            config=first.config,
            injected=first.injected,
            base=first.base,
            total=first.total + second.total,
        )

    @property
    def second_tuned(self) -> Tuned:
        """The second student, without its weights; set by ``prepare``."""
        assert self._other is not None
        return self._other

    def expect(self, recipe: Recipe) -> Prediction:
        """Return the cost of both, before anything is loaded."""
        return predict_run(read_config(recipe.model, recipe.revision), recipe)

    def predict(self, recipe: Recipe, tuned: Tuned, lengths: Sequence[int]) -> Prediction:
        """Return the cost of both."""
        second = second_recipe(recipe, self.second)
        return combined(
            predict(planned_config(recipe, tuned), recipe, lengths=lengths),
            predict(
                planned_config(second, self.second_tuned), second, lengths=lengths, suggest=False
            ),
        )

    def artifact(self, recipe: Recipe, tuned: Tuned) -> str:
        """Return the folder of the first student."""
        return FIRST

    def save(self, recipe: Recipe, tuned: Tuned, out: Path) -> None:
        """Write both."""
        pair = cast(ModelPair, tuned.model)
        save_tuned(recipe, tuned, pair.first, out / FIRST)
        second = second_recipe(recipe, self.second)
        save_tuned(second, self.second_tuned, pair.second, out / SECOND)

    def load_again(self, recipe: Recipe, tuned: Tuned, out: Path) -> nn.Module:
        """Return both, loaded as a user would."""
        adapted = tuned.injected is not None
        second = second_recipe(recipe, self.second)
        return ModelPair(
            load_tuned(recipe, adapted, out / FIRST), load_tuned(second, adapted, out / SECOND)
        )

    def responder(self, model: nn.Module) -> nn.Module:
        """Return the first student."""
        return cast(ModelPair, model).first


@final
class MutualDistillation:
    """Mutual distillation of two students with one tokenizer.

    Args:
        config: The ``distill`` section.
        second: The second student.
    """

    targets = None
    scorer = None

    def __init__(self, config: DistillConfig, second: TeacherConfig) -> None:
        self.config = config
        self.second = second
        self.student = StudentPair(second)

    def check(self, recipe: Recipe) -> None:
        """Check that the students can learn from each other.

        Raises:
            SlimError: If their vocabularies differ in size, or both are the same model.
        """
        assert self.second.model is not None
        sizes = [
            vocabulary_size(read_config(recipe.model, recipe.revision)),
            vocabulary_size(read_config(self.second.model, self.second.revision)),
        ]
        if sizes[0] != sizes[1]:
            raise SlimError(
                f"the vocabularies of the students have {sizes[0]:,} and {sizes[1]:,} tokens",
                "choose two models of one family",
            )
        same = (self.second.model, self.second.revision) == (recipe.model, recipe.revision)
        if same and recipe.method == "full":
            raise SlimError(
                f"both students are {recipe.model} with method=full: they would stay identical",
                "set another model with distill.teachers=[{model: …}], or method=lora",
            )

    def rows(self, recipe: Recipe, tuned: Tuned, out: Path, *, unchanged: bool) -> Prepared:
        """Return the recipe's rows, within the limits of both students."""
        readers = [self.student.second_tuned.config]
        return prepare_data(recipe, tuned, out, unchanged=unchanged, readers=readers)

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> tuple[Objective, Objective | None]:
        """Return the objective of both, and their mean cross-entropy for validation."""
        config = self.config
        settings = (
            config.divergence,
            config.temperature,
            config.weight,
            chunk,
            vocabulary,
            num_threads,
            config.jsd_beta,
        )
        pair = cast(ModelPair, model)
        return MutualObjective(pair, *settings), MutualValidation(pair, *settings)

    def record(self) -> JsonObject:
        """Return the second student and the folders, for ``run.json``."""
        second = public_name(self.second.model or "")
        return {"distill": {"method": "mutual", "second": second, "folders": [FIRST, SECOND]}}
