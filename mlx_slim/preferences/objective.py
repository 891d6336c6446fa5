"""The objectives of preference tuning: a mean over pairs (KTO: rows) of the whole step.

Invariant: both answers of a pair are in one shard of a micro-batch, and what a loss needs of all
rows of a step (KTO's divergence, ORPO's number of tokens) is measured before its first micro-batch,
so cutting a step into other micro-batches, shards or ranks changes nothing but rounding.
Log-probabilities are summed in float32. Where rows share their beginnings (``data/shared.py``),
both answers share their prompt. Legend: B sequences, T positions, N targets, R rows, U pairs. Try
it: ``mlx-slim train smollm2-dpo -o runs/dpo``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.config.preference import PreferenceConfig
from mlx_slim.data.batches import Batch, RowStore, first_targets
from mlx_slim.models.logits import token_nll
from mlx_slim.preferences.losses import AnswerPairs, kto_losses, pair_losses, pair_rewards
from mlx_slim.preferences.scorer import RowScorer
from mlx_slim.runtime import world
from mlx_slim.training.cross_entropy import CrossEntropy, batch_arrays, supervised_rows
from mlx_slim.training.log_probs import target_log_probs
from mlx_slim.training.objective import Arrays
from mlx_slim.training.ranks import sum_numbers

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
POLICY_ACCURACY = "policy/accuracies"  # chosen has the higher mean log-probability

Reference = Callable[[np.ndarray], np.ndarray]  # row numbers -> log-probabilities, float32


class Placed(NamedTuple):
    """Where the targets of a batch belong.

    Attributes:
        row_N: int32 row of each target among those of the batch; −1 of padding.
        numbers_R: int64 number in the store of each row of the batch; −1 of padding, and in a batch
            that is for measuring only.
        measuring: Whether the batch is.
    """

    row_N: np.ndarray
    numbers_R: np.ndarray
    measuring: bool


def place(batch: Batch, firsts_R: np.ndarray) -> Placed:
    """Return the row of each target, whole units in the order of the store.

    Args:
        batch: Side by side, padded, or a list of shared rows.
        firsts_R: ``first_targets`` of the store.
    """
    unit, sequences = batch.unit, batch.tokens_BT.shape[0]
    real_N = batch.sources_N >= 0
    if batch.weights_N is not None:
        real_N &= batch.weights_N > 0
    if not real_N.any():
        row_N = (batch.positions_N // batch.tokens_BT.shape[1]).astype(np.int32)
        return Placed(row_N, np.full(sequences // unit * unit, -1), True)
    number_N = np.searchsorted(firsts_R, batch.sources_N, side="right") - 1
    units = np.unique(number_N[real_N] // unit)
    row_N = np.searchsorted(units, number_N // unit) * unit + number_N % unit
    numbers_R = np.full(max(len(units), sequences // unit) * unit, -1)
    numbers_R[: len(units) * unit] = (units[:, None] * unit + np.arange(unit)).reshape(-1)
    return Placed(np.where(real_N, row_N, -1).astype(np.int32), numbers_R, False)


class AnswerLogProbs(CrossEntropy):
    """What the objectives share: the summed log-probability of each row's answer.

    Args:
        rows: The store that the batches are made of.
        model, chunk, vocabulary, num_threads: As ``CrossEntropy``.
    """

    def __init__(
        self, rows: RowStore, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> None:
        super().__init__(model, chunk, vocabulary, num_threads)
        self.firsts_R = first_targets(rows)

    def weight(self, batch: Batch) -> float:
        """Return the pairs (KTO: rows) of a batch."""
        return batch.rows / batch.unit

    def log_probs(
        self,
        model: nn.Module,
        tokens_BT: mx.array,
        positions_N: mx.array,
        targets_N: mx.array,
        segments_BT: mx.array | None,
        *,
        gradient: bool,
    ) -> mx.array:
        """Return the log-probability of each target (N,), float32."""
        rows = supervised_rows(model, self.split, tokens_BT, positions_N, segments_BT)
        if self.split is None:
            return -token_nll(rows, targets_N)
        settings = {"chunk": self._chunk, "gradient": gradient, "dense_VD": self._dense_VD}
        return target_log_probs(rows, self.split.head, targets_N, **settings)


def row_sums(values_N: mx.array, row_N: mx.array, rows: int) -> tuple[mx.array, mx.array]:
    """Return the sum and the number of the values of each row, float32 (R,); −1 is of none.

    A masked sum, not a scatter: its order is fixed on a GPU too.
    """
    member_RN = row_N[None] == mx.arange(rows)[:, None]
    counts_R = mx.maximum(member_RN.sum(axis=-1), 1).astype(mx.float32)
    return mx.where(member_RN, values_N, 0).sum(axis=-1), counts_R


def _array(flags: np.ndarray) -> mx.array:
    """Return bool flags as an mlx array."""
    return mx.array(flags.tolist(), dtype=mx.bool_)


def _of(reference: Reference | None, placed: Placed) -> np.ndarray:
    """Return the reference's log-probability of each row, float32 (R,); 0 of padding."""
    values_R = np.zeros(len(placed.numbers_R), np.float32)
    real = placed.numbers_R >= 0
    if reference is not None and real.any():
        values_R[real] = reference(placed.numbers_R[real])
    return values_R


