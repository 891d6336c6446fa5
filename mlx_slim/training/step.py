"""One optimizer step: micro-batches in, an exact token-mean gradient out.

Invariant: the step's loss is Σ w · NLL / Σ w over the supervised tokens of all micro-batches and
all ranks (w is 1 unless a row weighs its turns), or Σ loss / pairs, never a mean of means; so
cutting the same rows into other micro-batches or onto other ranks gives the same gradient up to
rounding. Nothing is updated when the loss is not finite.
Legend: B sequences, T positions, N supervised positions, D width.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim import blas
from mlx_slim.data.batches import Batch
from mlx_slim.data.rank_rows import rows_of_rank
from mlx_slim.data.shared import cheapest
from mlx_slim.models import structure
from mlx_slim.models.dropout import drawn_for
from mlx_slim.models.prefix_attention import prefix_attention
from mlx_slim.models.quantized import dequantize_weight
from mlx_slim.ranks.state import state
from mlx_slim.runtime import on_gpu, run_in_threads, to_float, world
from mlx_slim.sharding.model import ShardedModel
from mlx_slim.training.chunk_size import chunk_size
from mlx_slim.training.chunks import IDLE, Chunk, in_step
from mlx_slim.training.losses import NLL, TokenLoss, linear_loss
from mlx_slim.training.objective import Arrays, Objective
from mlx_slim.training.optim import set_trainable, trainable
from mlx_slim.training.ranks import random_unit, sum_gradients, sum_numbers
from mlx_slim.training.step_result import StepResult, means

PART_TOKENS = 256  # below this a shard of a batch is not worth its overhead


def part_count(num_threads: int, tokens: int) -> int:
    """Return into how many shards ``num_threads`` threads cut a batch of ``tokens`` positions.

    Two shards a thread, where they are worth it: then half of the batch is in memory at a time.
    """
    return 1 if num_threads == 1 else min(2 * num_threads, max(num_threads, tokens // PART_TOKENS))


class CrossEntropy:
    """Next-token cross-entropy, with head rows only where tokens are supervised.

    Args:
        model: Decides once whether it splits into body and head.
        chunk: Positions whose logits exist at one time; None chooses.
        vocabulary: Token ids below this may be used for the probe.
        num_threads: Threads that compute chunks of a batch, with ``chunk`` positions in total.
        weights_S: float32 weight of each target, by its number in the store (``Batch.sources_N``);
            None is 1 for all.
    """

    metrics: tuple[str, ...] = ()
    token_loss: TokenLoss = NLL()

    def __init__(
        self,
        model: nn.Module,
        chunk: int | None = None,
        vocabulary: int = 8,
        num_threads: int = 1,
        weights_S: np.ndarray | None = None,
    ) -> None:
        self.split = structure.split(model, vocabulary)
        head = self.split.head.vocabulary if self.split else vocabulary
        self._chunk = chunk_size(head, chunk, num_threads)
        self._weights_S = weights_S
        self._dense_VD: mx.array | None = None

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside, all shards of a batch use one dense copy of a quantized head (on a CPU)."""
        module = self.split.head.module if self.split else None
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)) and not on_gpu():
            self._dense_VD = dequantize_weight(module)
            mx.eval(self._dense_VD)
        try:
            yield
        finally:
            self._dense_VD = None

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays`` and, where targets have weights, these."""
        return (*batch_arrays(batch), *target_weights(batch, self._weights_S))

    def weight(self, batch: Batch) -> float:
        """Return the sum of the targets' loss weights: their number where these are 1."""
        return batch.total_weight

    def begin_step(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Do nothing: a token's loss needs no other token."""

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ loss of the targets, float32, nats."""
        tokens_BT, positions_N, targets_N, segments_BT, *rest = arrays
        rows = supervised_rows(model, self.split, tokens_BT, positions_N, segments_BT)
        return self.head_loss(rows, (targets_N, *rest), gradient=gradient)

    def head_loss(
        self,
        rows: mx.array,
        columns: tuple[mx.array, ...],
        *,
        gradient: bool,
        token_loss: TokenLoss | None = None,
    ) -> mx.array:
        """Return Σ loss of what ``supervised_rows`` returns, float32, nats.

        ``token_loss`` replaces the objective's own.
        """
        token_loss = token_loss or self.token_loss
        if self.split is None:
            return token_loss.value(rows, *columns)
        return linear_loss(
            rows,
            self.split.head,
            token_loss,
            columns,
            chunk=self._chunk,
            gradient=gradient,
            dense_VD=self._dense_VD,
        )


def supervised_rows(
    model: nn.Module,
    split: structure.Split | None,
    tokens_BT: mx.array,
    positions_N: mx.array,
    segments_BT: mx.array | None,
) -> mx.array:
    """Return the hidden states (N, D) of a batch's supervised positions, before the head.

    Of a model that does not split: its logits (N, V) there.
    """
    cache = None
    if segments_BT is not None:
        cache = structure.segment_caches(model, segments_BT)
    rows_BTX = (split.body if split else model)(tokens_BT, cache=cache)
    return rows_BTX.reshape(-1, rows_BTX.shape[-1])[positions_N]


def batch_arrays(batch: Batch) -> Arrays:
    """Return tokens_BT, positions_N, targets_N and segments_BT (or None) as mlx arrays."""
    segments = None if batch.segments_BT is None else mx.array(batch.segments_BT)
    return (
        mx.array(batch.tokens_BT),
        mx.array(batch.positions_N),
        mx.array(batch.targets_N),
        segments,
    )


def target_weights(batch: Batch, weights_S: np.ndarray | None = None) -> list[mx.array]:
    """Return the weights of a batch's targets (N,), float32, if they are not all 1: 0 for padding.

    Args:
        batch: The batch.
        weights_S: Weight of each target, by its number in the store; None is 1 for all.
    """
    weights_N = batch.weights_N
    if weights_S is not None:
        loss_weights_N = weights_S[batch.sources_N].astype(np.float32)
        weights_N = loss_weights_N if weights_N is None else loss_weights_N * weights_N
    return [] if weights_N is None else [mx.array(weights_N)]


class Stepper:
    """Turns the micro-batches of a step into one gradient.

    Args:
        model: Its trainable parameters are differentiated.
        objective: Summed loss of a batch.
        compiled: Fuse forward and backward pass with ``mx.compile``, which keeps a trace of each
            shape that it meets: ``data/shapes.py`` makes them few.
        num_threads: Threads that compute chunks of a micro-batch side by side on a CPU; a compiled
            one stays whole.
        captured: Modules whose frozen arrays change between steps: inputs of a compiled step.
        prefix_sharing: Whether rows of a micro-batch share their beginnings where that is quicker;
            not in a compiled step, where each prefix tree would be a trace of its own.
        sharded: What ``model`` has slices of, if each rank does: its gradients come summed.

    Attributes:
        num_threads: As given; 1 in a compiled step.
        random_unit: What random numbers belong to: ranks do not share a micro-batch that has some.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        compiled: bool = False,
        num_threads: int = 1,
        captured: Sequence[dict] = (),
        prefix_sharing: bool = False,
        sharded: ShardedModel | None = None,
    ) -> None:
        self.model = model
        self._sharded = sharded
        self.objective = objective
        self._prefix_sharing = prefix_sharing and not compiled
        self.num_threads = 1 if compiled else num_threads
        self.random_unit = random_unit(model)
        self._compiled = compiled
        self._building = threading.Lock()

        def loss(
            parameters: dict[str, mx.array],
            *arrays: Any,
        ) -> tuple[mx.array, mx.array]:
            set_trainable(model, parameters)
            if sharded is None:
                sums = objective(model, arrays, gradient=True)
            else:
                sharded.gather_trained()
                sums = objective(model, arrays[:-1], gradient=True) * arrays[-1]
            return (sums[0] if sums.ndim else sums), sums

        differentiate = mx.value_and_grad(loss)

        def value_and_grad(
            parameters: dict[str, mx.array],
            rows: tuple[mx.array, int, int] | None,
            *arrays: Any,
        ) -> tuple[tuple[mx.array, mx.array], dict[str, mx.array]]:
            with drawn_for(*rows) if rows else contextlib.nullcontext():
                return differentiate(parameters, *arrays)

        self._value_and_grad: Callable = value_and_grad
        if compiled:
            # Frozen weights are constants of the graph; dropout draws from the global random state.
            state = [mx.random.state]
            self._value_and_grad = mx.compile(
                self._value_and_grad, inputs=[*state, *captured], outputs=state
            )

    def shards(self, batch: Batch, count: int) -> list[Batch]:
        """Return what is computed at a time: ``count`` shards, or lists of shared rows."""
        shards = batch.shards(count)
        return cheapest(batch, shards, self.num_threads) if self._prefix_sharing else shards

    def micro(self, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the sums of one micro-batch and the gradient of its loss, evaluated."""
        return self._compute(self._chunks(batch))

    def _chunks(self, batch: Batch) -> list[Chunk]:
        """Return what is computed of a micro-batch at a time."""
        shards = self.shards(batch, part_count(self.num_threads, batch.computed_tokens))
        if len(shards) == 1:
            return [Chunk(shards[0])]
        # Dropout is drawn from a seed of the chunk, whichever chunk is built first.
        return [Chunk(shard, int(to_float(mx.random.randint(0, 2**31 - 1)))) for shard in shards]

    def _chunks_of_rank(self, batch: Batch, rank: int, ranks: int) -> list[Chunk]:
        """Return those of one of the ranks that compute a micro-batch side by side."""
        chunks = self._chunks(batch)
        if len(chunks) > 1:
            return chunks[rank::ranks]
        listed = chunks[0].batch.nodes is not None
        if self.random_unit == "micro-batch" or (listed and self.random_unit == "row"):
            return chunks if rank == 0 else []
        rows = rows_of_rank(batch, rank, ranks, fixed=self._compiled)
        return [] if rows is None else [Chunk(self.shards(rows, 1)[0])]

    def _compute(self, chunks: list[Chunk]) -> tuple[mx.array, dict[str, mx.array]]:
        if len(chunks) == 1 and chunks[0].seed is None:
            return self._sums_of(chunks[0])
        threads = 1 if on_gpu() else self.num_threads
        mx.eval(self.model.parameters())  # a thread cannot evaluate what another one began
        sharing = getattr(self.objective, "sharing", contextlib.nullcontext)
        if self._sharded is not None:  # collectives of two threads would mix
            results = [self._sums_of(chunk) for chunk in chunks]
        else:
            with blas.single_threaded(), sharing():
                results = run_in_threads(self._sums_of, [(one,) for one in chunks], threads)
        sums, gradients = results[0]
        for part_sums, part_gradients in results[1:]:
            sums = sums + part_sums
            gradients = {path: value + part_gradients[path] for path, value in gradients.items()}
        mx.eval(sums, gradients)
        return sums, gradients

    def _sums_of(self, chunk: Chunk) -> tuple[mx.array, dict[str, mx.array]]:
        """Build the graph of a batch, one thread at a time, and evaluate it."""
        if self._sharded is not None:
            with self._sharded.outside_blocks(trained=False):
                return self._evaluated(chunk)
        return self._evaluated(chunk)

    def _evaluated(self, chunk: Chunk) -> tuple[mx.array, dict[str, mx.array]]:
        batch = chunk.batch
        with self._building:  # building writes parameters into the model of all threads
            if chunk.seed is not None:
                mx.random.seed(chunk.seed)
            parameters = trainable(self.model)
            arrays, rows = self.objective.arrays(batch), None
            if batch.drawn is not None:
                rows = (mx.array(batch.drawn.rows_B), batch.drawn.batch, batch.drawn.width)
            if self._sharded is not None:
                arrays = (*arrays, mx.array(chunk.factor))
            with prefix_attention(batch.nodes):
                (_, sums), gradients = self._value_and_grad(parameters, rows, *arrays)
            set_trainable(self.model, parameters)
        mx.eval(sums, gradients)
        return sums, gradients

    def _work(self, batches: Sequence[Batch], rank: int, ranks: int) -> Iterator[list[Chunk]]:
        """Yield what ``rank`` computes of a step: micro-batches, and its rows of the last ones.

        As many micro-batches as the ranks divide are dealt whole; all ranks compute some rows of
        each of the others.
        """
        whole = len(batches) - len(batches) % ranks
        for index, batch in enumerate(batches):
            if index < whole and index % ranks != rank:
                continue
            if batch.entropy:
                entropy = np.random.SeedSequence(batch.entropy)
                mx.random.seed(int(entropy.generate_state(1)[0]))
            if index < whole:
                chunks = self._chunks(batch)
            else:
                chunks = self._chunks_of_rank(batch, (rank - index) % ranks, ranks)
            if self._sharded is not None:
                yield in_step(chunks, partial(self._idle, batch))
            elif chunks:
                yield chunks

    def _idle(self, batch: Batch) -> Chunk:
        """Return what a rank computes, and does not count, while others have work."""
        rows = rows_of_rank(batch, 0, world().size(), fixed=self._compiled)
        assert rows is not None
        return Chunk(replace(self.shards(rows, 1)[0], drawn=None), factor=IDLE)

    def sums(
        self, batches: Sequence[Batch], rank: int = 0, ranks: int = 1
    ) -> tuple[mx.array, dict[str, mx.array], int]:
        """Return the sums over what ``rank`` computes of a step, the gradient, the positions.

        The sums and gradients (float32) of all ranks add up to those of one.
        """
        gradients: dict[str, mx.array] = {}
        sums = mx.zeros((1 + len(self.objective.metrics),), dtype=mx.float32)
        computed = 0
        for chunks in self._work(batches, rank, ranks):
            micro_sums, values = self._compute(chunks)
            sums = sums + micro_sums
            for path, value in values.items():
                value32 = value.astype(mx.float32)
                gradients[path] = gradients[path] + value32 if path in gradients else value32
            mx.eval(sums, gradients)
            computed += sum(chunk.batch.computed_tokens for chunk in chunks if chunk.factor != IDLE)
        return sums, gradients, computed

    def step(self, batches: Iterable[Batch]) -> StepResult:
        """Return loss and gradient over ``batches``: those of the step, the same on all ranks.

        What is random in a batch is drawn from its ``entropy``, if it has any.
        """
        batches, group, waited = list(batches), world(), state.waited
        self.objective.begin_step(self.model, batches)
        sums, gradients, computed = self.sums(batches, group.rank(), group.size())
        values, here = np.array(sums), computed
        if group.size() > 1:
            if self._sharded is None:
                for path, value in trainable(self.model).items():
                    gradients.setdefault(path, mx.zeros(value.shape, dtype=mx.float32))
                gradients = sum_gradients(gradients)
            *added, computed = sum_numbers(*values.tolist(), computed)
            values = np.array(added)
        weight = sum((self.objective.weight(batch) for batch in batches), 0.0)
        loss, metrics = means(self.objective.metrics, values, weight)
        return StepResult(
            loss=loss,
            gradients={path: value / weight for path, value in gradients.items()},
            supervised=sum(batch.supervised_tokens for batch in batches),
            tokens=sum(batch.real_tokens for batch in batches),
            computed=int(computed),
            here=here,
            waited=state.waited - waited,
            metrics=metrics,
        )
