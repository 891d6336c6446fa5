"""One optimizer step: micro-batches in, an exact token-mean gradient out.

Invariant: the step's loss is Σ NLL / Σ supervised tokens over all micro-batches and all ranks,
never a mean of means; so cutting the same rows into other micro-batches or onto other ranks gives
the same gradient up to rounding. Nothing is updated when the loss is not finite.
Legend: B sequences, T positions, N supervised positions, D width.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim import blas
from mlx_slim.data.batches import Batch
from mlx_slim.models import anatomy
from mlx_slim.models.quantized import dequantize_weight
from mlx_slim.runtime import number, on_gpu, side_by_side, world
from mlx_slim.train.losses import chunk_size, cross_entropy_sum, linear_cross_entropy
from mlx_slim.train.optim import set_trainable, trainable

PART_TOKENS = 256  # below this a part of a batch is not worth its overhead


def part_count(lanes: int, tokens: int) -> int:
    """Return into how many parts ``lanes`` threads cut a batch of ``tokens`` positions.

    Two parts a thread, where they are worth it: then half of the batch is in memory at a time.
    """
    return 1 if lanes == 1 else min(2 * lanes, max(lanes, tokens // PART_TOKENS))


# The arrays of a batch, in an objective's own order; None where a batch has no such array.
Arrays = tuple[Any, ...]


class Objective(Protocol):
    """What a loop minimises: Σ loss over the supervised positions of a batch, in nats."""

    def arrays(self, batch: Batch) -> Arrays:
        """Return what the loss of ``batch`` needs: ``batch_arrays``, and a teacher's after them."""
        ...

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return a float32 scalar; ``gradient`` says whether it will be differentiated."""
        ...


class CrossEntropy:
    """Next-token cross-entropy, with head rows only where tokens are supervised.

    Args:
        model: Decides once whether it splits into body and head.
        chunk: Positions whose logits exist at one time; None chooses.
        vocabulary: Token ids below this may be used for the probe.
        lanes: Parts of a batch that are computed side by side, and share those positions.
    """

    def __init__(
        self, model: nn.Module, chunk: int | None = None, vocabulary: int = 8, lanes: int = 1
    ) -> None:
        self.split = anatomy.split(model, vocabulary)
        self._chunk = chunk
        self._lanes = lanes
        self._dense_VD: mx.array | None = None

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside, all parts of a batch use one dense copy of a quantized head (on a CPU)."""
        module = self.split.head.module if self.split else None
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)) and not on_gpu():
            self._dense_VD = dequantize_weight(module)
            mx.eval(self._dense_VD)
        try:
            yield
        finally:
            self._dense_VD = None

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays``."""
        return batch_arrays(batch)

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ NLL of the targets, float32, nats."""
        tokens_BT, positions_N, targets_N, segments_BT = arrays
        cache = None
        if segments_BT is not None:
            cache = [anatomy.SegmentCache(segments_BT)] * len(anatomy.blocks(model))
        if self.split is None:
            logits = model(tokens_BT, cache)
            return cross_entropy_sum(logits.reshape(-1, logits.shape[-1])[positions_N], targets_N)
        hidden_BTD = self.split.body(tokens_BT, cache)
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[positions_N]
        chunk = chunk_size(self.split.head.vocabulary, self._chunk, self._lanes)
        return linear_cross_entropy(
            hidden_ND,
            targets_N,
            self.split.head,
            chunk=chunk,
            gradient=gradient,
            dense_VD=self._dense_VD,
        )


def batch_arrays(batch: Batch) -> Arrays:
    """Return tokens_BT, positions_N, targets_N and segments_BT (or None) as mlx arrays."""
    segments = None if batch.segments_BT is None else mx.array(batch.segments_BT)
    return (
        mx.array(batch.tokens_BT),
        mx.array(batch.positions_N),
        mx.array(batch.targets_N),
        segments,
    )


@dataclass(frozen=True)
class StepResult:
    """What a step measured, summed over all ranks.

    Attributes:
        loss: Σ NLL / Σ supervised tokens, nats.
        gradients: path -> float32 gradient of that loss.
        supervised: Σ supervised tokens.
        tokens: Σ real tokens.
        computed: Σ positions computed.
    """

    loss: float
    gradients: dict[str, mx.array]
    supervised: int
    tokens: int
    computed: int


