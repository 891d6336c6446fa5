"""The moment of a training step in which most memory is in use, from shapes.

Invariant: weights, gradients and optimizer state are exact (``shapes.py``). Activations are counted
from what autodiff stores of a block, each factor one array of that size; the others were fitted.
Both were checked against measured peaks (``mlx-slim bench plan``; ``docs/lab-log.md`` has the
figures). Attention stores the scores of all pairs of positions, but where Metal's fused backward
pass takes it (``models/attention.py``): an array as a mask, as packed rows have, is not taken. On a
GPU nothing was measured by this project: unfused activations are counted, ``mx.compile`` may need
less. Try it: ``mlx-slim analyze memory smollm2-lora``.

Numbers are per token unless a name says bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_slim.config.schema import Recipe
from mlx_slim.planner.shapes import Block, TrainingShapes
from mlx_slim.runtime import default_num_threads
from mlx_slim.training.chunk_size import chunk_size, part_count

# Arrays that are stored for a block until its backward pass. ``width``: the inputs of attention
# and MLP; ``norms``: the output of each; ``queries``: rotated queries, attention's output;
# ``keys``: rotated keys, values; ``scores``: probabilities, and a fifth of them for masks.
STORED = {"width": 1.0, "norms": 1.0, "queries": 2.0, "keys": 2.0, "scores": 1.2}
# Of the widest layer: gate, up and product under our SwiGLU; MLX's stores sigmoid and SiLU too;
# GELU stores the steps of its polynomial.
STORED_INNER = {"fast": 3.0, "gated": 5.0, "other": 6.0}
# In pieces: the inputs of attention and MLP, rotated queries and attention's output, rotated keys
# and values, gate and up.
STORED_IN_PIECES = {"width": 2.0, "queries": 2.0, "keys": 2.0, "inner": 2.0}
# What MLX holds while a piece is differentiated; NumPy's arrays are besides.
TRANSIENT_IN_PIECES = {"width": 3.0, "queries": 2.0, "keys": 2.0, "inner": 3.0}
STORED_DROPOUT = 1.25  # of the inputs of adapted layers: each layer's dropped copy and its mask
STORED_DORA = 1.0  # of the outputs of adapted layers: before they are scaled
STORED_CHECKPOINTED = 1.4  # of the width: the input of a checkpointed block is stored
# Fitted: other arrays that exist while one block is differentiated.
TRANSIENT = {"width": 1.3, "queries": 5.4, "keys": 3.1, "inner": 3.2, "scores": 1.8}
# Where attention is fused: 0.68 GiB were measured for one layer of 8,192 positions with 32 and 8
# heads of 128, and 12.5 GiB unfused (mlx-train-perf, M1 Max).
TRANSIENT_FUSED = {"queries": 7.6}
RECOMPUTED = 1.4  # of a block's activations, when it is recomputed
LOGITS = 3.0  # float32 copies of one chunk of logits
LOGITS_AHEAD = 3.0  # more on a CPU with one thread, where MLX allocates ahead of the computation
# More copies with teachers: mixed with cross-entropy, at a temperature, a further teacher.
LOGITS_MIXED, LOGITS_HEATED, LOGITS_TEACHER = 1.0, 1.0, 2.0
LOGITS_CAPPED = 3.0  # more with a soft cap: its input, its derivative and the product
# Of a model that does not split, all positions at once: in the dtype of computation and in float32.
LOGITS_FULL, LOGITS_FULL32 = 2.0, 3.5
LOGITS_MUTUAL = 6.0  # the other student's, and both distributions
LOGITS_ULD = 8.0  # sorted ones, and what differentiating them stores, of half a chunk
COLUMN = 12  # bytes of a stored teacher token: its id twice, its log-probability
OVERLAP = 0.5  # of such a short peak, what another thread needs at the same moment
# Of the loss: grows with its fraction of a step's operations; a longer loss overlaps more often.
LOSS_OVERLAP, LOSS_OVERLAP_GROWTH = 0.2, 1.7
HEAD_GRADIENT = 3.0  # float32 copies of a trained head, while its gradient is summed
HEAD_AHEAD = 1.5  # more of them on a CPU, where MLX allocates up to ten operations ahead
DENSE_LAYER = 1.5  # float32 copies of the largest quantized layer, on a CPU
UPDATE = 4.0  # float32 copies of the largest parameter, while the optimizer changes it


def largest_batch(recipe: Recipe, lengths: Sequence[int] | None) -> tuple[int, int]:
    """Return (positions of a sequence, of all) of the largest micro-batch, padding counted.

    A row's last token is only a target. Packed sequences have ``max_length`` positions, however
    short the rows. Both answers of a pair are in one.
    """
    train = recipe.train
    unit = 2 if recipe.preference_rows == "pairs" else 1
    if lengths is None:
        width = unit * train.max_length
        return train.max_length, max(unit - 1, train.batch_tokens // width) * width
    longest = max(1, min(max(lengths, default=train.max_length), train.max_length) - 1)
    rows = len(lengths) * longest
    if train.batching == "packed":
        longest = min(train.max_length, sum(lengths))
    tokens = max(1, train.batch_tokens // (unit * longest)) * unit * longest
    return longest, max(1, min(tokens, rows))


def _numbers(block: Block, factors: dict[str, float], scores: int) -> float:
    """Σ factor · quantity: numbers per token of one block."""
    quantities = {
        "width": block.width,
        "norms": block.norms * block.width,
        "queries": block.queries,
        "keys": block.keys,
        "inner": block.inner,
        "scores": scores,
    }
    return sum(factor * quantities[name] for name, factor in factors.items())


def in_pieces(shapes: TrainingShapes, recipe: Recipe, size: int, *, gpu: bool) -> bool:
    """Return whether blocks are computed in pieces; see ``training/blockwise.py``."""
    train, distill = recipe.train, recipe.distill
    others = (distill is not None and distill.method == "mutual") or train.neftune_alpha > 0
    one_graph = train.grad_checkpoint or train.compile is True or others or not shapes.splits
    return not (gpu or size != 4 or one_graph) and all(block.in_pieces for block in shapes.blocks)


def _stored(block: Block, recipe: Recipe, scores: int, gpu: bool) -> float:
    """Numbers per token that are stored for the backward pass of a block."""
    kind = "other" if not block.gated else "gated" if gpu else "fast"
    residuals = (block.norms - 1) * block.width  # each sublayer after the first stores its input
    numbers = _numbers(block, STORED, scores) + residuals + STORED_INNER[kind] * block.inner
    numbers += block.routed
    if recipe.method != "full" and recipe.adapter.dropout > 0:
        # The copies replace the inputs themselves, which several layers use.
        shared = block.norms * block.width + block.queries + block.inner
        numbers += STORED_DROPOUT * block.inputs - min(shared, block.inputs)
    if recipe.method == "dora":
        numbers += STORED_DORA * block.outputs
    return numbers


def transient_numbers(block: Block, scores: int) -> float:
    """Numbers per token that exist while a block is differentiated, besides what is stored."""
    return _numbers(block, TRANSIENT if scores else {**TRANSIENT, **TRANSIENT_FUSED}, scores)


def _logit_copies(recipe: Recipe, capped: bool) -> float:
    """Float32 copies of one chunk of logits."""
    distill, copies = recipe.distill, LOGITS + (LOGITS_CAPPED if capped else 0)
    if distill is None or distill.method in ("sequence", "rationales"):
        return copies
    if distill.method == "mutual":
        return copies + LOGITS_MUTUAL
    copies += LOGITS_TEACHER * (len(distill.teachers) - 1)
    if 0 < distill.weight < 1:
        copies += LOGITS_MIXED
    if distill.method == "uld":
        copies += LOGITS_ULD if recipe.train.loss_chunk else LOGITS_ULD / 2
    return copies if distill.temperature == 1 else copies + LOGITS_HEATED


def _loss_fraction(shapes: TrainingShapes, recipe: Recipe) -> float:
    """Return the head's fraction of a step's operations, without adapters and attention."""
    head = 4 * shapes.vocabulary * shapes.width
    blocks = 2 * sum(block.linear for block in shapes.blocks)
    return head / (head + blocks * (3 if recipe.train.grad_checkpoint else 2))


def _column_bytes(recipe: Recipe, vocabulary: int) -> int:
    """Bytes that teachers' cached logits take for each position."""
    distill = recipe.distill
    if distill is None or distill.method not in ("auto", "logits", "uld", "on-policy"):
        return 0
    top_k = vocabulary if distill.top_k == "all" else min(distill.top_k, vocabulary)
    return COLUMN * top_k * len(distill.teachers)


