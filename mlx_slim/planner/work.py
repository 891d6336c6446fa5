"""The operations of a run, and the time that they take on this device.

Invariant: time is operations divided by rates that are measured first (matrix products,
exponentials and memory passes, which on a CPU cost more than the products); an estimate of the rows
is marked as one. ``time.py`` has the time on a machine of which only the peak is known. Legend: P
numbers of the blocks' matrices, T row length, V vocabulary, d width. Try it:
``mlx-slim plan smollm2-lora``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_slim.config.schema import Recipe
from mlx_slim.planner.peak import in_pieces
from mlx_slim.planner.rows import SUPERVISED, expected_rows
from mlx_slim.planner.shapes import TrainingShapes
from mlx_slim.runtime import exp_nanoseconds, host_exp_nanoseconds, matmul_gflops, on_gpu

FILLED = 0.93  # fraction of computed tokens that are real
# Passes over memory per stored activation: written, read and differentiated.
PASSES = 4.0
# Forward passes that a drawn token costs, about: products of a few rows are slower than those of a
# micro-batch. On a CPU drawing was half of the time of GRPO (docs/lab-log.md): 3 to 8.
DRAWN = 4.0
DRAWN_BATCH = 32  # answers of a batch


@dataclass(frozen=True)
class TrainingWork:
    """Tokens of a run.

    Attributes:
        tokens: Real tokens over all epochs or steps.
        tokens_per_epoch: Of one pass over the rows.
        length: Typical row length, tokens.
        basis: How they were counted, as text.
        supervised: Fraction of the tokens that is supervised, where prompts are masked.
        common: Tokens that all rows begin with.
        drawn: Tokens of answers that the model draws besides.
    """

    tokens: int
    tokens_per_epoch: int
    length: int
    basis: str
    supervised: float = SUPERVISED
    common: int = 0
    drawn: int = 0

    def sharing(self, batch_tokens: int, *, pairs: bool = False) -> TrainingWork:
        """Return the work that is left where micro-batches compute the common tokens once.

        Of ``pairs`` that is at least the prompt of both answers.
        """
        if pairs:
            fraction = (1 + self.supervised) / 2
            tokens = int(self.tokens * fraction)
            return replace(self, tokens=tokens, supervised=self.supervised / fraction)
        rows = max(1, batch_tokens // max(1, self.length))
        common = min(self.common, self.length - 1)
        fraction = (common + rows * (self.length - common)) / (rows * max(1, self.length))
        supervised = self.supervised / fraction  # as many tokens as before
        return replace(self, tokens=int(self.tokens * fraction), supervised=supervised)


@dataclass(frozen=True)
class Operations:
    """What a run computes in training; a teacher's passes are not counted.

    Attributes:
        flops: Of matrix products.
        exponentials: Of activations, attention and loss.
        elements: Numbers that elementwise passes over activations touch.
        unpacked: Numbers of weights that a CPU unpacks from a quantized base.
        moved_bytes: Bytes of weights, gradients, moments and activations that are read or written.
        batch_tokens: Positions of a full micro-batch.
        in_pieces: Whether a CPU computes blocks in pieces: its exponentials are NumPy's, and those
            of the forward pass are computed again.
    """

    flops: float
    exponentials: float
    elements: float
    unpacked: float
    moved_bytes: float
    batch_tokens: int
    in_pieces: bool = False


@dataclass(frozen=True)
class Speed:
    """Rates of the device.

    Attributes:
        flops: Of a matrix product, per second.
        exponential: Seconds per exponential.
        element: Seconds per element of an elementwise pass.
        host_exponential: Seconds per exponential of NumPy; None is ``exponential``.
    """

    flops: float
    exponential: float
    element: float
    host_exponential: float | None = None


def measure_speed(dtype: mx.Dtype) -> Speed:
    """Return the rates of the default device, measured in about a tenth of a second.

    Args:
        dtype: Of the matrix product.
    """
    size = 2048 if on_gpu() else 512
    flat = mx.full((1 << 20,), 0.5)
    mx.eval(flat)
    element = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        mx.eval(flat * flat)
        element = min(element, (time.perf_counter() - began) / flat.size)
    host = None if on_gpu() else host_exp_nanoseconds() * 1e-9
    exponential = exp_nanoseconds(1 << 19 if on_gpu() else 1 << 16) * 1e-9
    return Speed(matmul_gflops(dtype, size, 4) * 1e9, exponential, element, host)


def expected_work(
    recipe: Recipe, lengths: Sequence[int] | None = None, *, local: bool = True
) -> TrainingWork | None:
    """Return the tokens that ``recipe`` will train on, or None where they cannot be estimated.

    Args:
        recipe: Its sources, epochs and steps.
        lengths: Tokens of each training row, if they are counted already.
        local: Read files and the mirror on this machine; else the hub's rows are meant.

    Raises:
        SlimError: If local rows are missing or cannot be read.
    """
    train = recipe.train
    rows = expected_rows(recipe, local=local) if lengths is None else None
    supervised = rows.supervised if rows else SUPERVISED
    per_epoch, length, basis = rows[:3] if rows else (None, train.max_length, "")
    common = rows.common if rows else 0
    if lengths is not None:
        used = [min(n, train.max_length) for n in lengths]
        per_epoch, length = sum(used), int(sum(used) / max(1, len(used)))
        basis = f"{len(used):,} rows, counted"
    if train.steps is not None:
        tokens = int(train.steps * train.accumulate * train.batch_tokens * FILLED)
        basis = f"{train.steps:,} full steps"
        per_epoch = tokens if per_epoch is None else per_epoch
        return TrainingWork(tokens, per_epoch, length, basis, supervised, common)
    if per_epoch is None:
        return None
    basis = f"{train.epochs:g} x {basis}"
    tokens = int(per_epoch * train.epochs)
    return TrainingWork(tokens, per_epoch, length, basis, supervised, common)


def scored_tokens(recipe: Recipe, work: TrainingWork) -> float:
    """Return the tokens that preference tuning computes without learning from them.

    Each row once with the reference; for KTO the mismatched rows too, and these in every step.
    """
    preference = recipe.preference
    if preference is None or not preference.has_reference:
        return 0.0
    if preference.loss == "kto":
        return 2.0 * work.tokens_per_epoch + work.tokens
    return float(work.tokens_per_epoch)


def operations(
    shapes: TrainingShapes,
    recipe: Recipe,
    work: TrainingWork,
    *,
    size: int = 2,
    fused: bool = False,
) -> Operations:
    """Return what training computes, without loading, validation and saving.

    Matrix products: 2P forward and 2P backward for each token, 2P more for weight gradients of
    full fine-tuning and for recomputation; 4·V·d for a supervised token. A drawn token: ``DRAWN``
    forward passes, and each step of a batch reads the weights. Attention: 12·T·q, and
    4·T·q to recompute; fused, 14·T·q and 4·T·q of which a causal mask leaves half.

    Args:
        shapes: Of the model under this recipe.
        recipe: Checked recipe.
        work: Tokens of the run.
        size: Bytes of a number of the computation.
        fused: As for ``peak.breakdown``.
    """
    train = recipe.train
    full = recipe.method == "full"
    recomputed = 1 if train.grad_checkpoint else 0
    scored = scored_tokens(recipe, work) / FILLED  # forward only: 2P, a third of attention
    linear = sum(block.linear for block in shapes.blocks)
    adapters = 0 if full else shapes.trainable_parameters
    fraction = work.supervised if recipe.data.mask_prompt else 1.0
    passes = 2 + recomputed + (1 if full else 0)
    length = train.max_length if train.batching == "packed" else work.length
    scores = [block.scores(length, fused) for block in shapes.blocks]
    attention = sum(
        (12 + 4 * recomputed if stored else 7 + 2 * recomputed) * length * block.queries
        for block, stored in zip(shapes.blocks, scores, strict=True)
    )
    head = shapes.vocabulary * shapes.width
    flops = 2 * linear * passes + 6 * adapters + attention
    flops += fraction * head * (6 if full else 4)
    forward_flops = 2 * linear + attention / 3 + fraction * head * 2
    forward_exponentials = sum(block.inner + block.heads * length for block in shapes.blocks)
    exponentials = (1 + recomputed) * forward_exponentials + fraction * shapes.vocabulary
    forward_exponentials += fraction * shapes.vocabulary
    activations = sum(scores) + sum(
        6 * block.width + 2 * block.queries + 5 * block.inner for block in shapes.blocks
    )
    elements = activations * PASSES * (1 + recomputed / 2)
    computed = work.tokens / FILLED
    batches = computed / train.batch_tokens
    # Each micro-batch reads the weights; each step reads and writes all that is trained.
    update = shapes.trainable_bytes + shapes.gradient_bytes + shapes.optimizer_bytes
    weights = batches * (shapes.base_bytes * passes + 2 * update / train.accumulate)
    weights += work.drawn / DRAWN_BATCH * shapes.base_bytes
    drawn = DRAWN * work.drawn
    drawn_flops = 2 * linear + attention / 3 + head * 2
    drawn_exponentials = forward_exponentials + shapes.vocabulary
    return Operations(
        flops=computed * flops + scored * forward_flops + drawn * drawn_flops,
        exponentials=(
            computed * exponentials + scored * forward_exponentials + drawn * drawn_exponentials
        ),
        elements=computed * elements + (scored + drawn) * elements / 2,
        unpacked=batches * (linear + head) * (2 + recomputed) * 2 if shapes.quantized else 0.0,
        moved_bytes=weights + computed * elements * size,
        batch_tokens=max(1, min(train.batch_tokens, int(computed))),
        in_pieces=in_pieces(shapes, recipe, size, gpu=False),
    )


def predicted_seconds(work: Operations, speed: Speed, *, gpu: bool) -> float:
    """Return the wall time of training in seconds at measured rates.

    Args:
        work: What is computed.
        speed: Of the device.
        gpu: Whether it computes with the quantized weights; a CPU unpacks them in each micro-batch.
    """
    exponential = speed.exponential
    if work.in_pieces and not gpu and speed.host_exponential is not None:
        exponential = 2 * speed.host_exponential
    seconds = work.flops / speed.flops
    seconds += work.exponentials * exponential
    seconds += work.elements * speed.element
    return seconds if gpu else seconds + work.unpacked * speed.element