class Stepper:
    """Turns the micro-batches of a step into one gradient.

    Args:
        model: Its trainable parameters are differentiated.
        objective: Summed loss of a batch.
        compiled: Fuse forward and backward pass with ``mx.compile``.
        lanes: Parts of a micro-batch computed side by side on a CPU, each in a thread of its own.
        captured: Modules whose frozen arrays change between steps: a compiled step reads them anew.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        compiled: bool = False,
        lanes: int = 1,
        captured: Sequence[dict] = (),
    ) -> None:
        self.model = model
        self.objective = objective
        self._lanes = lanes
        self._building = threading.Lock()

        def loss(
            parameters: dict[str, mx.array],
            *arrays: Any,
        ) -> mx.array:
            set_trainable(model, parameters)
            return objective(model, arrays, gradient=True)

        self._value_and_grad: Callable = mx.value_and_grad(loss)
        if compiled:
            # Frozen weights are constants of the graph; dropout draws from the global random state.
            state = [mx.random.state]
            self._value_and_grad = mx.compile(
                self._value_and_grad, inputs=[*state, *captured], outputs=state
            )

    def micro(self, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the summed NLL of one micro-batch and its gradient, evaluated."""
        parts = batch.parts(part_count(self._lanes, batch.computed_tokens))
        if len(parts) == 1:
            return self._part(batch, None)
        # A thread draws its dropout from a seed of its own part, whichever part is built first.
        work = [(part, int(number(mx.random.randint(0, 2**31 - 1)))) for part in parts]
        mx.eval(self.model.parameters())  # a thread cannot evaluate what another one began
        sharing = getattr(self.objective, "sharing", contextlib.nullcontext)
        with blas.single_threaded(), sharing():
            results = side_by_side(self._part, work, self._lanes)
        nll, gradients = results[0]
        for part_nll, part_gradients in results[1:]:
            nll = nll + part_nll
            gradients = {path: value + part_gradients[path] for path, value in gradients.items()}
        mx.eval(nll, gradients)
        return nll, gradients

    def _part(self, batch: Batch, seed: int | None) -> tuple[mx.array, dict[str, mx.array]]:
        """Build the graph of a batch, one thread at a time, and evaluate it."""
        with self._building:  # building writes parameters into the shared model
            if seed is not None:
                mx.random.seed(seed)
            parameters = trainable(self.model)
            nll, gradients = self._value_and_grad(parameters, *self.objective.arrays(batch))
            set_trainable(self.model, parameters)
        mx.eval(nll, gradients)
        return nll, gradients

    def step(self, batches: Iterable[Batch]) -> StepResult:
        """Return loss and gradient over ``batches`` (this rank's share; it may be empty)."""
        gradients: dict[str, mx.array] = {}
        nll = mx.zeros((), dtype=mx.float32)
        supervised = tokens = computed = 0
        for batch in batches:
            part, values = self.micro(batch)
            nll = nll + part
            for path, value in values.items():
                value32 = value.astype(mx.float32)
                gradients[path] = gradients[path] + value32 if path in gradients else value32
            mx.eval(nll, gradients)
            supervised += batch.supervised_tokens
            tokens += batch.real_tokens
            computed += batch.computed_tokens
        group = world()
        if group.size() > 1:
            for path, value in trainable(self.model).items():
                gradients.setdefault(path, mx.zeros(value.shape, dtype=mx.float32))
            # Ranks must ask for the same sums in the same order.
            averaged = nn.average_gradients(dict(sorted(gradients.items())), group=group)
            flat = cast(list[tuple[str, mx.array]], tree_flatten(averaged))
            gradients = {path: value * group.size() for path, value in flat}
            nll = mx.distributed.all_sum(nll, group=group)
            supervised, tokens, computed = (
                int(number(mx.distributed.all_sum(mx.array(count), group=group)))
                for count in (supervised, tokens, computed)
            )
        return StepResult(
            loss=number(nll) / supervised,
            gradients={path: value / supervised for path, value in gradients.items()},
            supervised=supervised,
            tokens=tokens,
            computed=computed,
        )