class PairObjective(AnswerLogProbs):
    """DPO, IPO, robust DPO, SimPO and ORPO: rows 2k and 2k + 1 are the answers of pair k.

    Args:
        config: Loss and β.
        reference: The reference's log-probability of each row; None where the loss has none.
        rows: The store; of ORPO with ``nll=all`` a ``WithPrompts``.
        model, chunk, vocabulary, num_threads: As ``CrossEntropy``.
        answers_S: Whether each target is of an answer; None for all.
    """

    def __init__(
        self,
        config: PreferenceConfig,
        reference: Reference | None,
        rows: RowStore,
        model: nn.Module,
        chunk: int | None = None,
        vocabulary: int = 8,
        num_threads: int = 1,
        answers_S: np.ndarray | None = None,
    ) -> None:
        super().__init__(rows, model, chunk, vocabulary, num_threads)
        self._config, self._reference, self._answers_S = config, reference, answers_S
        self._nll_scale = 1.0  # pairs of the step / tokens of its NLL
        orpo = ("nll_loss",) if config.loss == "orpo" else ()
        self.metrics: tuple[str, ...] = (*REWARDS, POLICY_ACCURACY, *orpo)

    def begin_step(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Count the tokens that ORPO's NLL is a mean over."""
        if self._config.loss != "orpo":
            return
        pairs = tokens = 0.0
        for batch in batches:
            pairs += self.weight(batch)
            tokens += np.count_nonzero(place(batch, self.firsts_R).row_N % 2 == 0)
        self._nll_scale = pairs / max(1.0, tokens)

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays``, row of each target, real pairs, reference, and ORPO's NLL."""
        placed = place(batch, self.firsts_R)
        row_N, real_U = placed.row_N, placed.numbers_R[::2] >= 0
        nll_N = row_N % 2 == 0  # of chosen answers; −1 is odd
        if self._answers_S is not None and not placed.measuring:
            row_N = np.where(self._answers_S[batch.sources_N], row_N, -1).astype(np.int32)
        extras = [_array(real_U | placed.measuring)]
        if self._config.has_reference:
            extras.append(mx.array(_of(self._reference, placed).reshape(-1, 2)))
        if self._config.loss == "orpo":
            extras.append(mx.array(nll_N.astype(np.float32) * np.float32(self._nll_scale)))
        return (*batch_arrays(batch), mx.array(row_N), *extras)

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ over pairs of the loss and of ``metrics``, float32."""
        *inputs, row_N, real_U = arrays[:6]
        config = self._config
        log_probs_N = self.log_probs(model, *inputs, gradient=gradient)
        sums_R, counts_R = row_sums(log_probs_N, row_N, 2 * real_U.shape[0])
        reference = arrays[6] if config.has_reference else None
        answers = AnswerPairs(sums_R.reshape(-1, 2), counts_R.reshape(-1, 2), reference)

        def total(values_U: mx.array) -> mx.array:
            return mx.where(real_U, values_U, 0).sum()

        loss = total(pair_losses(config, answers))
        reported = []
        if config.loss == "orpo":
            nll = -(log_probs_N * arrays[6]).sum()
            loss, reported = loss + nll, [nll]
        rewards_U2, means_U2 = pair_rewards(config, answers), answers.means
        chosen_U, rejected_U = rewards_U2[:, 0], rewards_U2[:, 1]
        better_U = means_U2[:, 0] > means_U2[:, 1]
        columns = (chosen_U, rejected_U, chosen_U - rejected_U, chosen_U > rejected_U, better_U)
        return mx.stack([loss, *map(total, columns), *reported]).astype(mx.float32)


class KtoObjective(AnswerLogProbs):
    """KTO: single rows, each wanted or not, against the divergence z of the step.

    Args:
        config: β and the weights.
        reference: The reference's log-probability of each row.
        mismatched: Scores the rows whose divergence is z (``MismatchedRows``).
        reference_mismatched: The reference's log-probability of each of these.
        desirable_R: The labels of the store's rows.
        batch_tokens: Positions of a micro-batch of mismatched rows.
        rows, model, chunk, vocabulary, num_threads: As ``AnswerLogProbs``.
    """

    metrics: tuple[str, ...] = (*REWARDS, "kl")

    def __init__(
        self,
        config: PreferenceConfig,
        reference: Reference,
        mismatched: RowScorer,
        reference_mismatched: Reference,
        desirable_R: np.ndarray,
        batch_tokens: int,
        rows: RowStore,
        model: nn.Module,
        chunk: int | None = None,
        vocabulary: int = 8,
        num_threads: int = 1,
    ) -> None:
        super().__init__(rows, model, chunk, vocabulary, num_threads)
        self._config, self._reference, self._desirable_R = config, reference, desirable_R
        self._mismatched, self._reference_mismatched = mismatched, reference_mismatched
        self._batch_tokens = batch_tokens
        # z, and rows of the step over its wanted and its other ones: what a mean of either needs.
        self._step = np.array([0.0, 1.0, 1.0], np.float32)

    def begin_step(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Measure z = max(0, mean log-ratio of mismatched rows), and count the labels."""
        divergence = count = desirable = 0.0
        group, training = world(), model.training
        model.eval()  # without dropout
        for batch in batches:
            numbers_R = place(batch, self.firsts_R).numbers_R
            numbers_R = numbers_R[numbers_R >= 0]
            count += len(numbers_R)
            desirable += np.count_nonzero(self._desirable_R[numbers_R])
            for rows in self._chunks(numbers_R):
                chunk = rows[group.rank() :: group.size()]  # the same mean on any number of ranks
                if not len(chunk):
                    continue
                ratios = self._mismatched(model, chunk) - self._reference_mismatched(chunk)
                divergence += float(ratios.sum(dtype=np.float64))
        model.train(training)
        (divergence,) = sum_numbers(divergence)
        if count:
            scales = [count / n if n else np.nan for n in (desirable, count - desirable)]
            self._step = np.array([max(0.0, divergence / count), *scales], np.float32)

    def _chunks(self, numbers_R: np.ndarray) -> Iterable[np.ndarray]:
        """Yield rows of like length, within ``batch_tokens`` positions where there are several."""
        lengths = self._mismatched.rows.lengths
        order = numbers_R[np.argsort(-lengths[numbers_R], kind="stable")]
        while len(order):
            size = max(1, self._batch_tokens // max(1, int(lengths[order[0]]) - 1))
            yield order[:size]
            order = order[size:]

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays``, row of each target, real rows, reference, labels, the step's."""
        placed = place(batch, self.firsts_R)
        real_R = placed.numbers_R >= 0
        desirable_R = np.where(real_R, self._desirable_R[placed.numbers_R], True)
        return (
            *batch_arrays(batch),
            mx.array(placed.row_N),
            _array(real_R | placed.measuring),
            mx.array(_of(self._reference, placed)),
            _array(desirable_R),
            mx.array(self._step),
        )

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ over rows of the loss and of ``metrics``, float32."""
        *inputs, row_N, real_R, reference_R, desirable_R, step = arrays
        log_probs_N = self.log_probs(model, *inputs, gradient=gradient)
        sums_R, _ = row_sums(log_probs_N, row_N, real_R.shape[0])
        ratios_R, kl = sums_R - reference_R, step[0]

        def total(values_R: mx.array, which_R: mx.array = real_R) -> mx.array:
            return mx.where(which_R, values_R, 0).sum()

        loss = total(kto_losses(self._config, ratios_R, desirable_R, kl))
        ratios_R = mx.stop_gradient(ratios_R)  # a scale that is not a number has no gradient
        rewards_R = self._config.beta * ratios_R
        chosen = step[1] * total(rewards_R, real_R & desirable_R)
        rejected = step[2] * total(rewards_R, real_R & ~desirable_R)
        right = total((ratios_R > kl) == desirable_R)
        reported = (chosen, rejected, chosen - rejected, right, total(mx.ones_like(ratios_R)) * kl)
        return mx.stack([loss, *reported]).astype(mx.float32)