def breakdown(
    shapes: TrainingShapes,
    recipe: Recipe,
    size: int,
    lengths: Sequence[int] | None,
    gpu: bool,
    gpu_bytes: int,
    fused: bool,
) -> dict[str, int]:
    """Return the bytes of each kind at the moment of the peak.

    The peak is the largest of the moments of the last micro-batch: the loss (all activations and a
    chunk of logits), the first block of the backward pass (all activations and that block's
    gradients being computed), one of these in each thread, the end of the backward pass (all
    parameter gradients and one block), the update of the largest parameter. On a CPU each thread
    computes a shard of the batch (``training/step.py``); they start one after the other: their
    activations add up, their short peaks overlap sometimes.

    Args:
        shapes: Of the model under this recipe.
        recipe: Checked recipe.
        size: Bytes of a number of the computation.
        lengths: Tokens of each training row, if they are counted already.
        gpu: Whether it runs on a GPU.
        gpu_bytes: Memory of that GPU.
        fused: Whether its backward pass of attention is fused, and the rows need no array mask.
    """
    train, full = recipe.train, recipe.method == "full"
    length, tokens = largest_batch(recipe, lengths)
    num_threads = 1 if gpu or recipe.trains_weights else default_num_threads()
    unit = length * (2 if recipe.preference_rows == "pairs" else 1)  # what shards are made of
    shards = min(part_count(num_threads, tokens), max(1, tokens // unit))
    num_threads = min(num_threads, shards)
    rows, more = divmod(max(1, tokens // unit), shards)  # the first shards have one row more
    shard = (rows + (more > 0)) * unit
    alive = (rows * num_threads + min(more, num_threads)) * unit

    pieces = in_pieces(shapes, recipe, size, gpu=gpu)

    def stored_of(block: Block) -> float:
        if pieces:
            return _numbers(block, STORED_IN_PIECES, 0)
        return _stored(block, recipe, block.scores(length, fused), gpu)

    widest = max(shapes.blocks, key=stored_of)
    if train.grad_checkpoint:
        stored = sum(STORED_CHECKPOINTED * block.width for block in shapes.blocks)
        recomputed = RECOMPUTED * stored_of(widest)
    else:
        stored = sum(map(stored_of, shapes.blocks))
        recomputed = 0.0
    activation_bytes = stored * alive * size
    transient = transient_numbers(widest, widest.scores(length, fused))
    if pieces:
        transient = _numbers(widest, TRANSIENT_IN_PIECES, 0)
    transient_one = (recomputed + transient) * shard * size
    transient_bytes = transient_one * (1 + OVERLAP * (num_threads - 1))
    chunk = min(
        chunk_size(
            shapes.vocabulary, train.loss_chunk, num_threads, gpu_bytes=gpu_bytes if gpu else 0
        ),
        shard,
    )
    overlap = min(1.0, LOSS_OVERLAP + LOSS_OVERLAP_GROWTH * _loss_fraction(shapes, recipe))
    if shapes.splits:
        copies = _logit_copies(recipe, shapes.capped) + (
            LOGITS_AHEAD if num_threads == 1 and not gpu else 0
        )
        logits_one = copies * 4 * chunk * shapes.vocabulary
    else:
        logits_one = (LOGITS_FULL * size + LOGITS_FULL32 * 4) * shard * shapes.vocabulary
    logits = logits_one * (1 + overlap * (num_threads - 1))
    activation_bytes += _column_bytes(recipe, shapes.vocabulary) * alive
    table = 4 * shapes.vocabulary * shapes.width
    dense = table if shapes.quantized and not gpu else 0  # the head's weight, one for all shards
    if shapes.head_trains:
        activation_bytes += (HEAD_GRADIENT + (0 if gpu else HEAD_AHEAD)) * table
    if shapes.quantized and not gpu:
        transient_bytes += DENSE_LAYER * 4 * widest.largest
        transient_one += DENSE_LAYER * 4 * widest.largest
    # One thread in its loss, another one in its backward pass.
    mixed = max(logits_one, transient_one) + overlap * (num_threads - 1) * min(
        logits_one, transient_one
    )
    update = (UPDATE + 1) * 4 * shapes.largest
    moments = {
        "loss": (activation_bytes, logits + dense, 0),
        "mixed": (activation_bytes, mixed + dense, 0) if num_threads > 1 else (0, 0, 0),
        "first": (activation_bytes + transient_bytes, dense, 0),
        "last": (
            transient_bytes + (table if full else 0),
            dense,
            shapes.trainable_bytes if full else 0,
        ),
        "update": (
            (update - 4 * shapes.largest, 0, 4 * shapes.largest)
            if recipe.trains_weights
            else (0, 0, 0)
        ),
    }
    activations, logits, gradients = max(moments.values(), key=sum)
    # The sum over micro-batches is one more float32 gradient, and each finished shard has one.
    done = shards - num_threads + (0 if full else 1)
    gradients += shapes.gradient_bytes * (done + (train.accumulate > 1))
    return {
        "weights": shapes.base_bytes + shapes.rounded_bytes + shapes.adapter_bytes,
        "gradients": int(gradients),
        "optimizer": shapes.optimizer_bytes,
        "activations": int(activations),
        "logits": int(logits),
    }
