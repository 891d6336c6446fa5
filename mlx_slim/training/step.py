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
from mlx_slim.models.dropout import drawn_for
from mlx_slim.models.prefix_attention import prefix_attention
from mlx_slim.ranks.state import state
from mlx_slim.runtime import on_gpu, return_free_memory, to_float, world
from mlx_slim.sharding.model import ShardedModel
from mlx_slim.threads import run_in_threads
from mlx_slim.training.blockwise import Blockwise
from mlx_slim.training.chunk_size import part_count
from mlx_slim.training.chunks import IDLE, Chunk, in_step
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.objective import Objective
from mlx_slim.training.optim import set_trainable, trainable
from mlx_slim.training.ranks import random_unit, sum_gradients, sum_numbers
from mlx_slim.training.step_result import StepResult, means


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
        self._blockwise: Blockwise | None = None
        if not compiled and sharded is None and isinstance(objective, CrossEntropy):
            self._blockwise = Blockwise(model, objective, self._building)

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
            # Here alone: while another thread computes, OpenBLAS's number must not be set.
            if on_gpu():
                return self._sums_of(chunks[0])
            with blas.numpy_single_threaded():
                result = self._sums_of(chunks[0])
            return_free_memory()
            return result
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
        if self._blockwise is not None and self._blockwise.fits():
            return self._blockwise.sums_of(chunk)
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
